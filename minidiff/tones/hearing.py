"""What is it that sounds? Pitch by its spectrum, the rest by ears that are fitted in a second.

In each of our tones the lowest partial is the strongest, so the pitch is where the spectrum has its highest
peak.
Timbre, loudness, length, and whether there is one tone or two, are told from some fifty measured numbers by
linear
discriminants (Fisher 1936). They are fitted to fresh renders when first asked for, so no weights are stored.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.sounds import RATE
from minidiff.tones.data import Tones
from minidiff.tones.sound import ATTRIBUTES, PITCHES, SAMPLES

LOWEST, HIGHEST = 150.0, 750.0
"""Hertz between which a pitch is looked for."""
PADDED = 32768
"""Samples of a tone with zeros after it: its spectrum is then read every quarter of a hertz."""
RATIOS = (1.0, 1.593, 2.0, 2.135, 2.295, 2.653, 2.756, 3.0, 4.0, 5.0, 5.404)
"""Multiples of the pitch at which partials are looked for: those that bars, membranes and strings have."""
FLOOR = 1e-3
"""Shares of the energy below this, -30 dB, count as this."""
EXAMPLES, FIRST = 2000, 2**30
"""Renders that the ears are fitted to, and the seed of their data set, which no recipe trains on."""
HISS = (10.0, 40.0)
"""Decibels by which every second of these renders is above a white noise: ears that only ever heard silence
between the partials would call a bell with a little hiss a drum."""


class Heard(NamedTuple):
    """What was heard: of one tone.

    Attributes:
        timbre: a word, as in :data:`~minidiff.tones.sound.ATTRIBUTES`.
        loudness: a word.
        length: a word.
        hertz: its pitch.
    """

    timbre: str
    loudness: str
    length: str
    hertz: float


def pitch(x: Tensor) -> Tensor:
    """The frequency of the strongest partial between 150 and 750 Hz, in hertz.

    The highest point of the spectrum, between its samples by the parabola through three of them.

    Args:
        x: tones (B, L).

    Returns:
        (B,) float32; exact within 1 cent for a sine of half a second.
    """
    power = _power(x)  # (B, PADDED / 2 + 1)
    low, high = (round(hertz * PADDED / RATE) for hertz in (LOWEST, HIGHEST))
    top = power[:, low:high].argmax(1, keepdim=True) + low
    left, middle, right = (power.gather(1, top + i).clamp(min=1e-30).log() for i in (-1, 0, 1))
    curve = (left - 2 * middle + right).clamp(max=-1e-9)
    return ((top + 0.5 * (left - right) / curve) * RATE / PADDED).squeeze(1)


def cents(hertz: Tensor, note: Tensor) -> Tensor:
    """How far a pitch is above a note, in hundredths of a semitone: ``1200 log2(hertz / note)``."""
    return 1200 * torch.log2(hertz / note)


def hear(x: Tensor) -> list[tuple[Heard, ...]]:
    """Say what each sound is: one tone, or two.

    Args:
        x: (B, 1, 8192) in [-1, 1].

    Raises:
        ValueError: ``x`` has another shape.
    """
    if x.ndim != 3 or x.shape[1:] != (1, SAMPLES):
        raise ValueError(f"x has shape {tuple(x.shape)}: sounds of this data set are (B, 1, {SAMPLES})")
    x, ears = x[:, 0].detach().float().cpu(), _ears()
    found: list[tuple[Heard, ...]] = [()] * len(x)
    counts = ears["count"](_envelope(x, 32)) + 1  # (B,)
    for count in (1, 2):
        rows = (counts == count).nonzero()[:, 0]
        if len(rows) == 0:
            continue
        tones = x[rows].reshape(len(rows) * count, SAMPLES // count)
        features, hertz = _features(tones), pitch(tones).tolist()
        names = {}
        for name in ("timbre", "loudness", "length"):
            labels = ears[f"{name} of {count}"](features).tolist()
            names[name] = [ATTRIBUTES[name][label] for label in labels]
        heard = [Heard(*parts) for parts in zip(*names.values(), hertz, strict=True)]
        for i, row in enumerate(rows.tolist()):
            found[row] = tuple(heard[i * count : (i + 1) * count])
    return found


def log_spectrum(x: Tensor, bands: int = 12, frames: int = 8) -> Tensor:
    """How loud each stretch of time is in each band of frequency, in decibels, not below -60.

    Args:
        x: (B, 1, L).
        bands: from 100 to 4000 Hz, each as much wider than the one before it as it is higher.
        frames: stretches of equal length.

    Returns:
        (B, frames * bands).
    """
    parts = x[:, 0].float().reshape(len(x), frames, -1)  # (B, frames, L / frames)
    power = torch.fft.rfft(parts * torch.hann_window(parts.shape[2]), dim=2).abs().square()
    hertz = torch.fft.rfftfreq(parts.shape[2], 1 / RATE)
    edges = torch.logspace(math.log10(100), math.log10(RATE / 2 + 1), bands + 1)
    inside = ((hertz >= edges[:-1, None]) & (hertz < edges[1:, None])).float()  # (bands, frequencies)
    energy = power @ inside.T / parts.shape[2] ** 2
    return (10 * energy.clamp(min=1e-6).log10()).flatten(1)


class _Discriminant:
    """Linear discriminants of equal covariance: fit, then call for labels."""

    def __init__(self, features: Tensor, labels: Tensor):
        one_hot = torch.eye(int(labels.max()) + 1, dtype=torch.float64)[labels]  # (N, K)
        features = features.double()
        means = (one_hot.T @ features) / one_hot.sum(0)[:, None]  # (K, D)
        spread = features - means[labels]
        covariance = spread.T @ spread / len(features) + 1e-3 * torch.eye(features.shape[1])
        self.weight = torch.linalg.solve(covariance, means.T)  # (D, K)
        self.bias = -0.5 * (means * self.weight.T).sum(1) + (one_hot.mean(0)).log()

    def __call__(self, features: Tensor) -> Tensor:
        return (features.double() @ self.weight + self.bias).argmax(1)


@cache
def _ears() -> dict[str, _Discriminant]:
    """The discriminants: "count", and one per attribute for tones that are alone and for those of a pair."""
    data = Tones(EXAMPLES, "all", FIRST)
    sounds = [data.sound(i) for i in range(EXAMPLES)]
    x = torch.stack([data[i][0][0] for i in range(EXAMPLES)])  # (N, SAMPLES)
    chance = torch.Generator().manual_seed(FIRST)
    quieter = 10 ** (-torch.empty(EXAMPLES, 1).uniform_(*HISS, generator=chance) / 20)
    quieter[::2] = 0
    hiss = torch.randn(x.shape, generator=chance) * x.square().mean(1, keepdim=True).sqrt()
    x = x + quieter * hiss
    counts = torch.tensor([len(sound) for sound in sounds])
    ears = {"count": _Discriminant(_envelope(x, 32), counts - 1)}
    for count in (1, 2):
        tones = [tone for sound in sounds if len(sound) == count for tone in sound]
        features = _features(x[counts == count].reshape(len(tones), -1))
        for name in ("timbre", "loudness", "length"):
            labels = torch.tensor([ATTRIBUTES[name].index(getattr(tone, name)) for tone in tones])
            ears[f"{name} of {count}"] = _Discriminant(features, labels)
    return ears


def _features(x: Tensor) -> Tensor:
    """What is measured of a tone (B, L): where its energy is, in multiples of its pitch and in time."""
    power = _power(x)
    total = power.sum(1, keepdim=True).clamp(min=1e-12)
    share = (power / total).cumsum(1)  # (B, PADDED / 2 + 1)
    centre = pitch(x)[:, None] * torch.tensor(RATIOS) * PADDED / RATE  # (B, ratios)
    half = 10.0 * PADDED / RATE  # 10 Hz to either side
    low, high = ((centre + side * half).long().clamp(0, power.shape[1] - 1) for side in (-1, 1))
    partials = share.gather(1, high) - share.gather(1, low)  # (B, ratios)
    rest = 1 - partials.sum(1, keepdim=True)
    shares = torch.cat([partials, rest], dim=1).clamp(min=FLOOR).log()
    peak = x.abs().amax(1, keepdim=True).clamp(min=1e-4).log()
    return torch.cat([shares, peak, _envelope(x, 24)], dim=1)


def _envelope(x: Tensor, frames: int) -> Tensor:
    """Logarithm of each stretch's share of the energy, (B, frames)."""
    energy = torch.stack([part.square().sum(1) for part in x.tensor_split(frames, dim=1)], dim=1)
    return (energy / energy.sum(1, keepdim=True).clamp(min=1e-12)).clamp(min=FLOOR).log()


def _power(x: Tensor) -> Tensor:
    """Power at each quarter of a hertz, (B, PADDED / 2 + 1), through a Hann window."""
    return torch.fft.rfft(x * torch.hann_window(x.shape[1]), PADDED, dim=1).abs().square()


def nearest_word(hertz: float) -> str:
    """The word of the note that is nearest to a pitch."""
    return min(PITCHES, key=lambda word: abs(math.log(hertz / PITCHES[word])))


def notes(words: Sequence[str]) -> Tensor:
    """The notes of some pitch words, in hertz."""
    return torch.tensor([PITCHES[word] for word in words])
