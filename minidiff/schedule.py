"""Noise schedules: which levels a sample passes on its way to noise (chapter 2).

A schedule turns a time t in [0, 1] into a :class:`~minidiff.forward.NoiseLevel`. That is all it does;
training and sampling never ask which one it is. Time 0 is data, time 1 is noise::

    schedule = Cosine()
    level = schedule(0.3)            # NoiseLevel(t, alpha, sigma)
    levels = schedule.levels(20)     # 21 levels from noise down to data: what a sampler walks along

Four of the schedules preserve variance (alpha² + sigma² = 1) or mix linearly (``Flow``); ``Karras``
leaves the data at full size and lets the noise grow instead.

All numbers are computed in float64: with alpha close to 1, ``sqrt(1 - alpha**2)`` in float32 has lost
most of its digits, and early levels would be wrong by tenths of a percent.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minidiff.forward import NoiseLevel


class Schedule:
    """Base of all schedules: call it with a time, or ask it for the levels of a sampling run."""

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The noise level at time ``t``.

        Args:
            t: a number, or a tensor of shape () or (B,), each in [0, 1].

        Returns:
            NoiseLevel with tensors shaped like ``t``, float64 (float32 on MPS), on the device of ``t``.

        Raises:
            ValueError: a time lies outside [0, 1] or is not a number.
        """
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)  # a Python float must not pass through float32
        t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        if not bool(((t >= 0) & (t <= 1)).all()):
            bad = t.reshape(-1)[~((t >= 0) & (t <= 1)).reshape(-1)][0].item()
            raise ValueError(f"t = {bad:g} is outside [0, 1]: 0 is data, 1 is noise")
        return NoiseLevel(t, *self.coefficients(t))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times ``t`` in [0, 1], float64; each schedule defines its own."""
        raise NotImplementedError

    def levels(self, n: int) -> list[NoiseLevel]:
        """The ``n + 1`` levels of a sampling run of ``n`` steps, from noise to data.

        Uniform in t, from the schedule's top at t = 1 to t = 0, where sigma is exactly 0. "The previous
        step" of a sampler is the next entry of this list, so any ``n`` >= 1 works.

        Returns:
            n + 1 levels with tensors of shape ().

        Raises:
            ValueError: ``n`` is smaller than 1.
        """
        if n < 1:
            raise ValueError(f"levels({n}): a sampling run needs at least 1 step")
        return [self(t) for t in torch.linspace(1, 0, n + 1, dtype=torch.float64)]

    def config(self) -> dict[str, Any]:
        """Name and parameters, as JSON can hold them; :func:`schedule_from_config` reads them back."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Linear(Schedule):
    """DDPM's schedule: the noise added per step grows linearly (Ho et al. 2020, section 4).

    ``beta_i`` runs from ``beta_min`` to ``beta_max`` in ``steps`` steps and
    ``alpha_i² = prod_{j<=i} (1 - beta_j)``. Time t = i/steps is the chain after i steps; between two
    steps log alpha² is interpolated, so any t in [0, 1] is allowed.

    Args:
        beta_min: variance added by the first step, in (0, 1).
        beta_max: variance added by the last step, in (0, 1).
        steps: number of steps T. Fewer steps at the same betas leave signal at t = 1.

    Raises:
        ValueError: a beta is outside (0, 1), or ``steps`` is smaller than 1.
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    steps: int = 1000

    def __post_init__(self) -> None:
        for name in ("beta_min", "beta_max"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} = {getattr(self, name):g} is a variance: give it in (0, 1)"
                )
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}: the chain needs at least 1 step")

    @cached_property
    def betas(self) -> Tensor:
        """(steps,) float64: ``betas[i]`` is the variance added by step i + 1."""
        return torch.linspace(self.beta_min, self.beta_max, self.steps, dtype=torch.float64)

    @cached_property
    def _log_alpha_bar(self) -> Tensor:
        logs = torch.log1p(-self.betas).cumsum(0)  # log of a product of many factors close to 1
        return torch.cat(
            [torch.zeros(1, dtype=torch.float64), logs]
        )  # (steps + 1,), entry 0 is data

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._log_alpha_bar.to(t)
        position = t * self.steps
        left = position.floor().clamp(max=self.steps - 1).long()
        log_alpha_bar = torch.lerp(table[left], table[left + 1], position - left)
        return _variance_preserving(log_alpha_bar)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Cosine schedule (Nichol & Dhariwal 2021, eq. 17), without their clipping of beta.

    ``alpha = cos(u)/cos(u0)`` with ``u = (t + offset)/(1 + offset) * pi/2`` and u0 its value at t = 0.
    It spends its time evenly over the angles between data and noise and reaches alpha = 0 at t = 1.

    Args:
        offset: keeps the first steps from being vanishingly small, in [0, 1); with 0,
            alpha = cos(pi t / 2) and sigma = sin(pi t / 2).

    Raises:
        ValueError: ``offset`` is outside [0, 1).
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset = {self.offset:g} is outside [0, 1)")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u0 = self.offset / (1 + self.offset) * math.pi / 2
        shift = t / (1 + self.offset) * math.pi / 2  # u - u0
        alpha = ((u0 + shift).cos() / math.cos(u0)).clamp(min=0)  # rounding may pass pi/2
        # 1 - alpha² as a product of sines: exact, where the difference would cancel near t = 0.
        sigma = (shift.sin() * (2 * u0 + shift).sin()).sqrt() / math.cos(u0)
        return alpha, sigma


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """Sigmoid schedule (Jabri et al. 2023; Chen 2023, algorithm 1): alpha² follows a logistic curve.

    ``alpha²(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start))``, ``S(x) = 1/(1+exp(-x/tau))``.

    Args:
        start: left end of the stretch of the logistic curve.
        end: right end, greater than ``start``.
        tau: temperature > 0; a larger one makes the curve straighter.

    Raises:
        ValueError: ``end`` does not exceed ``start``, or ``tau`` is not positive.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise ValueError(f"start = {self.start:g} must be smaller than end = {self.end:g}")
        if not self.tau > 0:
            raise ValueError(f"tau = {self.tau:g} must be positive")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # S(b) - S(a) = S(b) S(-a) (1 - exp(a - b)): a product, where the difference would cancel.
        whole = (self.end - self.start) / self.tau
        first, here, last = (self.start / self.tau + u * whole for u in (0 * t, t, 0 * t + 1))
        sigma = torch.sigmoid(here) * torch.expm1(-t * whole) / torch.sigmoid(last)
        alpha = torch.sigmoid(-here) * torch.expm1(t * whole - whole) / torch.sigmoid(-first)
        alpha, sigma = (
            (alpha / math.expm1(-whole)).abs(),
            (sigma / math.expm1(-whole)).abs(),
        )  # no -0
        return alpha.sqrt(), sigma.sqrt()


@dataclass(frozen=True)
class Karras(Schedule):
    """Variance-exploding schedule of EDM (Karras et al. 2022, eq. 5): alpha = 1, sigma grows.

    ``sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho``. At t = 0 a trace
    of noise, ``sigma_min``, is left; :meth:`levels` goes on to sigma = 0.

    Args:
        sigma_min: smallest noise, > 0.
        sigma_max: largest noise; must drown the data.
        rho: how strongly the steps crowd at low noise, > 0.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or ``rho`` is not positive.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min = {self.sigma_min:g} and sigma_max = {self.sigma_max:g}: "
                "they must satisfy 0 < sigma_min < sigma_max"
            )
        if not self.rho > 0:
            raise ValueError(f"rho = {self.rho:g} must be positive")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho

    def levels(self, n: int) -> list[NoiseLevel]:
        """``n`` levels from sigma_max to sigma_min, then sigma = 0 (Karras et al. 2022, eq. 5)."""
        if n < 1:
            raise ValueError(f"levels({n}): a sampling run needs at least 1 step")
        times = torch.linspace(1, 0, n, dtype=torch.float64)  # n = 1 gives t = 1 alone
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        return [*(self(t) for t in times), NoiseLevel(zero, one, zero)]


@dataclass(frozen=True)
class Flow(Schedule):
    """Straight lines from data to noise: alpha = 1 - t, sigma = t.

    Lipman et al. 2023 (conditional optimal transport), Liu et al. 2023 (rectified flow).
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t.clone()


def _variance_preserving(log_alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) from log alpha², with sigma = sqrt(1 - alpha²) free of cancellation."""
    return (log_alpha_bar / 2).exp(), torch.expm1(log_alpha_bar).abs().sqrt()


SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (Linear, Cosine, Sigmoid, Karras, Flow)
}


def schedule_from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.config` described.

    Raises:
        ValueError: the name is unknown.
    """
    name = config.get("name", "")
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](**{key: value for key, value in config.items() if key != "name"})
