"""How well a model plays what it is asked for."""

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.metrics import FEWEST, Interval, frechet_distance, proportion
from minidiff.sounds import from_int16
from minidiff.tones.captions import prompt
from minidiff.tones.data import Tones
from minidiff.tones.hearing import Heard, cents, hear, log_spectrum, notes
from minidiff.tones.sound import Sound, Split, sample_sound

if TYPE_CHECKING:
    from minidiff.pipeline import TextToSound

SPLITS: tuple[tuple[str, Split], ...] = (("seen", "train"), ("held-out", "held_out"))
FRESH = 2**29
"""Seed of renders that neither models nor ears have seen."""


def evaluate(
    pipe: "TextToSound",
    *,
    prompts: int = 512,
    steps: int = 20,
    guidance: float = 2.0,
    sampler: str = "dpmpp_2m",
    seed: int = 0,
) -> dict[str, Interval]:
    """Prompt accuracy on seen successions of timbres and on held-out ones, and distances to real renders.

    Every prompt states all there is: "a short loud low bell, then a long soft high flute".

    Args:
        pipe: the model.
        prompts: prompts per split, one sound each; they are made, read and played in parts, of which only
            what is heard is kept.
        steps: sampling steps.
        guidance: guidance scale.
        sampler: name of the sampler.
        seed: of prompts and noise.

    Returns:
        Scores by name: those of :func:`shares` for each split; the same for fresh renders, the ceiling of the
        others; and the Fréchet distance of the :func:`~minidiff.tones.hearing.log_spectrum` of seen samples
        to that of as many renders, beside the distance of renders to other renders.
    """
    from minidiff.pipeline import PART, draw_each  # whoever plays or trains needs none of what it brings

    scores: dict[str, Interval] = {}
    spectra: list[Tensor] = []  # of the samples of seen successions
    for name, split in SPLITS:
        texts = (prompt(sound) for sound in _asked(split, seed))
        heard: list[Sequence[Heard]] = []
        # Of a part of the samples only what is heard in them is kept.
        for part in draw_each(
            pipe, texts, prompts, steps=steps, guidance=guidance, sampler=sampler, seed=seed
        ):
            heard += hear(part)
            if split == "train":
                spectra.append(log_spectrum(part))
        expected = list(itertools.islice(_asked(split, seed), prompts))
        scores |= {f"{name}: {what}": score for what, score in shares(heard, expected).items()}
    scores |= {f"renders: {what}": score for what, score in hearing_accuracy().items()}
    if prompts >= FEWEST:
        rows = [range(start, min(start + PART, prompts)) for start in range(0, prompts, PART)]
        real, other = (
            torch.cat([log_spectrum(from_int16(data.waves(some))) for some in rows])
            for data in (Tones(prompts, seed=FRESH + i) for i in (1, 2))
        )
        scores["spectral distance, samples to renders"] = frechet_distance(torch.cat(spectra), real)
        scores["spectral distance, renders to renders"] = frechet_distance(other, real)
    return scores


def _asked(split: Split, seed: int) -> Iterator[Sound]:
    """What :func:`evaluate` asks for, without end."""
    rng = random.Random(f"evaluate tones {seed} {split}")
    while True:
        yield sample_sound(rng, split)


def shares(heard: Sequence[Sequence[Heard]], expected: Sequence[Sound]) -> dict[str, Interval]:
    """Shares of sounds in which this or that is right, of every tone in them.

    * count: as many tones as asked for; without that nothing else is right;
    * pitch: within 50 cents of the note;
    * timbre, loudness, length: as heard by the ears;
    * everything: all of these.

    Args:
        heard: what was heard, from :func:`~minidiff.tones.hearing.hear`.
        expected: what was asked for, as many.

    Raises:
        ValueError: not as many sounds as were asked for.
    """
    names = ("count", "pitch", "timbre", "loudness", "length", "everything")
    right = dict.fromkeys(names, 0)
    for tones, wanted in zip(heard, expected, strict=True):
        if len(tones) != len(wanted):
            continue
        off = cents(torch.tensor([tone.hertz for tone in tones]), notes([tone.pitch for tone in wanted]))
        found = {"count": True, "pitch": bool((off.abs() <= 50).all())}
        for name in ("timbre", "loudness", "length"):
            found[name] = all(
                getattr(t, name) == getattr(w, name) for t, w in zip(tones, wanted, strict=True)
            )
        found["everything"] = all(found.values())
        for name, ok in found.items():
            right[name] += ok
    return {name: proportion(number, len(expected)) for name, number in right.items()}


def hearing_accuracy(n: int = 1024, seed: int = FRESH) -> dict[str, Interval]:
    """The ears' own accuracy: :func:`shares` of ``n`` fresh renders of both splits."""
    data = Tones(n, "all", seed)
    return shares(hear(from_int16(data.waves())), [data.sound(i) for i in range(n)])
