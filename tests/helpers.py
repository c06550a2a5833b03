"""What several tests of the core share.

The denoisers' answers are known in closed form. They are written out here, and not taken from
``minidiff.exact``, so that the tests of the samplers depend on no other part of the library.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import minidiff as md

SCHEDULES = {
    "linear": md.Linear(),
    "linear-zero-snr": md.Linear(zero_terminal_snr=True),
    "vp": md.VP(),
    "cosine": md.Cosine(),
    "sigmoid": md.Sigmoid(),
    "karras": md.Karras(),
    "flow": md.Flow(),
    "shifted": md.Shifted(md.Cosine(), 3.0),
}
VARIANCE_PRESERVING = ("linear", "linear-zero-snr", "vp", "cosine", "sigmoid", "shifted")

Denoise = Callable[[Tensor, md.NoiseLevel], md.Prediction]


def from_x0(guess: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Denoise:
    """A denoiser from ``guess(x_t, alpha, sigma) -> E[x0 | x_t]``."""

    def denoise(x_t: Tensor, level: md.NoiseLevel, condition: object = None) -> md.Prediction:
        alpha, sigma = level.alpha, level.sigma
        if alpha.ndim:
            shape = (-1, *[1] * (x_t.ndim - 1))
            alpha, sigma = alpha.reshape(shape), sigma.reshape(shape)
        x0 = guess(x_t, alpha, sigma)
        return md.Prediction(x0, (x_t - alpha * x0) / sigma)

    return denoise


def point_mass(value: Tensor | float) -> Denoise:
    """All data are ``value``."""
    return from_x0(lambda x, alpha, sigma: torch.zeros_like(x) + value)


def gaussian(mean: float, std: float) -> Denoise:
    """Each element of the data is N(mean, std²)."""

    def guess(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = (alpha * std) ** 2 + sigma**2
        return mean + alpha * std**2 / variance * (x - alpha * mean)

    return from_x0(guess)


def gaussian_flow(x: Tensor, start: md.NoiseLevel, end: md.NoiseLevel, mean: float, std: float) -> Tensor:
    """Where the probability-flow ODE of :func:`gaussian` takes ``x`` from ``start`` to ``end``: it keeps
    the number of standard deviations that x is away from the mean."""
    deviations = (x - start.alpha * mean) / ((start.alpha * std) ** 2 + start.sigma**2).sqrt()
    return end.alpha * mean + ((end.alpha * std) ** 2 + end.sigma**2).sqrt() * deviations


def two_peaks(std: float) -> Denoise:
    """Each element of the data is N(+1, std²) or N(-1, std²), with equal chances."""

    def guess(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        variance = (alpha * std) ** 2 + sigma**2
        right = torch.sigmoid(2 * alpha * x / variance)  # chance that x came from the peak at +1
        shrink = alpha * std**2 / variance
        return right * (1 + shrink * (x - alpha)) + (1 - right) * (-1 + shrink * (x + alpha))

    return from_x0(guess)


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 1000 bytes: what comes after is refused, however it is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
