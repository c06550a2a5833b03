"""How well does a model of critters follow its prompts? Scored exactly, by the attribute reader."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.critters import scene
from minidiff.critters.captions import prompt, vocabulary
from minidiff.critters.data import Critters
from minidiff.critters.reader import READERS, AttributeReader
from minidiff.critters.scene import Shown, Split
from minidiff.metrics import FEWEST, Interval, features_of, frechet_distance, kernel_distance, proportion
from minidiff.pixels import from_bytes

if TYPE_CHECKING:
    from minidiff.denoiser import Diffusion
    from minidiff.pipeline import TextToImage
    from minidiff.text import CLIP

SPLITS: tuple[tuple[str, Split], ...] = (("seen", "train"), ("held-out", "held_out"))
FRESH = 2**31 - 1
"""A seed that no training run uses by default."""


def evaluate(
    pipe: "TextToImage",
    count: int = 1,
    *,
    prompts: int = 512,
    steps: int = 20,
    guidance: float = 3.0,
    sampler: str = "dpmpp_2m",
    seed: int = 0,
    reader: AttributeReader | None = None,
) -> dict[str, Interval]:
    """Prompt accuracy on seen and on held-out animal-hat pairs, and distances to real renders.

    For each split, ``prompts`` random critters or scenes are asked for. Of single critters the even prompts
    state animal and hat alone ("a cat in a top hat"), the odd ones everything; scenes of two are asked for
    in full. In a held-out scene at least one critter wears a hat that it never wore in training. The reader
    says what each sample shows, :func:`shares_of_one` and :func:`shares_of_two` how much of it is right.

    Args:
        pipe: the model.
        count: critters in a picture, 1 or 2.
        prompts: prompts per split, one image each. They are made, read and drawn in parts, and of a part only
            what the reader sees in it is kept: the first step is made at once, however many there are.
        steps: sampling steps.
        guidance: guidance scale.
        sampler: name of the sampler.
        seed: of prompts and noise.
        reader: who looks; None for the one that is shipped.

    Returns:
        Scores by name, such as "held-out: binding". "reader on renders" is the reader's own accuracy on
        fresh renders, the ceiling of the others. Fréchet and kernel distance compare the samples of seen
        pairs with as many renders, in the reader's features: they say nothing about FID in Inception's.

    Raises:
        ValueError: the model does not know the words of the captions.
    """
    if missing := unknown_words(pipe.model, vocabulary(count)):
        name = "critters" if count == 1 else "critters-duo"
        raise ValueError(f"not a {name} model: it does not know the word {missing[0]!r}")
    from minidiff.pipeline import PART, draw_each  # whoever draws or trains needs none of what it brings

    reader = AttributeReader.from_pretrained(READERS[count]) if reader is None else reader
    scores: dict[str, Interval] = {}
    found: list[Tensor] = []  # features of the samples of seen pairs
    size = 0
    for name, split in SPLITS:
        texts = (text for _, text in _asked(count, split, seed))
        read: list[dict[str, str]] = []
        # Of a part of the samples only what the reader says of them is kept.
        for part in draw_each(
            pipe, texts, prompts, steps=steps, guidance=guidance, sampler=sampler, seed=seed
        ):
            read += reader.read(part)
            size = part.shape[-1]
            if split == "train" and prompts >= FEWEST:
                found.append(features_of(part, reader))
        expected = [scene.words(shown) for shown, _ in itertools.islice(_asked(count, split, seed), prompts)]
        shares = shares_of_one if count == 1 else shares_of_two
        scores |= {f"{name}: {what}": score for what, score in shares(read, expected).items()}
    whole = "animal and hat" if count == 1 else "full scene"
    scores[f"reader on renders: {whole}"] = reader_accuracy(reader, size=size)[whole]
    if prompts >= FEWEST:
        data = Critters(prompts, size, "train", seed=2**31 + seed, count=count)
        rows = (range(start, min(start + PART, prompts)) for start in range(0, prompts, PART))
        real = torch.cat([features_of(from_bytes(data.images(rows=some)), reader) for some in rows])
        for what, distance in (("Fréchet", frechet_distance), ("kernel", kernel_distance)):
            scores[f"{what} distance, reader features"] = distance(torch.cat(found), real)
    return scores


def _asked(count: int, split: Split, seed: int) -> Iterator[tuple[Shown, str]]:
    """What :func:`evaluate` asks for, without end: what is to be shown, and the prompt that says so."""
    random_one: Callable[[random.Random, Split], Shown] = (
        scene.sample_critter if count == 1 else scene.sample_scene
    )
    rng = random.Random(f"evaluate {'' if count == 1 else 'duo '}{seed} {split}")
    for i in itertools.count():
        shown = random_one(rng, split)
        yield shown, prompt(shown, tuple(scene.ATTRIBUTES) if count == 1 and i % 2 else None)


def accuracy(
    reader: AttributeReader, x: Tensor, scenes: Sequence[Shown], attributes: Sequence[str] = ("animal", "hat")
) -> Interval:
    """Share of images (B, 3, H, W) in [-1, 1] in which all the named attributes are as asked for.

    Raises:
        ValueError: not as many scenes as images.
    """
    return _share(reader.read(x), [scene.words(shown) for shown in scenes], attributes)


Words = Mapping[str, str]


def _share(read: Sequence[Words], expected: Sequence[Words], names: Sequence[str]) -> Interval:
    """Share of images in which all the named attributes read as they should."""
    right = [all(r[name] == e[name] for name in names) for r, e in zip(read, expected, strict=True)]
    return proportion(sum(right), len(right))


def shares_of_one(read: Sequence[Words], expected: Sequence[Words]) -> dict[str, Interval]:
    """Shares of images of one critter in which animal and hat are right; and of the odd ones, whose
    prompts state everything, those in which all five attributes are.

    Args:
        read: what the reader saw, by attribute.
        expected: what was asked for, as many.

    Raises:
        ValueError: not as many scenes as images.
    """
    return {
        "animal and hat": _share(read, expected, ("animal", "hat")),
        "all attributes": _share(read[1::2], expected[1::2], tuple(scene.ATTRIBUTES)),
    }


def shares_of_two(read: Sequence[Words], expected: Sequence[Words]) -> dict[str, Interval]:
    """Shares of images of two critters in which this or that is right, in the manner of GenEval (Ghosh
    et al.
    2023).

    * objects: both animals and both hats are somewhere;
    * count: no critter is missing. A reader of two positions cannot see a third;
    * colours: both furs and both hat colours are somewhere;
    * position: the right animals stand in the right positions, side by side or one above the other;
    * binding: each animal has its own fur, hat and hat colour, wherever it stands;
    * full scene: everything is right, the background too.

    Args:
        read: what the reader saw: :data:`~minidiff.critters.scene.PAIR_ATTRIBUTES` by name.
        expected: what was asked for, as many.

    Raises:
        ValueError: not as many scenes as images.
    """
    right: Counter[str] = Counter()
    for r, e in zip(read, expected, strict=True):
        same = {name: _both(r, [name]) == _both(e, [name]) for name in scene.OWN}
        right["objects"] += same["animal"] and same["hat"]
        right["count"] += scene.NOBODY not in (r["first_animal"], r["second_animal"])
        right["colours"] += same["fur"] and same["hat_color"]
        right["position"] += all(r[n] == e[n] for n in ("relation", "first_animal", "second_animal"))
        right["binding"] += _both(r, scene.OWN) == _both(e, scene.OWN)
        right["full scene"] += dict(r) == dict(e)
    return {name: proportion(number, len(expected)) for name, number in right.items()}


def _both(words: Words, names: Iterable[str]) -> list[tuple[str, ...]]:
    """What the two critters are, in an order that does not depend on their positions."""
    return sorted(tuple(words[f"{position}_{name}"] for name in names) for position in scene.POSITIONS)


def reader_accuracy(
    reader: AttributeReader, n: int = 4096, seed: int = FRESH, size: int = 64
) -> dict[str, Interval]:
    """The reader's own accuracy on ``n`` fresh renders of all pairs, by attribute and together."""
    rendering = Critters(n, size, "all", seed, count=reader.count).render()
    read = reader.read(from_bytes(rendering.images))
    expected = [scene.words(shown) for shown in rendering.scenes]
    scores = {name: _share(read, expected, [name]) for name in reader.attributes}
    if reader.count == 2:
        return scores | shares_of_two(read, expected)
    together = {"animal and hat": ("animal", "hat"), "all attributes": tuple(scene.ATTRIBUTES)}
    return scores | {what: _share(read, expected, names) for what, names in together.items()}


@torch.no_grad()
def clip_accuracy(clip: "CLIP", n: int = 2048, seed: int = FRESH) -> dict[str, Interval]:
    """How often a CLIP tells what a fresh render shows, by choosing the nearest of some captions.

    For each attribute the captions state its values and nothing else ("a black critter"); for "animal
    and hat" there are all 48 pairs ("a cat in a top hat"), and the renders with a pair of ``HELD_OUT``
    are counted once more by themselves.
    """
    rendering = Critters(n, split="all", seed=seed).render()
    x = from_bytes(rendering.images)
    found = torch.cat([clip.embed_images(part) for part in x.split(256)])  # (n, D)
    expected = [scene.words(critter) for critter in rendering.scenes]

    def right(captions: Mapping[Any, str], names: Sequence[str]) -> list[bool]:
        nearest = (found @ clip.embed_captions(list(captions.values())).T).argmax(1).tolist()
        values = list(captions)
        return [values[i] == tuple(e[name] for name in names) for i, e in zip(nearest, expected, strict=True)]

    scores = {}
    for name, values in scene.ATTRIBUTES.items():
        captions = {(value,): _ALONE[name].format(value) for value in values}
        scores[name] = proportion(sum(right(captions, [name])), n)
    pairs = {(a, h): f"a {a} in a {h}" for a in scene.ATTRIBUTES["animal"] for h in scene.ATTRIBUTES["hat"]}
    both = right(pairs, ("animal", "hat"))
    held_out = [ok for ok, e in zip(both, expected, strict=True) if (e["animal"], e["hat"]) in scene.HELD_OUT]
    scores["animal and hat"] = proportion(sum(both), n)
    scores["held-out pairs"] = proportion(sum(held_out), len(held_out))
    return scores


_ALONE = {
    "animal": "a {}",
    "fur": "a {} critter",
    "hat": "a critter in a {}",
    "hat_color": "a critter in a {} hat",
    "background": "a critter on a {} background",
}


@torch.no_grad()
def binding_accuracy(clip: "CLIP", n: int = 2048, seed: int = FRESH) -> dict[str, Interval]:
    """How often a CLIP of two critters finds the true one of two captions that state everything.

    The other differs by one exchange between the critters: of places, furs, hats or hat colours
    (:func:`~minidiff.critters.scene.exchange`). Both hold the same words, so a bag of words cannot tell
    them apart (Yuksekgonul et al. 2023); a tie counts as wrong, a coin scores a half.

    Args:
        clip: one that knows the words of two critters.
        n: renders, at least 32, or there may be none whose furs can be exchanged.
        seed: of the renders.

    Returns:
        The share of renders whose true caption is nearer, by what is exchanged; "full scene" asks that
        it is nearer than all exchanges that can be made.

    Raises:
        ValueError: ``n`` is below 32.
    """
    if n < 32:
        raise ValueError(f"n = {n}: use at least 32 renders")
    rendering = Critters(n, split="all", seed=seed, count=2).render()
    x = from_bytes(rendering.images)
    kinds: dict[str, list[bool]] = {"full scene": []}
    for start in range(0, n, 256):
        scenes = [s for s in rendering.scenes[start : start + 256] if isinstance(s, scene.Scene)]
        found = clip.embed_images(x[start : start + 256])

        def cosine(captions: list[str], found: Tensor = found) -> Tensor:
            return (found * clip.embed_captions(captions)).sum(1).cpu()

        right = cosine([prompt(pair) for pair in scenes])
        whole = torch.ones(len(scenes), dtype=torch.bool)
        for kind in scene.EXCHANGES:
            mixed = [scene.exchange(pair, kind) for pair in scenes]
            nearer = right > cosine([prompt(m or s) for m, s in zip(mixed, scenes, strict=True)])
            possible = torch.tensor([m is not None for m in mixed])
            kinds.setdefault(kind, []).extend(nearer[possible].tolist())
            whole &= nearer | ~possible
        kinds["full scene"].extend(whole.tolist())
    return {name: proportion(sum(nearer), len(nearer)) for name, nearer in kinds.items()}


def count_of(model: "Diffusion") -> int | None:
    """How many critters a model draws, told from the words it knows one by one; None if that does not
    tell. An encoder that takes words apart reads all of them, whatever the model draws."""
    tokenizer: Any = getattr(model.encoder, "tokenizer", None)
    known = tokenizer.get_vocab() if tokenizer else ()
    # Whoever knows the words of two critters knows those of one too.
    return next((n for n in (2, 1) if all(word in known for word in vocabulary(n))), None)


def unknown_words(model: "Diffusion", words: Iterable[str]) -> list[str]:
    """Those of the words that the model's text encoder cannot read; all of them if it has none."""
    words = list(words)
    tokenizer: Any = getattr(model.encoder, "tokenizer", None)
    if tokenizer is None:
        return words
    tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [word for word, ids in zip(words, tokens, strict=True) if not ids or tokenizer.unk_token_id in ids]
