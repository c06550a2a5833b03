"""Recipes: everything ``minidiff train NAME`` needs to know, in a table.

A :class:`Recipe` says where data come from, which model learns from them, with which settings, what the
sample grids show and how the result is scored. Nothing is drawn, read or built before it is asked for.
:func:`minidiff.fit.fit` runs one. :data:`HELPERS` are the networks that help a recipe: a CLIP that reads
prompts, a reader that looks at pictures.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from minidiff import critters, tones
from minidiff.checks import Size, sides
from minidiff.critters import AttributeReader, Critters
from minidiff.critters.scores import count_of, unknown_words
from minidiff.data import Batches, captioned_folder, fashion_mnist
from minidiff.data.fashion import CAPTIONS
from minidiff.data.folder import FolderImages, folder_splits
from minidiff.data.on_disk import OnDisk, part
from minidiff.denoiser import Conditioning, Diffusion, UNet, WaveUNet
from minidiff.evaluation import evaluate_images
from minidiff.files import StrPath
from minidiff.forward import NoiseLevel
from minidiff.loss import Weighting
from minidiff.metrics import FEWEST, Interval
from minidiff.pipeline import TextToImage
from minidiff.schedule import Cosine
from minidiff.text import CLIP, TextEncoder, train_clip
from minidiff.training import OptimizerName

HOLD_BACK = 10
"""Of a folder without a test split, every tenth picture is kept for :func:`score_held_back`, if there are
enough."""


DRAWINGS = 40_000
"""Pictures of critters that a model learns from."""


SIZE = 64
"""Height and width of pictures, if nothing else is chosen."""


MULTIPLE = 16
"""Sides are multiples of that many pixels: patches fill them, and the U-Net can halve what it gets twice."""


class Source(NamedTuple):
    """What a recipe trains on.

    Attributes:
        images: (N, C, H, W) uint8, in memory or on the disk, or sounds (N, 1, L) int16.
        caption: caption of image i in an epoch, or a list of N captions.
        held_back: brings images (M, C, H, W) uint8, in memory or on the disk, and M captions that are not
            trained on; None if there are none.
        notes: what the reader of the log should know, such as files that were skipped.
    """

    images: Tensor | OnDisk
    caption: Callable[[int, int], str] | Sequence[str]
    held_back: Callable[[], tuple[Tensor | OnDisk, list[str]]] | None = None
    notes: Sequence[str] = ()

    def captions(self, n: int) -> list[str]:
        """The captions of the first ``n`` images, in epoch 0."""
        return [self.caption(i, 0) if callable(self.caption) else self.caption[i] for i in range(n)]


@dataclass(frozen=True)
class Options:
    """What can be chosen about a recipe; each takes what concerns it.

    Attributes:
        size: for critters and folders, height and width in pixels, multiples of 16: one number for both, or
            (height, width), which critters take only if they are equal; None for 64, or the size of
            ``start``.
        images: number of drawings or sounds, for critters and tones; None for the recipe's own.
        seed: of the drawings.
        data_root: where Fashion-MNIST is, as :func:`minidiff.data.fashion_mnist` has it.
        caption_column: column of a folder's metadata that holds the captions; None for the usual names.
        encoder: what reads the captions; None for the recipe's own.
        conditioning: how the text enters, see :class:`~minidiff.denoiser.UNet`; None for the recipe's own.
        width: channels of the U-Net's first level, a multiple of 32; None for the recipe's own.
        start: a model that is trained further, in place of a new one: weights, text encoder with the words it
            knows, shape, target and schedule are its own.
        progress: shows how far the reading of a folder is, as
            :func:`~minidiff.data.folder.captioned_folder` takes it; None for nothing.
    """

    size: Size | None = None
    images: int | None = None
    seed: int = 0
    data_root: StrPath | None = None
    caption_column: str | None = None
    encoder: TextEncoder | None = None
    conditioning: Conditioning | None = None
    width: int | None = None
    start: Diffusion | None = None
    progress: Callable[..., AbstractContextManager[Any]] | None = None


@dataclass
class Recipe:
    """A model and how to train it. ``source`` and ``model`` are made when first asked for.

    Attributes:
        load: brings the data.
        build: makes an untrained model; it asks the recipe for the source only where it must know it.
        score: measures a trained pipeline, ``score(pipe, recipe)``, with the keyword arguments of
            :func:`minidiff.critters.evaluate`. The pipeline is one of images or of sounds, as the data are.
        prompts: what the sample grids show; empty for the first captions of the data.
        steps: optimizer steps.
        batch_size: images per step; None for 128, or all if there are fewer.
        lr: highest learning rate.
        optimizer: "adamw" or "muon", see :func:`minidiff.train`.
        weighting: of the loss, see :func:`minidiff.loss`.
        shape: of one sample, as the data have it; () if only the data tell.
    """

    load: Callable[[], Source]
    build: Callable[["Recipe"], Diffusion]
    score: Callable[..., dict[str, Interval]]
    prompts: list[str] = field(default_factory=list)
    steps: int = 1800
    batch_size: int | None = None
    lr: float = 1e-3
    optimizer: OptimizerName = "adamw"
    weighting: str | Weighting = "snr_plus_one"
    shape: tuple[int, ...] = ()

    @cached_property
    def source(self) -> Source:
        """The data."""
        source = self.load()
        if not self.prompts:
            self.prompts = list(dict.fromkeys(source.captions(len(source.images))))[:8]
        return source

    @cached_property
    def model(self) -> Diffusion:
        """The model, untrained, or the one to start from."""
        return self.build(self)


def get_recipe(name: StrPath, **options: Any) -> Recipe:
    """The recipe of that name, or for a folder of captioned images.

    Args:
        name: one of :data:`RECIPES`, or a folder.
        options: fields of :class:`Options`.

    Raises:
        ValueError: no such recipe and no such folder, an option does not fit, or the model to start from
            does not.
    """
    chosen = Options(**options)
    if chosen.start is not None:
        chosen = _agree(chosen, chosen.start)
    if name in RECIPES:
        recipe = RECIPES[str(name)](chosen)
    elif Path(name).is_dir():
        recipe = folder_recipe(name, chosen)
    else:
        raise ValueError(f"no recipe and no folder {str(name)!r}: use {', '.join(RECIPES)} or a folder")
    return recipe if chosen.start is None else _start_from(recipe, chosen.start)


def _agree(options: Options, model: Diffusion) -> Options:
    """The options with the size of the model to start from.

    Raises:
        ValueError: they contradict the model, or it reads no text.
    """
    if not isinstance(model.encoder, TextEncoder):
        raise ValueError("the model to start from reads no text: start from one with a TextEncoder")
    if options.encoder is not None:
        raise ValueError(
            "the model to start from brings its own text encoder: leave the other out, or train a new model"
        )
    config: Any = getattr(model.net, "config", {})
    given: dict[str, tuple[Any, Any]] = {
        name: (getattr(options, name), config.get(name)) for name in ("width", "conditioning")
    }
    size = size_of(model)
    given["size"] = (options.size and "{}x{}".format(*sides(options.size)), size and "{}x{}".format(*size))
    for name, (asked, there) in given.items():
        if asked is not None and asked != there:
            raise ValueError(
                f"{name} = {asked}: the model to start from has {there}: leave it out, or train a new model"
            )
    return replace(options, size=size)


def _start_from(recipe: Recipe, model: Diffusion) -> Recipe:
    """The recipe, with a trained model in place of its own; the notes of its data name the words that the
    model does not know.

    They are not learned: the table of words is a part of the text encoder, which may be frozen, and whose
    other weights have never met them.

    Raises:
        ValueError: the samples of model and data differ in shape.
    """
    if model.shape != recipe.shape:
        raise ValueError(
            f"the model to start from makes samples of shape {model.shape}, these data have {recipe.shape}: "
            "start from a model of such data, or train a new one"
        )
    load = recipe.load

    def load_and_compare() -> Source:
        source = load()
        words = cast(TextEncoder, model.encoder).unknown(source.captions(len(source.images)))
        if not words:
            return source
        some = ", ".join(map(repr, words[:5])) + (f", ... ({len(words)} in all)" if len(words) > 5 else "")
        note = f"words of the captions that the model does not know, and will not learn: {some}"
        return source._replace(notes=[*source.notes, note])

    recipe.load, recipe.build = load_and_compare, lambda _: model.requires_grad_(True)
    return recipe


def text_to_image(
    text: TextEncoder | Sequence[str], shape: tuple[int, int, int], options: Options, positions: bool = False
) -> Diffusion:
    """The model of all recipes: a U-Net that predicts x0, on the cosine schedule, and a text encoder.

    Args:
        text: the text encoder; or text that contains every word the model shall know, for an encoder
            that learns with the network.
        shape: (C, H, W) of the images.
        options: width and conditioning of the U-Net.
        positions: whether the U-Net is told where in the picture it is.

    Raises:
        ValueError: the text holds no word, or an option does not fit.
    """
    text = text if isinstance(text, TextEncoder) else TextEncoder.from_captions(text)
    net = UNet(
        shape[0], _chosen(options.width, 64), patch=_patch(shape[1:]), condition_dim=text.dim,
        conditioning=options.conditioning or "both", positions=positions,
    )  # fmt: skip
    return Diffusion(net, Cosine(), target="x0", encoder=text, shape=shape)


T = TypeVar("T")


def _chosen(value: T | None, usual: T) -> T:
    """What was chosen, 0 too, which whoever takes it refuses by name; else what is usual."""
    return usual if value is None else value


def _patch(size: Size) -> int:
    """Side of the U-Net's patches: 4 pixels, or 2 or 1 where less than 16 patches would make a side."""
    return min(4, 2 ** ((min(sides(size, MULTIPLE)) // 16).bit_length() - 1))


def _square(options: Options) -> int:
    """Height and width of critters.

    Raises:
        ValueError: they differ, or are no multiples of 16.
    """
    height, width = sides(_chosen(options.size, SIZE), MULTIPLE)
    if height != width:
        raise ValueError(f"size = {height}x{width}: critters are drawn in squares: use {height} or {width}")
    return height


# --- the recipes --------------------------------------------------------------------------------

ONE = [
    "a cat in a top hat",
    "an orange cat in a blue top hat on a green background",
    "a rabbit wearing a crown",
    "a black bear with a red cap",
    "a panda in a wizard hat on a pink background",
    "a frog in a beanie",
    "a gray dog in a party hat",
    "a hat",
]
TWO = [
    "a black cat in a red top hat left of a white rabbit in a blue crown on a green background",
    "a white rabbit in a blue crown left of a black cat in a red top hat on a green background",
    "an orange fox in a green cap above a gray bear in a purple beanie on a yellow background",
    "a brown dog in a red cap below a pink pig in a blue beanie on a white background",
    "a panda in a yellow crown next to a frog in a purple wizard hat",
    "a cat in a beanie right of a dog in a party hat",
    "a rabbit and a bear",
    "two critters",
]
HEARD = [
    "a low bell, then a high flute",
    "a low bell",
    "a high flute",
    "a middle string",
    "a soft low drum",
    "a short string, then a long bell",
    "a high bell followed by a low string",
    "a tone",
]


def critters_recipe(options: Options, count: int) -> Recipe:
    """Animals in hats, drawn on the spot; see :mod:`minidiff.critters`.

    The captions of one are read by the text tower of the shipped CLIP, frozen. Two are side by side or one
    above the other, and the U-Net is told its positions, or "left of" would mean little to it. Their captions
    are read by an encoder that learns along and reads both ways: the word "cat" must know of a hat that is
    named after it, and a tower that reads from left to right cannot tell it.

    Args:
        options: size, images, seed and those of the model.
        count: critters in a picture, 1 or 2.

    Raises:
        ValueError: an option does not fit.
    """
    size = _square(options)

    def load() -> Source:
        data = Critters(_chosen(options.images, DRAWINGS), size, seed=options.seed, count=count)
        return Source(data.images(), data.caption)

    def build(recipe: Recipe) -> Diffusion:
        text = options.encoder
        if text is None and count == 1:
            text = CLIP.from_pretrained("critters-clip").text_encoder()
        elif text is None:
            text = TextEncoder.from_captions([*critters.vocabulary(2), ","], layers=4, max_length=48)
        return text_to_image(text, (3, size, size), options, positions=count == 2)

    def score(pipe: TextToImage, recipe: Recipe, **how: Any) -> dict[str, Interval]:
        return critters.evaluate(pipe, count, **how)

    shape = (3, size, size)
    if count == 1:
        return Recipe(
            load, build, score, ONE, steps=1000, batch_size=128, lr=5e-3, optimizer="muon", shape=shape
        )
    return Recipe(load, build, score, TWO, steps=5000, batch_size=64, shape=shape)


def tones_recipe(options: Options) -> Recipe:
    """Sounds of a second, played on the spot; see :mod:`minidiff.tones`. The captions are read by an encoder
    that learns along.

    Args:
        options: images (the number of sounds), seed, encoder, conditioning and width.
    """

    def load() -> Source:
        data = tones.Tones(_chosen(options.images, 12_000), seed=options.seed)
        return Source(data.waves(), data.caption)

    def build(recipe: Recipe) -> Diffusion:
        text = options.encoder or TextEncoder.from_captions(tones.vocabulary())
        # By tokens alone: the pooled vector says the same to all frames, but each tone has words of its own.
        how = options.conditioning or "tokens"
        net = WaveUNet(_chosen(options.width, 96), condition_dim=text.dim, conditioning=how)
        return Diffusion(net, Cosine(), target="x0", encoder=text, shape=(1, tones.SAMPLES))

    def score(pipe: Any, recipe: Recipe, **how: Any) -> dict[str, Interval]:
        return tones.evaluate(pipe, **how)

    shape = (1, tones.SAMPLES)
    return Recipe(load, build, score, HEARD, steps=6500, batch_size=64, weighting=faint, shape=shape)


def faint(level: NoiseLevel) -> Tensor:
    """min(SNR / 12 + 1, 50): :func:`~minidiff.loss.snr_plus_one_weight` for faint data. The standard
    deviation of pictures is about a half, that of sounds a seventh: 12 is the square of the ratio."""
    return (level.snr / 12 + 1).clamp(max=50)


def fashion_mnist_recipe(options: Options) -> Recipe:
    """60,000 real pictures of clothes, 32x32, gray, see :mod:`minidiff.data.fashion`; 10,000 are held back.

    Args:
        options: data_root and those of the model.
    """

    def held_back() -> tuple[Tensor, list[str]]:
        data = fashion_mnist(options.data_root, train=False)
        return data.images, data.captions

    def load() -> Source:
        data = fashion_mnist(options.data_root)
        return Source(data.images, data.captions, held_back)

    def build(recipe: Recipe) -> Diffusion:
        return text_to_image(options.encoder or CAPTIONS, (1, 32, 32), options)

    return Recipe(load, build, score_held_back, list(CAPTIONS), shape=(1, 32, 32))


def folder_recipe(folder: StrPath, options: Options) -> Recipe:
    """Your own captioned images; see :mod:`minidiff.data.folder`.

    The pictures of a ``test`` split are held back; without one, every tenth picture of 400 and more.

    Args:
        folder: pictures and metadata.
        options: size, caption_column and those of the model.

    Raises:
        ValueError: a side is not a multiple of 16; when asked for data: the folder has no usable picture.
        FileNotFoundError: when asked for data: no captions in the folder.
    """
    size = sides(_chosen(options.size, SIZE), MULTIPLE)
    shape = (3, *size)

    def read(split: str | None) -> FolderImages:
        return captioned_folder(
            folder, size, split=split, caption_column=options.caption_column, progress=options.progress
        )

    def test_split() -> tuple[Tensor | OnDisk, list[str]]:
        found = read("test")
        return found.images, found.captions

    def load() -> Source:
        found = read(None)
        images, captions, notes = found.images, found.captions, found.notes
        if "test" in folder_splits(folder):
            return Source(images, captions, test_split, notes)
        if len(images) < FEWEST * HOLD_BACK:
            return Source(images, captions, None, notes)
        back = torch.arange(len(images)) % HOLD_BACK == HOLD_BACK - 1
        kept, aside = ([c for c, b in zip(captions, back, strict=True) if b == x] for x in (0, 1))
        notes.append(f"{len(aside)} of {len(images)} pictures are held back, for evaluation")
        held = part(images, back)  # not taken out when asked for: that would keep all of them
        return Source(part(images, ~back), kept, lambda: (held, aside), notes)

    def build(recipe: Recipe) -> Diffusion:
        words = options.encoder or recipe.source.captions(len(recipe.source.images))
        return text_to_image(words, shape, options)

    return Recipe(load, build, score_held_back, shape=shape)


def score_held_back(pipe: TextToImage, recipe: Recipe, **how: Any) -> dict[str, Interval]:
    """Scores against pictures that were not trained on; see :func:`minidiff.evaluation.evaluate_images`.

    Raises:
        ValueError: nothing is held back.
    """
    source = recipe.source
    if source.held_back is None:
        raise ValueError(
            f"nothing is held back of {len(source.images)} pictures: put some into test/, or train on "
            f"{FEWEST * HOLD_BACK} or more"
        )
    return evaluate_images(pipe, *source.held_back(), **how)


RECIPES: dict[str, Callable[[Options], Recipe]] = {
    "critters": partial(critters_recipe, count=1),
    "critters-duo": partial(critters_recipe, count=2),
    "fashion-mnist": fashion_mnist_recipe,
    "tones": tones_recipe,
}


def size_of(model: Diffusion) -> tuple[int, int] | None:
    """(height, width) of the pictures a model draws; None for one of other samples, or of an open shape."""
    return model.shape[1:] if model.shape is not None and len(model.shape) == 3 else None


def guess_data(model: Diffusion) -> str | None:
    """The recipe whose data a model draws, as far as the words it knows tell; None if they do not."""
    if not unknown_words(model, tones.vocabulary()):  # who reads any word knows those of critters, too
        return "tones" if unknown_words(model, critters.vocabulary()) else None
    return {1: "critters", 2: "critters-duo", None: None}[count_of(model)]


# --- the helpers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Helper:
    """A network that helps a recipe: trained whole, saved, measured.

    Attributes:
        make: an untrained one.
        train: trains it for some steps with a seed, yielding losses.
        measure: its own scores on fresh renders.
        steps: optimizer steps.
        dtype: in which it is stored; None as it is.
    """

    make: Callable[[Options], Any]
    train: Callable[[Any, Options, int, int], Iterator[float]]
    measure: Callable[[Any], dict[str, Interval]]
    steps: int = 1500
    dtype: torch.dtype | None = None


def critters_clip(options: Options, count: int) -> CLIP:
    """An untrained CLIP for critters."""
    size = _square(options)
    words, patch = [*critters.vocabulary(count), ","], size // 8
    longer = {} if count == 1 else {"text_layers": 4, "max_length": 48}
    return CLIP.from_captions(words, size=size, patch=patch, **longer)


def clip_batches(options: Options, count: int, seed: int) -> Batches:
    """The batches a CLIP learns from: what the denoiser of the recipe sees, the training split.

    Those of two critters come with negative captions of their own pictures, in which the critters' places,
    hats or colours are exchanged: without them nothing asks a CLIP to tell whose is whose.
    """
    data = Critters(_chosen(options.images, DRAWINGS), _square(options), count=count)
    negative = data.negative_caption if count == 2 else None
    return Batches(data.images(), data.caption, 128, seed=seed, negative_caption=negative)


def _clip(count: int, measure: Callable[[CLIP], dict[str, Interval]]) -> Helper:
    """A CLIP for critters."""

    def train(clip: CLIP, options: Options, steps: int, seed: int) -> Iterator[float]:
        batches = clip_batches(options, count, seed)
        return train_clip(clip, batches, steps, seed=seed, degrade=critters.degrade)

    return Helper(partial(critters_clip, count=count), train, measure, dtype=torch.float16)


def _reader(attributes: Mapping[str, Sequence[str]], features: int, images: int, steps: int) -> Helper:
    """An attribute reader."""

    def train(reader: AttributeReader, options: Options, steps: int, seed: int) -> Iterator[float]:
        return critters.train_reader(reader, steps, images=images, seed=seed)

    def make(options: Options) -> AttributeReader:
        return AttributeReader(attributes=attributes, features=features)

    return Helper(make, train, critters.reader_accuracy, steps)


HELPERS: dict[str, Helper] = {
    "critters-clip": _clip(1, critters.clip_accuracy),
    "critters-duo-clip": _clip(2, critters.binding_accuracy),
    "critters-reader": _reader(critters.ATTRIBUTES, features=128, images=40_000, steps=1500),
    "critters-duo-reader": _reader(critters.PAIR_ATTRIBUTES, features=256, images=60_000, steps=6000),
}
