"""The loss: how wrong is the network about a mixture of data and noise? (chapter 4)

It is five lines, and :func:`loss` is where they stand: draw a time, draw noise, mix, predict, compare.
Around them are the choices that papers differ in: how times are drawn (:func:`stratified_times`), and how
much each level counts (:data:`WEIGHTINGS`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.condition import Condition
from minidiff.denoiser import Diffusion
from minidiff.forward import (
    SIGMA_DATA,
    NoiseLevel,
    broadcast,
    diffuse,
    from_target,
    target_coefficients,
    to_target,
)
from minidiff.schedule import Schedule

Weighting = Callable[[NoiseLevel], Tensor]
Term = Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]
"""What may be added to the loss: a function of the guesses of x0, their level and the samples whose condition
was withheld (B,), that gives a tensor of shape ()."""


def snr_weight(level: NoiseLevel) -> Tensor:
    """SNR: the plain squared error of eps, written for x0. Where log SNR falls evenly in t it is, up to a
    factor, the weight of the variational bound (Kingma et al. 2021, eq. 13, for many steps)."""
    return level.snr


def min_snr_weight(level: NoiseLevel) -> Tensor:
    """min(SNR, 5): no level may shout (Hang et al. 2023, section 3.4)."""
    return level.snr.clamp(max=5)


def snr_plus_one_weight(level: NoiseLevel) -> Tensor:
    """min(SNR + 1, 50): the plain squared error of v, written for x0 (Salimans & Ho 2022, section 4),
    capped where x_t is so clean that the error says nothing more."""
    return (level.snr + 1).clamp(max=50)


def edm_weight(level: NoiseLevel) -> Tensor:
    """EDM's lambda(sigma), 1/c_out², at any alpha (Karras et al. 2022, table 1): the plain squared error
    of the target "edm", written for x0."""
    variance = level.alpha**2 * SIGMA_DATA**2 + level.sigma**2  # of x_t
    return variance / (level.sigma * SIGMA_DATA) ** 2


def sigmoid_weight(level: NoiseLevel, bias: float = 2.0) -> Tensor:
    """The squared error of eps times sigmoid(bias - log SNR), written for x0: clean levels, where only
    the last digits of the data are at stake, count little (Kingma & Gao 2023)."""
    return level.snr * torch.sigmoid(bias - level.log_snr)


def uniform_weight(level: NoiseLevel) -> Tensor:
    """1: the plain squared error of x0."""
    return torch.ones_like(level.alpha)


WEIGHTINGS: dict[str, Weighting | None] = {
    "simple": None,  # every level counts the same in the target's own units (Ho et al. 2020, eq. 14)
    "uniform": uniform_weight,
    "snr": snr_weight,
    "min_snr": min_snr_weight,
    "snr_plus_one": snr_plus_one_weight,
    "edm": edm_weight,
    "sigmoid": sigmoid_weight,
}


def stratified_times(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``n`` times in (0, 1], one in each n-th of the interval, moved together by one random shift.

    Every time is uniform, as the loss demands; together they cover the interval evenly, which takes
    much of the noise out of the loss (Kingma et al. 2021, appendix I.1). t = 1 can occur, t = 0 cannot.

    Returns:
        (n,) float64 (float32 on MPS).
    """
    kind = torch.float32 if device.type == "mps" else torch.float64
    shift = torch.rand(1, generator=generator, device=device, dtype=kind)
    # Shuffled: a data set that comes in the same order every time must not tie times to samples.
    stratum = torch.randperm(n, generator=generator, device=device)
    return 1 - (shift + stratum) / n


class Draws(NamedTuple):
    """All chance in one training step.

    Attributes:
        level: the level of each sample, (B,).
        eps: its noise, (B, ...).
        drop: True where its condition is withheld, (B,) bool; None where none is.
    """

    level: NoiseLevel
    eps: Tensor
    drop: Tensor | None


def draw(
    schedule: Schedule, x0: Tensor, condition_dropout: float = 0.0, generator: torch.Generator | None = None
) -> Draws:
    """Draw times, noise, and whose condition is withheld, in this order.

    Args:
        schedule: from times to levels.
        x0: clean samples (B, ...); only their shape, kind and device count.
        condition_dropout: chance in [0, 1] that a sample's condition is withheld.
        generator: source of chance, on the device of ``x0``.

    Raises:
        ValueError: ``condition_dropout`` is no chance.
    """
    if not 0 <= condition_dropout <= 1:
        raise ValueError(f"condition_dropout = {condition_dropout:g} is a chance: give it in [0, 1]")
    level = schedule(stratified_times(len(x0), generator, x0.device))
    eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    if condition_dropout == 0:
        return Draws(level, eps, None)
    return Draws(level, eps, torch.rand(len(x0), generator=generator, device=x0.device) < condition_dropout)


def loss(
    model: Diffusion,
    x0: Tensor,
    condition: Any = None,
    *,
    weighting: str | Weighting = "simple",
    condition_dropout: float = 0.0,
    alignment: Term | None = None,
    generator: torch.Generator | None = None,
    draws: Draws | None = None,
) -> Tensor:
    """The training loss: how wrong is the network about a random mixture of data and noise?

    ``E || target(x0, eps) - net(x_t, t) ||²``; for target "eps" and the simple weighting this is Ho et
    al. 2020, eq. 14. A weighting is defined once, as a factor w(level) of the squared error of x0, and
    converted: the error of x0 is ``sigma/det`` times the error of the output.

    Args:
        model: network, schedule and target.
        x0: clean samples (B, ...), images in [-1, 1].
        condition: what each sample shows, whatever :meth:`Diffusion.encode
            <minidiff.denoiser.Diffusion.encode>` takes: a Condition, captions, labels, their numbers,
            or None.
        weighting: "simple", "uniform", "snr", "min_snr", "snr_plus_one", "edm", "sigmoid", or w(level).
        condition_dropout: chance in [0, 1] that a sample's condition is withheld, drawn for each
            sample on its own; classifier-free guidance needs about 0.1.
        alignment: a term to add that looks at the guess of x0, such as :meth:`Alignment.term
            <minidiff.text.Alignment.term>` of the captions.
        generator: source of times, noise and dropout, on the device of ``x0``.
        draws: these, already drawn by :func:`draw`, in place of a generator and a dropout.

    Returns:
        Mean over batch and elements, a tensor of shape ().

    Raises:
        ValueError: the weighting is unknown, ``condition_dropout`` is no chance, or the condition is not of a
            kind that can be withheld.
    """
    if isinstance(weighting, str) and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    level, eps, drop = draws or draw(model.schedule, x0, condition_dropout, generator)
    x_t = diffuse(x0, eps, level)
    condition = model.encode(condition)
    if condition is not None and drop is not None:
        if not isinstance(condition, Condition):
            raise ValueError(
                f"a condition of type {type(condition).__name__} cannot be withheld: give a Condition, or "
                "condition_dropout=0"
            )
        condition = condition.to(x0).expand(len(x0)).drop(drop)
    out = model(x_t, level, condition)
    error = (out.float() - to_target(x0, eps, level, model.target)) ** 2
    weigh = WEIGHTINGS[weighting] if isinstance(weighting, str) else weighting
    if weigh is not None:
        p, q = target_coefficients(model.target, level)
        det = level.alpha * q - level.sigma * p
        error = broadcast(weigh(level) * (level.sigma / det) ** 2, error) * error
    if alignment is None:
        return error.mean()
    x0_hat = from_target(out.float(), x_t.float(), level, model.target).x0
    return error.mean() + alignment(x0_hat, level, drop)
