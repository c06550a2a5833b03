"""How well does a model of critters follow its prompts? Scored exactly, by the attribute reader."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.data import duo
from minidiff.data.critters import (
    ATTRIBUTES,
    HELD_OUT,
    Critter,
    Critters,
    prompt,
    sample,
    vocabulary,
)
from minidiff.data.drawn import Split
from minidiff.data.reader import SHIPPED_DUO_READER, AttributeReader
from minidiff.denoiser import Diffusion
from minidiff.metrics import Interval, frechet_distance, kernel_distance, proportion
from minidiff.pipeline import TextToImage
from minidiff.text import CLIP

EVERYTHING = tuple(ATTRIBUTES)
SPLITS: tuple[tuple[str, Split], ...] = (("seen", "train"), ("held-out", "held_out"))


def evaluate_critters(
    pipe: TextToImage,
    *,
    prompts: int = 512,
    steps: int = 20,
    guidance: float = 3.0,
    sampler: str = "dpmpp_2m",
    seed: int = 0,
    reader: AttributeReader | None = None,
) -> dict[str, Interval]:
    """Prompt accuracy on seen and on held-out animal-hat pairs, and distances to real renders.

    For each split, ``prompts`` random critters are asked for: the even ones by animal and hat alone
    ("a cat in a top hat"), the odd ones by everything ("an orange cat in a blue top hat on a green
    background"). The reader says what each sample shows.

    Args:
        pipe: the model.
        prompts: prompts per split, one image each.
        steps: sampling steps.
        guidance: guidance scale.
        sampler: name of the sampler.
        seed: of prompts and noise.
        reader: who looks; None for the one that is shipped.

    Returns:
        Scores by name. "animal and hat" counts images in which both are right, "all attributes" those
        of the odd prompts in which all five are; "reader on renders" is the reader's own accuracy on
        fresh renders, the ceiling of the others. Fréchet and kernel distance compare the samples of
        seen pairs with as many renders, in the reader's features: they say nothing about FID in
        Inception's.

    Raises:
        ValueError: the model does not know the words of the critters' captions.
    """
    if missing := unknown_words(pipe.model, vocabulary()):
        raise ValueError(f"not a critters model: it does not know the word {missing[0]!r}")
    reader = AttributeReader.from_pretrained() if reader is None else reader
    scores: dict[str, Interval] = {}
    drawn: dict[str, Tensor] = {}
    for name, split in SPLITS:
        rng = random.Random(f"evaluate {seed} {split}")
        wanted = [sample(rng, split) for _ in range(prompts)]
        texts = [
            prompt(c, EVERYTHING if i % 2 else ("animal", "hat")) for i, c in enumerate(wanted)
        ]
        drawn[name] = pipe(
            texts, steps=steps, guidance=guidance, sampler=sampler, seed=seed
        ).tensors
        scores[f"{name}: animal and hat"] = accuracy(reader, drawn[name], wanted)
        scores[f"{name}: all attributes"] = accuracy(
            reader, drawn[name][1::2], wanted[1::2], EVERYTHING
        )
    # Renders of a seed that no training run uses by default.
    size = drawn["seen"].shape[-1]
    rendering = Critters(prompts, size, "train", seed=2**31 + seed).render()
    real = rendering.images.float() / 127.5 - 1
    scores["reader on renders: animal and hat"] = reader_accuracy(reader, size=size)[
        "animal and hat"
    ]
    if prompts >= 40:  # 20 groups of 2: below that the distances have no error bars
        scores["Fréchet distance, reader features"] = frechet_distance(drawn["seen"], real, reader)
        scores["kernel distance, reader features"] = kernel_distance(drawn["seen"], real, reader)
    return scores


def accuracy(
    reader: AttributeReader,
    x: Tensor,
    wanted: Sequence[Critter],
    attributes: Sequence[str] = ("animal", "hat"),
) -> Interval:
    """Share of images (B, 3, H, W) in [-1, 1] in which all the named attributes are as wanted."""
    return proportion(sum(reader.correct(x, wanted, attributes)), len(x))


def reader_accuracy(
    reader: AttributeReader, n: int = 4096, seed: int = 2**31 - 1, size: int = 64
) -> dict[str, Interval]:
    """The reader's own accuracy on ``n`` fresh renders of all pairs, by attribute and together."""
    rendering = Critters(n, size, "all", seed).render()
    x = rendering.images.float() / 127.5 - 1
    together = {"animal and hat": ("animal", "hat"), "all attributes": EVERYTHING}
    parts = {name: (name,) for name in EVERYTHING}
    return {
        k: accuracy(reader, x, rendering.critters, names) for k, names in (parts | together).items()
    }


def evaluate_duo(
    pipe: TextToImage,
    *,
    prompts: int = 512,
    steps: int = 20,
    guidance: float = 3.0,
    sampler: str = "dpmpp_2m",
    seed: int = 0,
    reader: AttributeReader | None = None,
) -> dict[str, Interval]:
    """Does a model keep two critters apart? In the manner of GenEval (Ghosh et al. 2023).

    For each split, ``prompts`` random scenes are asked for in full ("a black cat in a red top hat left
    of a white rabbit in a blue crown on a green background"). In a held-out scene at least one critter
    wears a hat that it never wore in training. :func:`judge` says what is scored.

    Args:
        pipe: the model.
        prompts: prompts per split, one image each.
        steps: sampling steps.
        guidance: guidance scale.
        sampler: name of the sampler.
        seed: of prompts and noise.
        reader: who looks; None for the one that is shipped.

    Returns:
        Scores by name, such as "held-out: binding"; "reader on renders: full scene" is the reader's own
        accuracy on fresh renders, the ceiling of the others.

    Raises:
        ValueError: the model does not know the words of the scenes' captions.
    """
    if missing := unknown_words(pipe.model, duo.vocabulary()):
        raise ValueError(f"not a critters-duo model: it does not know the word {missing[0]!r}")
    reader = AttributeReader.from_pretrained(SHIPPED_DUO_READER) if reader is None else reader
    scores: dict[str, Interval] = {}
    for name, split in SPLITS:
        rng = random.Random(f"evaluate duo {seed} {split}")
        wanted = [duo.sample(rng, split) for _ in range(prompts)]
        drawn = pipe(
            [duo.prompt(scene) for scene in wanted],
            steps=steps, guidance=guidance, sampler=sampler, seed=seed,
        ).tensors  # fmt: skip
        for what, score in judge(reader.read(drawn), wanted).items():
            scores[f"{name}: {what}"] = score
    own = duo_reader_accuracy(reader, size=drawn.shape[-1])
    scores["reader on renders: full scene"] = own["full scene"]
    return scores


def judge(seen: Sequence[Mapping[str, str]], wanted: Sequence[duo.Scene]) -> dict[str, Interval]:
    """Shares of images of two critters in which this or that is right.

    * objects: both animals and both hats are somewhere;
    * count: no critter is missing. A reader of two places cannot see a third;
    * colours: both furs and both hat colours are somewhere;
    * position: the right animals stand in the right places, side by side or one above the other;
    * binding: each animal has its own fur, hat and hat colour, wherever it stands;
    * full scene: everything is right, the background too.

    Args:
        seen: what the reader saw: :data:`duo.ATTRIBUTES <minidiff.data.duo.ATTRIBUTES>` by name.
        wanted: what was asked for, as many.

    Raises:
        ValueError: not as many scenes as images.
    """
    right: Counter[str] = Counter()
    for found, scene in zip(seen, wanted, strict=True):
        asked = duo.words(scene)
        everywhere = {name: (_both(found, [name]), _both(asked, [name])) for name in duo.OWN}
        same = {name: a == b for name, (a, b) in everywhere.items()}
        places = ("relation", "first_animal", "second_animal")
        right["objects"] += same["animal"] and same["hat"]
        right["count"] += duo.NOBODY not in (found["first_animal"], found["second_animal"])
        right["colours"] += same["fur"] and same["hat_color"]
        right["position"] += all(found[name] == asked[name] for name in places)
        right["binding"] += _both(found, duo.OWN) == _both(asked, duo.OWN)
        right["full scene"] += dict(found) == asked
    return {name: proportion(count, len(wanted)) for name, count in right.items()}


def _both(words: Mapping[str, str], names: Iterable[str]) -> list[tuple[str, ...]]:
    """What the two critters are, in an order that does not depend on their places."""
    return sorted(tuple(words[f"{place}_{name}"] for name in names) for place in duo.PLACES)


def duo_reader_accuracy(
    reader: AttributeReader, n: int = 4096, seed: int = 2**31 - 1, size: int = 64
) -> dict[str, Interval]:
    """The reader's own accuracy on ``n`` fresh renders of two critters, by attribute and together."""
    rendering = duo.Duo(n, size, "all", seed).render()
    seen = reader.read(rendering.images.float() / 127.5 - 1)
    asked = [duo.words(scene) for scene in rendering.scenes]
    return {
        name: proportion(sum(a[name] == b[name] for a, b in zip(seen, asked, strict=True)), n)
        for name in duo.ATTRIBUTES
    } | judge(seen, rendering.scenes)


@torch.no_grad()
def clip_accuracy(clip: CLIP, n: int = 2048, seed: int = 2**31 - 1) -> dict[str, Interval]:
    """How often a CLIP tells what a fresh render shows, by choosing the nearest of some captions.

    For each attribute the captions state its values and nothing else ("a black critter"); for "animal
    and hat" there are all 48 pairs ("a cat in a top hat"), and the renders with a pair of ``HELD_OUT``
    are counted once more by themselves.
    """
    rendering = Critters(n, split="all", seed=seed).render()
    x = rendering.images.float() / 127.5 - 1
    found = torch.cat([clip.embed_images(part) for part in x.split(256)])  # (n, D)

    def right(captions: Mapping[Any, str], names: Sequence[str]) -> list[bool]:
        nearest = (found @ clip.embed_captions(list(captions.values())).T).argmax(1).tolist()
        values = list(captions)
        return [
            values[i] == tuple(getattr(critter, name) for name in names)
            for i, critter in zip(nearest, rendering.critters, strict=True)
        ]

    scores = {}
    for name, values in ATTRIBUTES.items():
        asked = {(value,): _ALONE[name].format(value) for value in values}
        scores[name] = proportion(sum(right(asked, [name])), n)
    pairs = {(a, h): f"a {a} in a {h}" for a in ATTRIBUTES["animal"] for h in ATTRIBUTES["hat"]}
    both = right(pairs, ("animal", "hat"))
    held_out = [
        ok
        for ok, critter in zip(both, rendering.critters, strict=True)
        if (critter.animal, critter.hat) in HELD_OUT
    ]
    scores["animal and hat"] = proportion(sum(both), n)
    scores["held-out pairs"] = proportion(sum(held_out), len(held_out))
    return scores


@torch.no_grad()
def duo_clip_accuracy(clip: CLIP, n: int = 2048, seed: int = 2**31 - 1) -> dict[str, Interval]:
    """How often a CLIP of two critters finds the true one of two captions that state everything.

    The other differs by one exchange between the critters: of places, furs, hats or hat colours
    (:func:`duo.exchange <minidiff.data.duo.exchange>`). Both hold the same words, so a bag of words
    cannot tell them apart (Yuksekgonul et al. 2023); a tie counts as wrong, a coin scores a half.

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
    rendering = duo.Duo(n, split="all", seed=seed).render()
    x = rendering.images.float() / 127.5 - 1
    kinds: dict[str, list[bool]] = {"full scene": []}
    for start in range(0, n, 256):
        scenes = rendering.scenes[start : start + 256]
        found = clip.embed_images(x[start : start + 256])

        def cosine(captions: list[str], found: Tensor = found) -> Tensor:
            return (found * clip.embed_captions(captions)).sum(1).cpu()

        right = cosine([duo.prompt(scene) for scene in scenes])
        whole = torch.ones(len(scenes), dtype=torch.bool)
        for kind in duo.EXCHANGES:
            mixed = [duo.exchange(scene, kind) for scene in scenes]
            told = right > cosine([duo.prompt(m or s) for m, s in zip(mixed, scenes, strict=True)])
            possible = torch.tensor([m is not None for m in mixed])
            kinds.setdefault(kind, []).extend(told[possible].tolist())
            whole &= told | ~possible
        kinds["full scene"].extend(whole.tolist())
    return {name: proportion(sum(told), len(told)) for name, told in kinds.items()}


_ALONE = {
    "animal": "a {}",
    "fur": "a {} critter",
    "hat": "a critter in a {}",
    "hat_color": "a critter in a {} hat",
    "background": "a critter on a {} background",
}


def data_of(model: Diffusion) -> str | None:
    """What a model draws, "critters" or "critters-duo", told from the words it knows one by one; None if
    that does not tell. An encoder that takes words apart reads all of them, whatever the model draws."""
    if model.encoder is None:
        return None
    known: Any = model.encoder.tokenizer.get_vocab()  # type: ignore[union-attr, operator]
    # Whoever knows the words of two critters knows those of one too.
    for name, words in (("critters-duo", duo.vocabulary()), ("critters", vocabulary())):
        if all(word in known for word in words):
            return name
    return None


def unknown_words(model: Diffusion, words: Iterable[str]) -> list[str]:
    """Those of the words that the model's text encoder cannot read; all of them if it has none."""
    words = list(words)
    if model.encoder is None:
        return words
    tokenizer: Any = model.encoder.tokenizer
    tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
    return [
        word
        for word, ids in zip(words, tokens, strict=True)
        if not ids or tokenizer.unk_token_id in ids
    ]
