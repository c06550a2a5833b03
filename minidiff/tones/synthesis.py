"""Tones as waves: sums of decaying sines, as in the physics of the thing that is struck, plucked or blown."""

import random

import numpy as np
from numpy.typing import NDArray

from minidiff.sounds import RATE
from minidiff.tones.sound import LENGTHS, LOUDNESS, PITCHES, SAMPLES, Sound, Tone

DETUNE = 20.0
"""Cents by which a tone may miss its note, either way."""
BAR, MEMBRANE = (1.0, 2.756, 5.404), (1.0, 1.593, 2.135, 2.295, 2.653)
"""Multiples of the lowest frequency at which a bar and a round membrane sound (Fletcher & Rossing 1998)."""
START = 0.02
"""Seconds of silence before a tone."""
FADE = 0.03
"""Seconds in which a tone is damped."""
PARTIALS = {  # timbre: multiples of the pitch, their strengths, how fast they decay
    "bell": (BAR, (1.0, 0.6, 0.3), (1.0, 2.0, 4.0)),
    "string": (range(1, 8), [1 / k for k in range(1, 8)], [k**0.7 for k in range(1, 8)]),
    "flute": ((1, 2, 3), (1.0, 0.3, 0.1), (0.0, 0.0, 0.0)),
    "drum": (MEMBRANE, (1.0, 0.7, 0.5, 0.4, 0.3), (4.0, 4.5, 5.0, 5.0, 5.5)),
}


def play(sound: Sound, rng: random.Random) -> NDArray[np.float32]:
    """The wave of a sound, (:data:`~minidiff.tones.sound.SAMPLES`,) in [-1, 1].

    Args:
        sound: one tone or two.
        rng: source of what the words leave open: by how much a tone misses its note, how loud exactly it is,
            and the noise of breath and stick.

    Raises:
        ValueError: no tone, or more than two.
    """
    if len(sound) not in (1, 2):
        raise ValueError(f"{len(sound)} tones: a sound is one or two")
    slot = SAMPLES // len(sound)
    return np.concatenate([_tone(tone, slot, rng) for tone in sound]).astype(np.float32)


def _tone(tone: Tone, slot: int, rng: random.Random) -> NDArray[np.float64]:
    frequency = PITCHES[tone.pitch] * 2 ** (rng.uniform(-DETUNE, DETUNE) / 1200)
    peak = LOUDNESS[tone.loudness] * 10 ** (rng.uniform(-1, 1) / 20)
    duration = LENGTHS[tone.length] * slot / RATE
    t = np.arange(slot) / RATE - START  # seconds since it began
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(slot)
    multiples, strengths, decays = (np.array(part)[:, None] for part in PARTIALS[tone.timbre])
    whole = strengths * np.sin(2 * np.pi * frequency * multiples * t)  # (partials, slot)
    wave = (whole * np.exp(-2 * decays * t.clip(0) / duration)).sum(0)
    if tone.timbre == "flute":
        wave = (wave + 0.03 * noise) * (1 - np.exp(-t.clip(0) / 0.02))  # breath, and a soft beginning
    if tone.timbre == "drum":
        wave += 0.5 * noise * np.exp(-t.clip(0) / 0.01)  # the stick
    wave *= (t >= 0) * np.cos(np.pi / 2 * ((t - duration) / FADE + 1).clip(0, 1)) ** 2
    return peak * wave / np.abs(wave).max()
