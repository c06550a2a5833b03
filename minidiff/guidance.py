"""Guidance: denoisers made from denoisers (chapter 6)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidiff.denoiser import Condition, Denoiser
from minidiff.forward import NoiseLevel, Prediction, broadcast


def guide(
    denoise: Callable[[Tensor, NoiseLevel, Any], Prediction],
    condition: Any,
    scale: float = 3.0,
    negative: Any = None,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): go further towards what the condition asks for.

    The denoiser is asked twice, with the condition and without, and the difference is stretched::

        x0 = x0_without + scale * (x0_with - x0_without)

    and the same for eps, which leaves ``x_t = alpha*x0 + sigma*eps`` true. ``scale`` 1 is no guidance
    (the paper's w is ``scale - 1``), 0 ignores the condition. Both questions go to the network as one
    batch of twice the size; at scale 1, or outside ``interval``, only the first is asked.

    Args:
        denoise: ``model.denoise``, or anything with its arguments ``(x_t, level, condition)``.
        condition: what to show: a :class:`~minidiff.denoiser.Condition`, one for all samples or one per
            sample. Anything else is passed on as it is, for denoisers with conditions of their own.
        scale: strength, usually 1 to 7.
        negative: what to go away from; None for "anything", the unconditional model.
        interval: times (low, high) in [0, 1] between which guidance acts (Kynkäänniemi et al. 2024).

    Returns:
        ``(x_t, level) -> Prediction``.

    Raises:
        ValueError: ``interval`` is not 0 <= low <= high <= 1.
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval = {interval}: give two times with 0 <= low <= high <= 1")

    def guided(x_t: Tensor, level: NoiseLevel) -> Prediction:
        inside = (level.t >= low) & (level.t <= high)  # () or (B,)
        if scale == 1 or not bool(inside.any()):
            return denoise(x_t, level, condition)
        if isinstance(condition, Condition) and isinstance(negative, Condition | None):
            asked = condition.expand(len(x_t))
            if negative is None:
                other = asked.drop(torch.ones_like(asked.mask[:, 0]))
            else:
                other = negative.expand(len(x_t))
            twice = level if level.t.ndim == 0 else NoiseLevel(*(v.repeat(2) for v in level))
            both = denoise(torch.cat([x_t, x_t]), twice, Condition.cat([asked, other]))
            (x0, x0_other), (eps, eps_other) = (part.chunk(2) for part in both)
        else:  # a condition of the caller's own kind cannot be joined into one batch
            (x0, eps), (x0_other, eps_other) = (
                denoise(x_t, level, c) for c in (condition, negative)
            )
        strength = broadcast(torch.where(inside, scale, 1.0), x_t)
        return Prediction(
            x0_other + strength * (x0 - x0_other), eps_other + strength * (eps - eps_other)
        )

    return guided


def clip(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """A denoiser whose x0 stays in the range of the data, as images do (Ho et al. 2020, section 3).

    The noise is derived again from the clipped x0: x_t does not change, so if one part of the mixture
    moves, so must the other. Without that, samplers drift.

    Args:
        denoise: any denoiser.
        low: smallest value of the data.
        high: largest value of the data.
    """

    def clipped(x_t: Tensor, level: NoiseLevel) -> Prediction:
        return _with_x0(denoise(x_t, level).x0.clamp(low, high), x_t, level)

    return clipped


def threshold(denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): what strong guidance drives out of [-1, 1]
    is scaled back into it, not cut off.

    With s the given quantile of ``|x0|`` in each sample, at least 1, x0 is clipped to [-s, s] and divided
    by s; the noise is derived again, as in :func:`clip`.

    Args:
        denoise: any denoiser of images in [-1, 1].
        percentile: share of the values, in (0, 1], that count as not outlying.

    Raises:
        ValueError: ``percentile`` is outside (0, 1].
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile = {percentile:g} is a share: give it in (0, 1]")

    def thresholded(x_t: Tensor, level: NoiseLevel) -> Prediction:
        x0 = denoise(x_t, level).x0
        s = x0.abs().flatten(1).float().quantile(percentile, dim=1).clamp(min=1)  # (B,)
        s = broadcast(s, x0)
        return _with_x0(x0.clamp(-s, s) / s, x_t, level)

    return thresholded


def _with_x0(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Prediction:
    """``x0`` and the noise that must then be in ``x_t``."""
    _, alpha, sigma = level.like(x_t)
    return Prediction(x0, (x_t - alpha * x0) / sigma)
