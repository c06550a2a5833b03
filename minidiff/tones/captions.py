"""Captions of tones: sentences that are exactly true, from a small grammar."""

import random
from collections.abc import Sequence

from minidiff.tones.sound import ATTRIBUTES, Sound, Tone

OPENINGS = ("", "", "", "the sound of ")
JOINTS = (", then ", " then ", " followed by ", ", and then ")
SAID = {"timbre": 0.75, "pitch": 0.75, "loudness": 0.5, "length": 0.5}
"""How often a caption states an attribute; what it leaves out is free. A caption that leaves out what one of
two tones is teaches what the other's word does alone, whatever stands beside it."""


def prompt(sound: Sound, attributes: Sequence[str] = tuple(ATTRIBUTES)) -> str:
    """The plain sentence that states the given attributes and no others, such as "a low bell, then a high
    flute" for pitch and timbre.

    Raises:
        ValueError: an attribute's name is unknown.
    """
    for name in attributes:
        if name not in ATTRIBUTES:
            raise ValueError(f"attribute {name!r} is unknown: choose from {', '.join(ATTRIBUTES)}")
    return ", then ".join(_tone(tone, attributes) for tone in sound)


def caption(sound: Sound, rng: random.Random) -> str:
    """A random true description: lower-case words, spaces and commas."""
    tones = [_tone(tone, [name for name, often in SAID.items() if rng.random() < often]) for tone in sound]
    return rng.choice(OPENINGS) + rng.choice(JOINTS).join(tones)


def vocabulary() -> tuple[str, ...]:
    """Every word and sign that captions can say, sorted."""
    words = " ".join(("a tone", *OPENINGS, *JOINTS, *(w for words in ATTRIBUTES.values() for w in words)))
    return tuple(sorted({",", *words.replace(",", "").split()}))


def _tone(tone: Tone, said: Sequence[str]) -> str:
    adjectives = [getattr(tone, name) for name in ("length", "loudness", "pitch") if name in said]
    return " ".join(["a", *adjectives, tone.timbre if "timbre" in said else "tone"])
