"""Likelihood: how probable does a model find given data? (chapters 4 and 10)

Two answers, both in nats per sample; :func:`bits_per_dim` turns them into the unit of the literature.

**The variational bound.** A diffusion model is a chain of Gaussians that runs backwards, so the evidence
bound of any latent-variable model applies (Ho et al. 2020, eq. 5), and every term is a distance between
two Gaussians::

    -log p(x0) <= KL(q(x_T | x0) || N(0, sigma_T² I))              (prior)
        + sum over steps of E KL(q(x_s | x_t, x0) || p(x_s | x_t))  (steps)
        - E log p(x0 | x_t at the last level with noise)   (reconstruction)

The two Gaussians of a step differ in their means alone, by what x0 and the guess differ in, so its KL is
``(SNR_s - SNR_t) ||x0 - x0_guess||² / 2`` (Kingma et al. 2021, eq. 13).

**The probability flow.** Noise and data are joined by an ordinary differential equation, so the density
can be followed along it without a bound. In the scaled variable y = x/alpha, with s = sigma/alpha, it
reads ``dy/ds = eps``, and along a path ``d log p / ds = -div_y eps`` (Song et al. 2021b, eq. 39).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.denoiser import Denoiser
from minidiff.forward import NoiseLevel, diffuse
from minidiff.sampling import Generators, randn_like


class Bound(NamedTuple):
    """The terms of the variational bound, in nats per sample.

    Attributes:
        prior: (B,) what x_T still tells about x0.
        steps: (B, n - 1) one term per step, from the noisiest to the cleanest.
        reconstruction: (B,) what is left to be said at the last level.
    """

    prior: Tensor
    steps: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """(B,) upper bound of -log p(x0), or of -log P(x0) for data in bins."""
        return self.prior + self.steps.sum(1) + self.reconstruction


@torch.no_grad()
def variational_bound(
    denoise: Denoiser,
    x0: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    bins: int | None = None,
    generator: Generators = None,
) -> Bound:
    """The variational bound of ``-log p(x0)`` for the chain of ``ddpm`` along ``levels``.

    Each expectation is one draw of noise: average over data or repeat for a smaller error. The last step
    is the decoder ``N(x0_guess, (sigma/alpha)² I)`` at the last level with noise: the posterior of data
    about which nothing else is known, so that level should hold little noise. The bound depends on the
    levels, on how many there are and on their spacing: quote both with the number.

    Args:
        denoise: ``(x_t, level) -> Prediction``.
        x0: clean samples (B, ...); in [-1, 1] if there are bins.
        levels: n + 1 levels of falling noise, as for a sampler; the last with sigma = 0.
        bins: None for the density of continuous data; 256 for the probability of images of 8 bits, whose
            values stand for intervals of width 2/255 (Ho et al. 2020, eq. 13).
        generator: for the noise.

    Returns:
        :class:`Bound`, float64.

    Raises:
        ValueError: fewer than 3 levels, the last has noise, fewer than 2 bins, or data outside of them.
    """
    if len(levels) < 3 or levels[-1].sigma > 0:
        raise ValueError("give at least 3 levels that end at sigma = 0, as schedule.levels(n) does")
    if bins is not None and bins < 2:
        raise ValueError(f"bins = {bins}: use at least 2, or None for continuous data")
    if bins is not None and float(x0.abs().max()) > 1:
        raise ValueError(f"x0 reaches {float(x0.abs().max()):g}: bins are made for data in [-1, 1]")
    x0 = x0.double()
    first = levels[0]
    prior = _squares(first.alpha / first.sigma * x0) / 2
    steps = []
    for level_t, level_s in pairwise(levels[:-1]):
        guess = denoise(diffuse(x0, randn_like(x0, generator), level_t), level_t).x0
        steps.append((level_s.snr - level_t.snr).to(x0) * _squares(x0 - guess) / 2)
    last = levels[-2]
    guess = denoise(diffuse(x0, randn_like(x0, generator), last), last).x0
    std = (last.sigma / last.alpha).to(x0)
    if bins is None:
        log_p = -(((x0 - guess) / std) ** 2) / 2 - (std * math.sqrt(2 * math.pi)).log()
    else:
        log_p = _log_bin(x0, guess, std, bins)
    return Bound(prior, torch.stack(steps, 1), -log_p.flatten(1).sum(1))


def flow_log_likelihood(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(x) along the probability flow (Song et al. 2021b, section 4.3), by Heun's method.

    The density is that of x_t/alpha at the last level with noise, and of the start N(0, sigma² I) at the
    first. Use ``schedule.levels(n, "log_snr")``: the flow needs alpha > 0 everywhere.

    Args:
        denoise: ``(x_t, level) -> Prediction``; differentiable.
        x: samples (B, ...), clean or nearly so.
        levels: n + 1 levels of falling noise, as for a sampler; one with sigma = 0 is left out.
        probes: None takes the divergence exactly, one backward pass per dimension; a number estimates it
            with as many random signs (Hutchinson's trick), without bias.
        generator: for the probes.

    Returns:
        (B,) nats, float64.

    Raises:
        ValueError: a level has alpha = 0, fewer than 2 levels have noise, or ``probes`` is not positive.
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes = {probes}: use at least 1, or None for the exact divergence")
    path = [level for level in reversed(levels) if level.sigma > 0]
    if len(path) < 2 or not all(level.alpha > 1e-6 for level in path):
        raise ValueError("the flow needs 2 levels with noise, all with alpha > 0: use log_snr spacing")
    y = x.double()
    directions = _directions(y, probes, generator)
    log_det = torch.zeros(len(y), dtype=torch.float64, device=y.device)

    def slope(y: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        """dy/ds = eps, and its divergence with respect to y."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            eps = denoise(level.alpha.to(y) * y, level).eps
            divergence = torch.zeros_like(log_det)
            for direction in directions:
                (pulled,) = torch.autograd.grad((eps * direction).sum(), y, retain_graph=True)
                divergence += (pulled * direction).flatten(1).sum(1)
        share = 1 if probes is None else len(directions)
        return eps.detach(), divergence.detach() / share

    for level_s, level_t in pairwise(path):
        step = (level_t.sigma / level_t.alpha - level_s.sigma / level_s.alpha).to(y)
        eps, divergence = slope(y, level_s)
        eps_ahead, divergence_ahead = slope(y + step * eps, level_t)
        y = y + step * (eps + eps_ahead) / 2
        log_det = log_det + step * (divergence + divergence_ahead) / 2
    std = (path[-1].sigma / path[-1].alpha).to(y)
    log_start = -_squares(y / std) / 2 - y[0].numel() * (std * math.sqrt(2 * math.pi)).log()
    return log_start + log_det


def bits_per_dim(nats: Tensor, x: Tensor, width: float = 1.0) -> Tensor:
    """-log p in nats per sample as bits per dimension.

    Args:
        nats: (B,) or (), -log p.
        x: the samples (B, ...), for their number of dimensions.
        width: side of a data interval for densities of data that really are discrete: 2/255 for images of
            8 bits in [-1, 1]; 1 leaves densities as they are.
    """
    return (nats / x[0].numel() - math.log(width)) / math.log(2)


def _squares(x: Tensor) -> Tensor:
    return (x**2).flatten(1).sum(1)


def _directions(y: Tensor, probes: int | None, generator: torch.Generator | None) -> Tensor:
    """Vectors v for which the mean (or sum) of v·Jv is the trace of J."""
    if probes is None:
        return torch.eye(y[0].numel(), dtype=y.dtype, device=y.device).reshape(-1, 1, *y.shape[1:])
    signs = torch.randint(0, 2, (probes, *y.shape), generator=generator)
    return (2 * signs - 1).to(y)


def _log_bin(x0: Tensor, mean: Tensor, std: Tensor, bins: int) -> Tensor:
    """log of the mass that N(mean, std²) puts into the bin of x0; the outermost bins have no end."""
    half = 1 / (bins - 1)
    low, high = (x0 - half - mean) / std, (x0 + half - mean) / std
    low = low.masked_fill(x0 < -1 + half, -math.inf)
    high = high.masked_fill(x0 > 1 - half, math.inf)
    # Far in the right tail both masses are 1 to the last digit; mirrored, they are small and exact.
    right = low > 0
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-(log_low - log_high).exp())
