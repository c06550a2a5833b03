"""Named training set-ups: everything ``minidiff train NAME`` needs to know.

A :class:`Recipe` is a model, the data it learns from and the settings of :func:`minidiff.train`.
:func:`fit` runs one: it writes the model, sample grids and a state to resume from along the way.
"""

import json
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.data import Batches, Critters, Duo, captioned_folder, critters, duo, fashion_mnist
from minidiff.data.fashion import CAPTIONS
from minidiff.denoiser import Conditioning, Diffusion, UNet
from minidiff.pipeline import TextToImage
from minidiff.plots import save_grid
from minidiff.schedule import Cosine
from minidiff.state import LOG_EVERY, LossLog, saved_steps
from minidiff.text import CLIP, TextEncoder
from minidiff.training import Step, processes, train


@dataclass
class Recipe:
    """A model and how to train it.

    Attributes:
        model: untrained.
        images: (N, C, H, W) uint8.
        caption: caption of image i in an epoch, or a list of N captions.
        prompts: what the sample grids show.
        steps: optimizer steps.
        batch_size: images per step.
        lr: highest learning rate.
        notes: what the reader of the log should know, such as files that were skipped.
    """

    model: Diffusion
    images: Tensor
    caption: Callable[[int, int], str] | Sequence[str]
    prompts: list[str]
    steps: int
    batch_size: int = 128
    lr: float = 1e-3
    notes: list[str] = field(default_factory=list)


def _patch(size: int, grid: int = 16) -> int:
    """Side of the patches that cut a picture of ``size`` into ``grid`` by ``grid``."""
    if size < grid or size % grid:
        raise ValueError(f"size = {size}: use a multiple of {grid}")
    return size // grid


def text_to_image(
    text: TextEncoder | Sequence[str],
    shape: tuple[int, int, int],
    patch: int,
    conditioning: Conditioning = "both",
    places: bool = False,
) -> Diffusion:
    """The model of all recipes: a U-Net that predicts x0, on the cosine schedule, and a text encoder.

    Args:
        text: the text encoder; or text that contains every word the model shall know, for an encoder
            that learns with the network.
        shape: (C, H, W) of the images.
        patch: side of the pixel squares the U-Net works on.
        conditioning: how the text enters, as :class:`~minidiff.denoiser.UNet` has it.
        places: whether the U-Net is told where in the picture it is.

    Raises:
        ValueError: the text holds no word, or ``conditioning`` is unknown.
    """
    text = text if isinstance(text, TextEncoder) else TextEncoder.from_captions(text)
    net = UNet(
        channels=shape[0],
        patch=patch,
        condition_dim=text.dim,
        conditioning=conditioning,
        places=places,
    )
    return Diffusion(net, Cosine(), target="x0", encoder=text, shape=shape)


def critters_recipe(
    images: int = 40_000,
    size: int = 64,
    text: TextEncoder | None = None,
    conditioning: Conditioning = "both",
) -> Recipe:
    """Animals in hats, drawn on the spot; see :mod:`minidiff.data.critters`.

    Args:
        images: number of drawings.
        size: height and width in pixels, a multiple of 16.
        text: what reads the captions; None for the text tower of the shipped ``critters-clip``, frozen.
        conditioning: how the text enters, as :class:`~minidiff.denoiser.UNet` has it.

    Raises:
        ValueError: ``size`` is not a multiple of 16, or ``conditioning`` is unknown.
    """
    patch, data = _patch(size), Critters(images, size)
    text = text or CLIP.from_pretrained("critters-clip").text_encoder()
    model = text_to_image(text, (3, size, size), patch, conditioning)
    prompts = [
        "a cat in a top hat",
        "an orange cat in a blue top hat on a green background",
        "a rabbit wearing a crown",
        "a black bear with a red cap",
        "a panda in a wizard hat on a pink background",
        "a frog in a beanie",
        "a gray dog in a party hat",
        "a hat",
    ]
    return Recipe(model, data.images(), data.caption, prompts, steps=1000)


def critters_duo_recipe(
    images: int = 40_000,
    size: int = 64,
    text: TextEncoder | None = None,
    conditioning: Conditioning = "both",
) -> Recipe:
    """Two animals in hats, side by side or one above the other; see :mod:`minidiff.data.duo`. The U-Net is
    told its places, or "left of" would mean little to it.

    Args:
        images: number of drawings.
        size: height and width in pixels, a multiple of 16.
        text: what reads the captions; None for the text tower of ``critters-duo-clip``, frozen.
        conditioning: how the text enters, as :class:`~minidiff.denoiser.UNet` has it.

    Raises:
        ValueError: ``size`` is not a multiple of 16, or ``conditioning`` is unknown.
    """
    patch, data = _patch(size), Duo(images, size)
    text = text or CLIP.from_pretrained("critters-duo-clip").text_encoder()
    model = text_to_image(text, (3, size, size), patch, conditioning, places=True)
    prompts = [
        "a black cat in a red top hat left of a white rabbit in a blue crown on a green background",
        "a white rabbit in a blue crown left of a black cat in a red top hat on a green background",
        "an orange fox in a green cap above a gray bear in a purple beanie on a yellow background",
        "a brown dog in a red cap below a pink pig in a blue beanie on a white background",
        "a panda in a yellow crown next to a frog in a purple wizard hat",
        "a cat in a beanie right of a dog in a party hat",
        "a rabbit and a bear",
        "two critters",
    ]
    return Recipe(model, data.images(), data.caption, prompts, steps=5000, batch_size=64)


def fashion_mnist_recipe(
    data_root: str | os.PathLike[str] | None = None,
    text: TextEncoder | None = None,
    conditioning: Conditioning = "both",
) -> Recipe:
    """60,000 real pictures of clothes, 32x32, gray; see :mod:`minidiff.data.fashion`.

    Args:
        data_root: where the data are, as :func:`minidiff.data.fashion_mnist` has it.
        text: what reads the captions; None for an encoder that learns with the network.
        conditioning: how the text enters, as :class:`~minidiff.denoiser.UNet` has it.

    Raises:
        ValueError: ``conditioning`` is unknown.
        FileNotFoundError: no data there, and none to be had.
    """
    images, captions = fashion_mnist(data_root)
    model = text_to_image(text or CAPTIONS, (1, 32, 32), 2, conditioning)
    return Recipe(model, images, captions, list(CAPTIONS), steps=1800)


def folder_recipe(
    folder: str | os.PathLike[str],
    size: int = 64,
    text: TextEncoder | None = None,
    conditioning: Conditioning = "both",
) -> Recipe:
    """Your own captioned images; see :mod:`minidiff.data.folder`.

    Args:
        folder: pictures and metadata.
        size: height and width in pixels, a multiple of 16.
        text: what reads the captions; None for an encoder that learns their words with the network.
        conditioning: how the text enters, as :class:`~minidiff.denoiser.UNet` has it.

    Raises:
        ValueError: ``size`` is not a multiple of 16, ``conditioning`` is unknown, or the folder has no
            usable picture.
        FileNotFoundError: no folder, or no metadata in it.
    """
    _patch(size)
    images, captions, skipped = captioned_folder(folder, size)
    patch = 4 if size % 64 == 0 else 2 if size % 32 == 0 else 1
    model = text_to_image(text or captions, (3, size, size), patch, conditioning)
    prompts = list(dict.fromkeys(captions))[:8]
    notes = [f"skipped {name}: {reason}" for name, reason in skipped]
    return Recipe(
        model, images, captions, prompts, steps=1800, batch_size=min(128, len(images)), notes=notes
    )


def critters_clip(images: int = 40_000, size: int = 64, seed: int = 0) -> tuple[CLIP, Batches]:
    """An untrained CLIP for critters, and the batches that :func:`minidiff.text.train_clip` takes.

    It sees what the denoiser of :func:`critters_recipe` sees, the training split, and no other pairs.

    Args:
        images: number of drawings.
        size: height and width in pixels, a multiple of 16.
        seed: of the order of the batches.

    Raises:
        ValueError: ``size`` is not a multiple of 16, or there are fewer than 128 images.
    """
    clip = CLIP.from_captions([*critters.vocabulary(), ","], size=size, patch=2 * _patch(size))
    data = Critters(images, size)
    return clip, Batches(data.images(), data.caption, 128, seed=seed)


def critters_duo_clip(images: int = 40_000, size: int = 64, seed: int = 0) -> tuple[CLIP, Batches]:
    """An untrained CLIP for two critters, and its batches.

    Every batch comes with wrong captions of its own pictures, in which the critters' places, hats or
    colours are exchanged: without them nothing asks a CLIP to tell whose is whose.

    Args:
        images: number of drawings.
        size: height and width in pixels, a multiple of 16.
        seed: of the order of the batches.

    Returns:
        The CLIP, and pairs of pictures (128, 3, size, size) with 128 right captions and some wrong ones.

    Raises:
        ValueError: ``size`` is not a multiple of 16, or there are fewer than 128 images.
    """
    clip = CLIP.from_captions(
        [*duo.vocabulary(), ","], size=size, patch=2 * _patch(size), text_layers=4, max_length=48
    )
    data = Duo(images, size)
    return clip, Batches(
        data.images(), data.caption, 128, seed=seed, wrong_caption=data.wrong_caption
    )


def fit(
    recipe: Recipe,
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    resume: bool = False,
    sample_every: int = 300,
    save_every: int = 300,
) -> Iterator[Step]:
    """Train a recipe, step by step, writing into ``output``:

    * ``config.json``, ``model.safetensors``, tokenizer files: the averaged model, for
      ``TextToImage.from_pretrained(output)``;
    * ``samples/step_000300.png`` and so on: one row per prompt of the recipe;
    * ``training.safetensors``: what ``resume=True`` goes on from;
    * ``loss.csv``: ``step,loss,lr,images_per_s`` of every tenth step, written as it goes.

    An interrupt (Ctrl-C) lets the step in progress end, writes everything, and is raised again after.

    Args:
        recipe: what to train.
        output: folder, made if missing.
        seed: of data order, times and noise; the model's first weights come with the recipe.
        resume: go on from ``training.safetensors`` in ``output``.
        sample_every: steps between sample grids.
        save_every: steps between saves.

    Yields:
        One :class:`~minidiff.training.Step` per optimizer step.

    Raises:
        FileNotFoundError: ``resume`` and there is nothing to resume.
        FileExistsError: not ``resume``, and ``output`` holds a run already.
        ValueError: ``resume``, and the run in ``output`` is of another network.
        KeyboardInterrupt: after the interrupted run has been saved.
    """
    output = Path(output)
    if not resume and (output / "training.safetensors").exists():
        raise FileExistsError(
            f"{output} holds a training run: add --resume, or choose another folder"
        )
    # Every process takes its share of the batches, so a step uses up one batch per process.
    start = saved_steps(output) * processes().num_processes if resume else 0
    if resume:
        _check_network(recipe.model, output)
    batches = Batches(recipe.images, recipe.caption, recipe.batch_size, seed=seed, start=start)
    steps = train(
        recipe.model, batches, recipe.steps,
        lr=recipe.lr, weighting="snr_plus_one", seed=seed, resume=output if resume else None,
    )  # fmt: skip

    def save(step: Step) -> None:
        step.save(output)
        if step.is_main_process:
            step.ema.save_pretrained(output, torch.float16)  # half the size, same pictures

    images = recipe.batch_size * processes().num_processes
    log = LossLog(output / "loss.csv", images, saved_steps(output) if resume else 0)
    with _interrupts_between_steps() as interrupted:
        for step in steps:
            count = step.index + 1
            if step.is_main_process and (count % LOG_EVERY == 0 or count == recipe.steps):
                log(step.index, step.loss, step.lr)
            if count % save_every == 0 or count == recipe.steps or interrupted():
                save(step)
            if interrupted():
                raise KeyboardInterrupt
            if step.is_main_process and (count % sample_every == 0 or count == recipe.steps):
                drawn = TextToImage(step.ema)(recipe.prompts, num_images=8)
                save_grid(drawn.tensors, output / "samples" / f"step_{count:06d}.png", ncols=8)
            yield step


def _check_network(model: Diffusion, folder: Path) -> None:
    """Raise ValueError unless the run in ``folder`` is of the same network."""
    saved = json.loads((folder / "config.json").read_text())["net"]
    net: Any = model.net
    name = type(net).__name__
    if saved.pop("name") != name:
        raise ValueError(f"{folder} holds a run of another kind of network, not of a {name}")
    then = type(net)(**saved).config  # what an older file does not say has its default
    for key, value in net.config.items():
        if then[key] != value:
            raise ValueError(
                f"{folder} holds a run with {key} = {then[key]!r}, not {value!r}: resume it with that"
            )


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a note to be read between steps; a second one acts at once.

    A step cut in half would leave weights and averages that belong to different steps.
    """
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set  # only the main thread is sent signals
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: types.FrameType | None) -> None:
        caught.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught.is_set
    finally:
        signal.signal(signal.SIGINT, before)
