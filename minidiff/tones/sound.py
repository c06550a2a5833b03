"""What a sound of the data set is, in words: one tone, or one and then another.

A :class:`Tone` is four words: what sounds, how high, how loud, how long. Some successions
(:data:`HELD_OUT`, a flute after a bell first of all) never occur in the training split. A model that plays
one has put together two things it only ever heard apart.
"""

import random
from dataclasses import dataclass, fields
from typing import Literal, get_args

__all__ = [
    "ATTRIBUTES", "HELD_OUT", "LENGTHS", "LOUDNESS", "PITCHES", "SAMPLES", "TIMBRES", "Sound", "Tone",
    "sample_sound",
]  # fmt: skip

Split = Literal["train", "held_out", "all"]

SAMPLES = 8192
"""Samples of a sound, at :data:`minidiff.sounds.RATE` a second."""
TIMBRES = ("bell", "string", "flute", "drum")
PITCHES = {"low": 220.0, "middle": 329.63, "high": 493.88}
"""Hertz of the lowest partial, which is the strongest: the notes A3, E4 and B4."""
LOUDNESS = {"soft": 0.25, "loud": 0.75}
"""Greatest height of the wave, of 1."""
LENGTHS = {"short": 0.4, "long": 0.9}
"""Share of the tone's time after which it is damped. That time is the whole sound, or half if there are
two."""
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "timbre": TIMBRES,
    "pitch": tuple(PITCHES),
    "loudness": tuple(LOUDNESS),
    "length": tuple(LENGTHS),
}
HELD_OUT = (("bell", "flute"), ("flute", "drum"), ("drum", "string"), ("string", "bell"))
"""First and second timbre of sounds that the training split never plays."""


@dataclass(frozen=True)
class Tone:
    """The four words that say what a tone is.

    Raises:
        ValueError: a word is not one of :data:`ATTRIBUTES`.
    """

    timbre: str
    pitch: str
    loudness: str
    length: str

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) not in ATTRIBUTES[field.name]:
                raise ValueError(
                    f"{field.name} {value!r} is unknown: choose from {', '.join(ATTRIBUTES[field.name])}"
                )


Sound = tuple[Tone, ...]
"""One tone or two, in the order in which they are heard."""


def sample_sound(rng: random.Random, split: Split = "train") -> Sound:
    """A random sound: of :data:`HELD_OUT` two tones, in the training split one in a third of the cases.

    Args:
        rng: source of chance.
        split: "train", "held_out" or "all" (what the other two have, without a distinction).

    Raises:
        ValueError: the split is unknown.
    """
    check_split(split)
    while True:
        count = 2 if split == "held_out" else rng.choice((1, 2, 2))
        sound = tuple(Tone(*(rng.choice(words) for words in ATTRIBUTES.values())) for _ in range(count))
        held_out = tuple(tone.timbre for tone in sound) in HELD_OUT
        if split == "all" or held_out == (split == "held_out"):
            return sound


def check_split(split: str) -> None:
    """Raise ValueError unless there is such a split."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(get_args(Split))}")
