"""The forward process: how data become noise (chapter 1).

A diffusion model mixes a clean sample ``x0`` with Gaussian noise ``eps``::

    x_t = alpha * x0 + sigma * eps,      eps ~ N(0, I)

Two numbers say how much of each is left, so two numbers are all that the rest of the library ever
sees: a :class:`NoiseLevel` carries them together with the time ``t`` they belong to. From them follow

* the marginal ``q(x_t | x0)`` (:func:`diffuse`),
* one step of the noising chain, ``q(x_t | x_s)`` with ``s < t`` (:func:`transition`),
* one step back when ``x0`` is known, ``q(x_s | x_t, x0)`` (:func:`posterior`),
* and what a network may be asked to predict (:func:`to_target`, :func:`from_target`).

No function here knows which schedule chose the numbers.

Sources: Ho et al. 2020 (DDPM), eq. 2, 4, 6, 7; Kingma et al. 2021 (VDM), eq. 1 and appendix A for
arbitrary pairs s < t; Salimans & Ho 2022 for the ``v`` target.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Target = Literal["eps", "x0", "v", "flow", "edm"]
"""What the network predicts: the noise, the data, ``v = alpha*eps - sigma*x0``, ``eps - x0``, or EDM's
mixture of the two, see :func:`target_coefficients`."""

SIGMA_DATA = 0.5
"""Standard deviation that EDM takes the data to have (Karras et al. 2022, table 1)."""

TINY = 1e-9
"""Below this a coefficient counts as zero: cos(pi/2) is 6e-17 in float64, not 0."""


class NoiseLevel(NamedTuple):
    """How much data and how much noise ``x_t`` holds.

    The three tensors share one shape: ``()`` for one level used by a whole batch, or ``(B,)`` for one
    level per sample. They are float64 where the device has it.

    Attributes:
        t: time in [0, 1]; 0 is data, 1 is noise.
        alpha: factor of the data, >= 0.
        sigma: standard deviation of the noise, >= 0.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha² / sigma² (Kingma et al. 2021, eq. 2); inf where sigma is 0."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """log(alpha² / sigma²), from the logarithms so that neither end overflows."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def like(self, x: Tensor) -> "NoiseLevel":
        """The same level in the dtype and on the device of ``x``, shaped so that it broadcasts to it.

        Args:
            x: (B, ...). A level of shape (B,) becomes (B, 1, ..., 1); one of shape () stays as it is.

        Raises:
            ValueError: the level has one entry per sample, but not as many as ``x`` has samples.
        """
        return NoiseLevel(*(broadcast(value, x) for value in self))


def broadcast(value: Tensor, x: Tensor) -> Tensor:
    """A number () or one number per sample (B,) made to multiply ``x`` (B, ...).

    Raises:
        ValueError: ``value`` has neither no dimension, nor one entry per sample of ``x``.
    """
    value = value.to(x.device, x.dtype)
    if value.ndim == 0:
        return value
    if len(value) not in (1, len(x)):
        raise ValueError(
            f"a level for {len(value)} samples does not fit x of shape {tuple(x.shape)}: "
            "give one t per sample, or a single t for all"
        )
    return value.reshape(-1, *[1] * (x.ndim - 1))  # (B,) -> (B, 1, ..., 1)


class Prediction(NamedTuple):
    """What a denoiser says about ``x_t``: the clean sample and the noise, each shaped like ``x_t``.

    The two always agree: ``x_t = alpha * x0 + sigma * eps``.
    """

    x0: Tensor
    eps: Tensor


class Gaussian(NamedTuple):
    """N(mean, std² I): ``mean`` is shaped like the sample, ``std`` broadcasts to it."""

    mean: Tensor
    std: Tensor


def diffuse(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """A sample of ``q(x_t | x0)``: the noisy sample at any level, in one step.

    Ho et al. 2020, eq. 4: ``x_t = alpha * x0 + sigma * eps``.

    Args:
        x0: clean samples, (B, ...).
        eps: standard normal noise, shaped like ``x0``.
        level: one level for all, or one per sample.

    Returns:
        x_t, shaped and typed like ``x0``.

    Raises:
        ValueError: ``eps`` is not shaped like ``x0``, or ``level`` does not fit the batch.
    """
    if eps.shape != x0.shape:
        raise ValueError(f"eps has shape {tuple(eps.shape)}, x0 has {tuple(x0.shape)}: they must agree")
    _, alpha, sigma = level.like(x0)
    return alpha * x0 + sigma * eps


def transition(x_s: Tensor, level_s: NoiseLevel, level_t: NoiseLevel) -> Gaussian:
    """``q(x_t | x_s)``: add the noise that is missing between ``s`` and a later ``t``.

    Kingma et al. 2021, eq. 21-22; with ``s = t - 1`` it is Ho et al. 2020, eq. 2, where the scale is
    sqrt(1 - beta_t) and the variance is beta_t.

    Args:
        x_s: (B, ...), a sample at ``level_s``.
        level_s: the earlier, cleaner level.
        level_t: the later, noisier level.

    Returns:
        Gaussian with mean shaped like ``x_s``.

    Raises:
        ValueError: ``level_t`` is less noisy than ``level_s``.
    """
    scale, std = _step(level_s, level_t)
    return Gaussian(broadcast(scale, x_s) * x_s, broadcast(std, x_s))


def posterior(x_t: Tensor, x0: Tensor, level_t: NoiseLevel, level_s: NoiseLevel) -> Gaussian:
    """``q(x_s | x_t, x0)``: the step back, exact when the clean sample is known.

    Ho et al. 2020, eq. 6-7, for any s < t (Kingma et al. 2021, eq. 25-26).

    Args:
        x_t: noisy samples, (B, ...).
        x0: the clean samples they came from, shaped like ``x_t``.
        level_t: the level of ``x_t``; its sigma must be positive.
        level_s: the earlier, cleaner level to step to.

    Returns:
        Gaussian over x_s with mean shaped like ``x_t``.

    Raises:
        ValueError: ``level_s`` is noisier than ``level_t``.
    """
    scale, std = _step(level_s, level_t)
    from_x_t = scale * (level_s.sigma / level_t.sigma) ** 2
    from_x0 = level_s.alpha * (std / level_t.sigma) ** 2
    mean = broadcast(from_x_t, x_t) * x_t + broadcast(from_x0, x_t) * x0
    return Gaussian(mean, broadcast(posterior_std(level_t, level_s), x_t))


def posterior_std(level_t: NoiseLevel, level_s: NoiseLevel) -> Tensor:
    """Standard deviation of ``q(x_s | x_t, x0)``: the square root of DDPM's "beta tilde" (eq. 7)."""
    _, std = _step(level_s, level_t)
    return std * level_s.sigma / level_t.sigma


def _step(level_s: NoiseLevel, level_t: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Scale and standard deviation of ``q(x_t | x_s)``.

    The variance sigma_t² - (alpha_t/alpha_s)² sigma_s² is a difference of nearly equal numbers when the
    levels are close; written with log-SNRs nothing cancels.
    """
    wrong = (level_t.log_snr > level_s.log_snr).reshape(-1)
    if bool(wrong.any()):
        s, t = (level.t.expand(wrong.shape)[wrong][0].item() for level in (level_s, level_t))
        raise ValueError(f"from t = {s:g} to t = {t:g} noise falls: swap the two levels")
    scale = level_t.alpha / level_s.alpha
    std = level_t.sigma * (-torch.expm1(level_t.log_snr - level_s.log_snr)).sqrt()
    return scale, std


def target_coefficients(target: Target, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """The pair (p, q) that writes a training target as ``p * x0 + q * eps``.

    eps (0, 1) (Ho et al. 2020), x0 (1, 0) (the same, section 3.2), v (-sigma, alpha) (Salimans & Ho
    2022), flow velocity (-1, 1) (Lipman et al. 2023), and edm, EDM's preconditioning (Karras et al. 2022,
    table 1) at any alpha. There the denoiser is ``c_skip * x_t + c_out * F`` with

        c_skip = alpha s_d² / s²,   c_out = sigma s_d / s,   s² = alpha² s_d² + sigma² = Var(x_t)

    for data of variance s_d² (:data:`SIGMA_DATA`): the best linear guess plus a correction of the size
    of its error. Solved for F, the network's output is to be ``(sigma/(s s_d)) x0 - (alpha s_d/s) eps``.
    For s_d = 1 and alpha² + sigma² = 1 it is -v.

    Raises:
        ValueError: ``target`` is none of these.
    """
    zero, one = torch.zeros_like(level.alpha), torch.ones_like(level.alpha)
    match target:
        case "eps":
            return zero, one
        case "x0":
            return one, zero
        case "v":
            return -level.sigma, level.alpha
        case "flow":
            return -one, one
        case "edm":
            return _edm(level)
    raise ValueError(f"unknown target {target!r}: choose one of {', '.join(get_args(Target))}")


def _edm(level: NoiseLevel) -> tuple[Tensor, Tensor]:
    std = (level.alpha**2 * SIGMA_DATA**2 + level.sigma**2).sqrt()  # of x_t
    return level.sigma / (std * SIGMA_DATA), -level.alpha * SIGMA_DATA / std


def to_target(x0: Tensor, eps: Tensor, level: NoiseLevel, target: Target) -> Tensor:
    """What the network should output for this pair: ``p * x0 + q * eps``, shaped like ``x0``."""
    p, q = target_coefficients(target, level)
    return broadcast(p, x0) * x0 + broadcast(q, x0) * eps


def from_target(out: Tensor, x_t: Tensor, level: NoiseLevel, target: Target) -> Prediction:
    """The clean sample and the noise that a network output stands for.

    ``x_t = alpha*x0 + sigma*eps`` and ``out = p*x0 + q*eps`` are two equations in two unknowns; with
    ``det = alpha*q - sigma*p`` their solution is
    ``x0 = (q*x_t - sigma*out)/det`` and ``eps = (alpha*out - p*x_t)/det``.
    One formula serves every target.

    Args:
        out: the network's output, shaped like ``x_t``.
        x_t: noisy samples, (B, ...).
        level: their level.
        target: what ``out`` predicts.

    Raises:
        ValueError: the target says nothing about x0 at this level: pure noise (alpha = 0) and "eps", or
            pure data (sigma = 0) and "x0" (there the noise cannot be told).
    """
    p, q = target_coefficients(target, level)
    det = level.alpha * q - level.sigma * p
    if bool((det.abs() < TINY).any()):
        at = f"t = {level.t.reshape(-1)[det.reshape(-1).abs().argmin()].item():g}"
        what = "x_t is pure noise, so its noise does not tell x0: use target 'x0', 'v' or 'flow'"
        if target == "x0":
            what = "x_t holds no noise to predict: stop at the level before"
        raise ValueError(f"target {target!r} is undefined at {at}: {what}")
    # The numbers are divided, not the samples: that spares a sampler half of its passes over them.
    of_x0, of_eps = (
        (broadcast(a / det, x_t) * x_t).addcmul(broadcast(b / det, x_t), out)
        for a, b in ((q, -level.sigma), (-p, level.alpha))
    )
    return Prediction(of_x0, of_eps)
