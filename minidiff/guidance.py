"""Guidance: denoisers made from denoisers (chapters 6 and 7)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minidiff.condition import Condition
from minidiff.denoiser import Denoiser
from minidiff.forward import TINY, NoiseLevel, Prediction, broadcast


def guide(
    denoise: Callable[[Tensor, NoiseLevel, Any], Prediction],
    condition: Any,
    scale: float = 3.0,
    negative: Any = None,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): go further towards what the condition asks for.

    The denoiser is asked twice, with the condition and without, and the difference is stretched::

        x0 = x0_without + scale * (x0_with - x0_without)

    and the same for eps, which leaves ``x_t = alpha*x0 + sigma*eps`` true. ``scale`` 1 is no guidance
    (the paper's w is ``scale - 1``), 0 ignores the condition. Both questions go to the network as one
    batch of twice the size; at scale 1, or outside ``interval``, only the first is asked.

    Stretching also raises the contrast of x0, up to pictures of pure black and white. ``rescale``
    (Lin et al. 2024, eq. 14-16, their phi) takes that back, for each sample::

        x0_rescaled = x0 * std(x0_with) / std(x0)
        x0_final    = rescale * x0_rescaled + (1 - rescale) * x0

    and derives eps again. The paper, and ``rescale_noise_cfg`` in ``diffusers``, do this to whatever the
    network outputs, so that one setting means something else for eps than for v. A denoiser does not say
    what its network outputs. x0 is what is over-exposed, exists for every network and schedule, and at
    alpha = 0, where the paper finds guidance most sensitive, is its v but for the sign; eps is x_t there,
    and rescaling it would do nothing.

    Args:
        denoise: ``model.denoise``, or anything with its arguments ``(x_t, level, condition)``.
        condition: what to show: a :class:`~minidiff.condition.Condition`, one for all samples or one per
            sample. Anything else is passed on as it is, for denoisers with conditions of their own.
        scale: strength, usually 1 to 7.
        negative: what to go away from; None for "anything", the unconditional model.
        interval: times (low, high) in [0, 1] between which guidance acts (Kynkäänniemi et al. 2024).
        rescale: 0 leaves the contrast as it comes, 1 makes it that of x0_with; the paper uses 0.7. A
            sample without contrast, such as a single number, stays as it is; so does x0 at sigma = 0,
            where x_t tells it.

    Returns:
        ``(x_t, level) -> Prediction``.

    Raises:
        ValueError: ``interval`` is not 0 <= low <= high <= 1, ``rescale`` is outside [0, 1], or ``scale``
            is not finite.
    """
    low, high = interval
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale}: give a finite number, usually 1 to 7")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale = {rescale:g} is a share: give it in [0, 1]")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval = {interval}: give two times with 0 <= low <= high <= 1")

    def guided(x_t: Tensor, level: NoiseLevel) -> Prediction:
        inside = (level.t >= low) & (level.t <= high)  # () or (B,)
        if scale == 1 or not bool(inside.any()):
            return denoise(x_t, level, condition)
        if isinstance(condition, Condition) and isinstance(negative, Condition | None):
            every = condition.expand(len(x_t))
            if negative is None:
                other = every.drop(torch.ones_like(every.mask[:, 0]))
            else:
                other = negative.expand(len(x_t))
            twice = level if level.t.ndim == 0 else NoiseLevel(*(v.repeat(2) for v in level))
            both = denoise(torch.cat([x_t, x_t]), twice, Condition.cat([every, other]))
            (x0, x0_other), (eps, eps_other) = (part.chunk(2) for part in both)
        else:  # a condition of the caller's own kind cannot be joined into one batch
            (x0, eps), (x0_other, eps_other) = (denoise(x_t, level, c) for c in (condition, negative))
        strength = broadcast(torch.where(inside, torch.full_like(inside, scale, dtype=x_t.dtype), 1.0), x_t)
        stretched = Prediction(
            x0_other + strength * (x0 - x0_other), eps_other + strength * (eps - eps_other)
        )
        if rescale == 0:
            return stretched
        spread = _spread(stretched.x0)  # (B,)
        ratio = torch.where(spread > 0, _spread(x0) / spread, 1.0)
        factor = broadcast(rescale * (ratio - 1), x_t)
        return _move_x0(stretched, factor * stretched.x0, level)

    return guided


def gradient_guide(
    denoise: Denoiser, log_likelihood: Callable[[Tensor, NoiseLevel], Tensor], scale: float = 1.0
) -> Denoiser:
    """Guidance by the gradient of anything that can be differentiated: a classifier, a measurement, a
    preference.

    Bayes' rule, seen as slopes, reads ``grad log p(x_t | c) = grad log p(x_t) + grad log p(c | x_t)``.
    The first slope on the right is ``-eps / sigma``, so the condition enters as (Dhariwal & Nichol 2021,
    eq. 14)::

        eps_c = eps - scale * sigma * grad log p(c | x_t)
        x0_c  = x0  + scale * sigma² / alpha * grad log p(c | x_t)

    where the second line keeps ``x_t = alpha*x0 + sigma*eps`` true. ``scale`` 1 is Bayes' rule; more asks
    for ``p(c | x_t)^scale``. A classifier of noisy images is rarely at hand, so c is judged by the clean
    sample that the denoiser sees, ``p(c | x0(x_t))``, and the slope taken through the denoiser
    (Chung et al. 2023, section 3.1; Bansal et al. 2023, eq. 6). That x0 is only the mean of all that x_t may
    have come from, so this is an approximation, best at little noise. It is exact only if the level is
    used to widen ``p(c | x0)`` by the spread around x0, which can be worked out for Gaussians.

    Another guidance goes inside, ``gradient_guide(guide(...), ...)``, and clamping outside: values that
    are clamped have no slope. One step costs one pass forward and one back.

    Args:
        denoise: any denoiser that can be differentiated.
        log_likelihood: ``(x0, level) -> (B,)``, one number per sample, the higher the better; each may
            depend on its own sample alone. x0 (B, ...) has the dtype of x_t, which is float64 in a
            sampler: a network of your own may need ``x0.float()``.
        scale: strength; 0 is none, a negative one goes the other way.

    Returns:
        ``(x_t, level) -> Prediction``, without gradients of its own, also under ``torch.no_grad``. Where
        alpha is 0 the answer is that of ``denoise``: x_t is noise and says nothing about c, and the move
        of x0 would be 0 / 0.

    Raises:
        ValueError: ``scale`` is not finite; when called: ``log_likelihood`` does not return one number per
            sample, or the way from x_t to that number is not differentiable.
    """
    if not math.isfinite(scale):
        raise ValueError(f"scale = {scale}: give a finite number, usually about 1")

    def guided(x_t: Tensor, level: NoiseLevel) -> Prediction:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            prediction = denoise(x, level)
            value = log_likelihood(prediction.x0, level)  # (B,)
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"the log-likelihood has shape {tuple(value.shape)}: give one number per sample, "
                    f"({len(x)},)"
                )
            gradient = None
            if value.requires_grad:  # grad log p(c | x_t), like x_t
                (gradient,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError(
                "the log-likelihood has no slope in x_t: it, or the denoiser, is not differentiable"
            )
        alpha, sigma = level.alpha, level.sigma
        step = torch.where(alpha > TINY, scale * sigma**2 / alpha, 0.0)
        plain = Prediction(*(part.detach() for part in prediction))
        return _move_x0(plain, broadcast(step, x_t) * gradient, level)

    return guided


def clamp(denoise: Denoiser, low: float = -1.0, high: float = 1.0) -> Denoiser:
    """A denoiser whose x0 stays in the range of the data, as images do (Ho et al. 2020, section 3).

    The noise is derived again from the clamped x0: x_t does not change, so if one part of the mixture
    moves, so must the other. Without that, samplers drift.

    Args:
        denoise: any denoiser.
        low: smallest value of the data.
        high: largest value of the data.
    """

    def clamped(x_t: Tensor, level: NoiseLevel) -> Prediction:
        return _with_x0(denoise(x_t, level).x0.clamp(low, high), x_t, level)

    return clamped


def threshold(denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): what strong guidance drives out of [-1, 1]
    is scaled back into it, not cut off.

    With s the given quantile of ``|x0|`` in each sample, at least 1, x0 is clipped to [-s, s] and divided
    by s; the noise is derived again, as in :func:`clamp`.

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
        # One by one: torch's quantile takes no more than 16 million numbers.
        s = torch.stack([one.abs().float().quantile(percentile) for one in x0]).clamp(min=1)  # (B,)
        s = broadcast(s, x0)
        return _with_x0(x0.clamp(-s, s) / s, x_t, level)

    return thresholded


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of the values of each sample, (B, ...) -> (B,)."""
    return x.flatten(1).std(dim=1, correction=0)


def _move_x0(prediction: Prediction, by: Tensor, level: NoiseLevel) -> Prediction:
    """x0 moved, and eps moved against it so that ``alpha*x0 + sigma*eps`` stays what it is; neither
    where sigma is 0, as x_t is alpha*x0 there."""
    _, alpha, sigma = level.like(by)
    by = torch.where(sigma > TINY, by, 0.0)
    return Prediction(prediction.x0 + by, prediction.eps - alpha / sigma.clamp(min=TINY) * by)


def _with_x0(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Prediction:
    """``x0`` and the noise that must then be in ``x_t``."""
    _, alpha, sigma = level.like(x_t)
    return Prediction(x0, torch.where(sigma > 0, (x_t - alpha * x0) / sigma, 0.0))
