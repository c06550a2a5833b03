"""How well does a critters model follow its prompts? Scored exactly, by the attribute reader."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from minidiff.data.critters import ATTRIBUTES, Critter, Critters, Split, prompt, sample, vocabulary
from minidiff.data.reader import AttributeReader
from minidiff.metrics import Interval, frechet_distance, kernel_distance, proportion
from minidiff.pipeline import TextToImage

EVERYTHING = tuple(ATTRIBUTES)


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
    known = pipe.model.text.tokenizer.get_vocab()  # type: ignore[union-attr, operator]
    missing = [word for word in vocabulary() if word not in known]
    if missing:
        raise ValueError(f"not a critters model: it does not know the word {missing[0]!r}")
    reader = AttributeReader.from_pretrained() if reader is None else reader
    scores: dict[str, Interval] = {}
    drawn: dict[str, Tensor] = {}
    splits: tuple[tuple[str, Split], ...] = (("seen", "train"), ("held-out", "held_out"))
    for name, split in splits:
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
    scores["reader on renders: animal and hat"] = reader_accuracy(reader)["animal and hat"]
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
    right = 0
    with torch.no_grad():
        for start in range(0, len(x), 256):
            right += sum(
                reader.correct(x[start : start + 256], wanted[start : start + 256], attributes)
            )
    return proportion(right, len(x))


def reader_accuracy(
    reader: AttributeReader, n: int = 4096, seed: int = 2**31 - 1
) -> dict[str, Interval]:
    """The reader's own accuracy on ``n`` fresh renders of all pairs, by attribute and together."""
    rendering = Critters(n, split="all", seed=seed).render()
    x = rendering.images.float() / 127.5 - 1
    together = {"animal and hat": ("animal", "hat"), "all attributes": EVERYTHING}
    parts = {name: (name,) for name in EVERYTHING}
    return {
        k: accuracy(reader, x, rendering.critters, names) for k, names in (parts | together).items()
    }
