"""Noise schedules: which levels a sample passes on its way to noise (chapter 2).

A schedule turns a time t in [0, 1] into a :class:`~minidiff.forward.NoiseLevel`. That is all it does;
training and sampling never ask which one it is. Time 0 is data, time 1 is noise::

    schedule = Cosine()
    level = schedule(0.3)            # NoiseLevel(t, alpha, sigma)
    levels = schedule.levels(20)     # 21 levels, from noise to data

Most schedules preserve variance (alpha² + sigma² = 1) or mix linearly (``Flow``); ``Karras`` leaves the
data at full size and lets the noise grow instead. ``Shifted`` walks the path of another at another pace.

All numbers are float64: with alpha close to 1, ``sqrt(1 - alpha**2)`` in float32 is off by tenths of a
percent.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minidiff.checks import whole
from minidiff.forward import SIGMA_DATA, NoiseLevel

Spacing = Literal["uniform", "trailing", "log_snr", "karras"]
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""What a network of a chain predicts, in the words of ``diffusers``."""
ALMOST_ZERO = 1e-10  # stands for alpha = 0 where its logarithm is needed
MOST_LEVELS = 100_000
"""Steps of a run or a chain at most: more is a slip of the hand."""
NOISE_TO_DATA = (0.002, 80.0)
"""Smallest and largest sigma/alpha that the spacings in log-SNR visit (Karras et al. 2022, table 1)."""


class Schedule:
    """Base of all schedules: call it with a time, or ask it for the levels of a sampling run."""

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The noise level at time ``t``.

        Args:
            t: a number, or a tensor of shape () or (B,), each in [0, 1].

        Returns:
            NoiseLevel with tensors shaped like ``t``, float64 (float32 on MPS), on the device of ``t``.

        Raises:
            ValueError: a time on the CPU lies outside [0, 1] or is not a number; to look on a GPU is to wait.
        """
        if not isinstance(t, Tensor):
            t = torch.tensor(t, dtype=torch.float64)  # a Python float must not pass through float32
        t = t.to(torch.float32 if t.device.type == "mps" else torch.float64)
        if t.device.type == "cpu" and bool((bad := ~((t >= 0) & (t <= 1))).any()):
            raise ValueError(f"t = {t[bad][0].item():g} is outside [0, 1]: 0 is data, 1 is noise")
        return NoiseLevel(t, *self.coefficients(t))

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at times ``t`` in [0, 1], float64; each schedule defines its own."""
        raise NotImplementedError

    def time(self, log_snr: Tensor | float) -> Tensor:
        """The time at which the log-SNR has this value: the inverse of ``schedule(t).log_snr``.

        ``log_snr`` is a number or a tensor of any shape, in nats; times come back in float64, in that
        shape, found by bisection to the last digits. Values that are never reached give 0 or 1.
        """
        wanted = torch.as_tensor(log_snr, dtype=torch.float64)
        low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(60):
            middle = (low + high) / 2
            cleaner = self._log_snr(middle) > wanted
            low, high = torch.where(cleaner, middle, low), torch.where(cleaner, high, middle)
        return torch.where(self._log_snr(high) >= wanted, high, low)

    def levels(self, n: int, spacing: Spacing = "uniform", rho: float = 7.0) -> list[NoiseLevel]:
        """The ``n + 1`` levels, of shape () each, of a run of ``n`` steps from noise to data.

        The last has sigma exactly 0. "The previous step" of a sampler is the next entry of this list, so
        any ``n`` >= 1 works. The first n are spaced

        * "uniform": evenly in t, from t = 1 (for ``Karras`` that is its paper's eq. 5);
        * "trailing": the same, rounded to the steps of the chain, or of one of 1000 (Lin et al. 2023, 3.3);
        * "log_snr": evenly in log(alpha²/sigma²) (Lu et al. 2022, section 4);
        * "karras": evenly in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5).

        The last two cannot reach pure noise or pure data, where the log-SNR is infinite: they run from
        sigma/alpha = 80 to 0.002, or less where the schedule ends before, and then jump to sigma = 0.

        Raises:
            ValueError: ``n`` is no whole number, smaller than 1, beyond :data:`MOST_LEVELS` or too large for
                "trailing", or the spacing unknown.
        """
        n = whole("levels: n", n, most=MOST_LEVELS)
        if spacing not in get_args(Spacing):
            known = ", ".join(get_args(Spacing))
            raise ValueError(f"unknown spacing {spacing!r}: choose one of {known}")
        ends = self(torch.tensor([1.0, 0.0], dtype=torch.float64))
        if spacing == "uniform":
            # A schedule with a trace of noise at t = 0 visits it before it goes on to sigma = 0.
            count = n if ends.sigma[1] > 0 else n + 1
            times = torch.linspace(1, 0, count, dtype=torch.float64)[:n]
        elif spacing == "trailing":
            chain = len(self.betas) if isinstance(self, Chain) else 1000
            if n > chain:
                raise ValueError(f"levels({n}): a chain of {chain} steps has no more to offer")
            times = ((1 - torch.arange(n, dtype=torch.float64) / n) * chain).round() / chain
        else:
            grid = torch.linspace(0, 1, n, dtype=torch.float64)  # n = 1: the noisy end alone
            first, last = (ends.sigma / ends.alpha).clamp(*NOISE_TO_DATA)
            if spacing == "karras":
                ratio = (first ** (1 / rho) * (1 - grid) + last ** (1 / rho) * grid) ** rho
            else:
                ratio = first ** (1 - grid) * last**grid
            times = self.time(-2 * ratio.log())
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        # All at once, and taken apart: tensors of one number each cost tens of microseconds to compute.
        parts = (part.unbind() for part in self(times))
        return [*map(NoiseLevel, *parts), NoiseLevel(zero, one, zero)]

    def to_diffusers(self, target: str, steps: int = 1000) -> Any:
        """A scheduler of the ``diffusers`` library with these noise levels, for a network of this target.

        ``Flow`` (also shifted) becomes a ``FlowMatchEulerDiscreteScheduler``, ``Karras`` an
        ``EDMEulerScheduler``; every other schedule a ``DDPMScheduler`` with a table of betas, from which
        ``DDIMScheduler.from_config(scheduler.config)`` and the like make other samplers. Its last beta is
        at most 0.999, so a schedule that ends in pure noise comes close to it only. Their steps are
        "trailing": a run of any length begins at the noisiest level, from pure noise (Lin et al. 2023, 3.3).

        Args:
            target: what the network predicts: "eps", "x0" or "v"; for ``Flow`` "flow", for ``Karras`` "edm".
            steps: length of the table, for schedules that are no chain themselves.

        Raises:
            ImportError: ``diffusers`` is not installed.
            ValueError: diffusers has no name for the target, it does not go with the schedule, or ``steps``
                is no whole number from 1 to :data:`MOST_LEVELS`.
        """
        from diffusers import DDPMScheduler  # for those who have that library

        if target not in PREDICTION_TYPES:
            known = ", ".join(PREDICTION_TYPES)
            raise ValueError(f"target {target!r} with {self}: their chains know {known}")
        middle = self(0.5)
        if abs(middle.alpha**2 + middle.sigma**2 - 1) > 1e-6:
            raise ValueError(f"{self} has no betas: alpha² + sigma² is not 1")
        steps = len(self.betas) if isinstance(self, Chain) else whole("steps", steps, most=MOST_LEVELS)
        alpha_bar = self(torch.arange(steps + 1, dtype=torch.float64) / steps).alpha ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).tolist()
        kind = PREDICTION_TYPES[target]
        return DDPMScheduler(
            steps, trained_betas=betas, prediction_type=kind, clip_sample=False,
            timestep_spacing="trailing",  # a run of few steps must begin at pure noise, too
        )  # fmt: skip

    def _log_snr(self, t: Tensor) -> Tensor:
        return NoiseLevel(t, *self.coefficients(t)).log_snr

    def config(self) -> dict[str, Any]:
        """Name and parameters, as JSON can hold them; :func:`schedule_from_config` reads them back."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


class Chain(Schedule):
    """Base of schedules made of T steps: ``alpha_i² = prod_{j<=i} (1 - beta_j)`` at time t = i/T (Ho et
    al. 2020, eq. 4). Between two steps log alpha² is interpolated, so any t in [0, 1] is allowed."""

    betas: Any  # T numbers; ``betas[i]`` is the variance added by step i + 1

    @cached_property
    def _log_alpha_bar(self) -> Tensor:
        """(T + 1,) float64, entry 0 is data. A log of a product of many factors close to 1."""
        logs = torch.log1p(-torch.as_tensor(self.betas, dtype=torch.float64)).cumsum(0)
        return torch.cat([logs.new_zeros(1), logs.clamp(min=2 * math.log(ALMOST_ZERO))])

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._log_alpha_bar.to(t)
        position = t * (len(table) - 1)
        left = position.floor().clamp(max=len(table) - 2).long()
        log_alpha_bar = torch.lerp(table[left], table[left + 1], position - left)
        return _variance_preserving(log_alpha_bar)


@dataclass(frozen=True)
class Betas(Chain):
    """A chain with any variances, for instance those of a model trained elsewhere.

    Args:
        betas: variance added by each step, in (0, 1), the last may be 1; a tuple, so that the schedule can
            be compared and written to JSON.

    Raises:
        ValueError: there are none, or one is out of range.
    """

    betas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(map(float, self.betas)))
        if not self.betas:
            raise ValueError("betas is empty: the chain needs at least 1 step")
        for i, beta in enumerate(self.betas):
            if not (0 < beta < 1 or (beta == 1 and i == len(self.betas) - 1)):
                raise ValueError(f"betas[{i}] = {beta:g} is a variance: give it in (0, 1)")


@dataclass(frozen=True)
class Linear(Chain):
    """DDPM's schedule: the noise added per step grows linearly (Ho et al. 2020, section 4).

    ``beta_i`` runs from ``beta_min`` to ``beta_max`` in ``steps`` steps; see :class:`Chain`.

    Args:
        beta_min, beta_max: variance added by the first and the last step, in (0, 1).
        steps: number of steps T. Fewer steps at the same betas leave signal at t = 1.
        zero_terminal_snr: shift and scale alpha so that it is 0 at t = 1 and as it was after the first
            step (Lin et al. 2023, algorithm 1).

    Raises:
        ValueError: a beta is outside (0, 1), or ``steps`` is no whole number, smaller than 1 (2 with
            ``zero_terminal_snr``) or beyond :data:`MOST_LEVELS`.
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    steps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        for name, beta in (("beta_min", self.beta_min), ("beta_max", self.beta_max)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} = {beta:g} is a variance: give it in (0, 1)")
        whole("steps", self.steps, 1 + self.zero_terminal_snr, MOST_LEVELS)

    @cached_property
    def betas(self) -> Tensor:
        """(steps,) float64: ``betas[i]`` is the variance added by step i + 1."""
        betas = torch.linspace(self.beta_min, self.beta_max, self.steps, dtype=torch.float64)
        if not self.zero_terminal_snr:
            return betas
        alpha = (1 - betas).cumprod(0).sqrt()
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return 1 - (alpha / torch.cat([alpha.new_ones(1), alpha[:-1]])) ** 2


@dataclass(frozen=True)
class VP(Schedule):
    """The limit of :class:`Linear` for infinitely many steps (Song et al. 2021b, eq. 32-33).

    ``d log alpha² / dt = -beta(t)`` with ``beta(t) = beta_min + t (beta_max - beta_min)``, so that
    ``log alpha² = -beta_min t - (beta_max - beta_min) t²/2``. The betas are rates per unit of time: T
    times those of a chain of T steps.

    Args:
        beta_min: rate at t = 0, >= 0.
        beta_max: rate at t = 1, > 0.

    Raises:
        ValueError: a rate is out of range.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (self.beta_min >= 0 and self.beta_max > 0):
            rates = f"beta_min = {self.beta_min:g} and beta_max = {self.beta_max:g}"
            raise ValueError(f"{rates} are rates: they must be >= 0 and > 0")

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _variance_preserving(-t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2))


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
        start, end: the ends of the stretch of the logistic curve, start < end.
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
        alpha, sigma = ((part / math.expm1(-whole)).abs() for part in (alpha, sigma))  # no -0
        return alpha.sqrt(), sigma.sqrt()


@dataclass(frozen=True)
class Karras(Schedule):
    """Variance-exploding schedule of EDM (Karras et al. 2022, eq. 5): alpha = 1, sigma grows.

    ``sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho``. At t = 0 a trace
    of noise, ``sigma_min``, is left; :meth:`~Schedule.levels` goes on to 0.

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
            ends = f"sigma_min = {self.sigma_min:g} and sigma_max = {self.sigma_max:g}"
            raise ValueError(f"{ends}: they must satisfy 0 < sigma_min < sigma_max")
        if not self.rho > 0:
            raise ValueError(f"rho = {self.rho:g} must be positive")

    def to_diffusers(self, target: str, steps: int = 1000) -> Any:
        from diffusers import EDMEulerScheduler

        _check_target(self, target, "edm")
        return EDMEulerScheduler(
            sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho, sigma_data=SIGMA_DATA,
            num_train_timesteps=steps,
        )  # fmt: skip

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = (sigma ** (1 / self.rho) for sigma in (self.sigma_min, self.sigma_max))
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho


@dataclass(frozen=True)
class Flow(Schedule):
    """Straight lines from data to noise: alpha = 1 - t, sigma = t.

    Lipman et al. 2023 (conditional optimal transport), Liu et al. 2023 (rectified flow).
    """

    def to_diffusers(self, target: str, steps: int = 1000, shift: float = 1.0) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        _check_target(self, target, "flow")
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t.clone()


@dataclass(frozen=True)
class Shifted(Schedule):
    """The path of another schedule at another pace: everywhere ``sigma/alpha`` is ``shift`` times as large.

    Neighbouring pixels of a large image tell the same, so they drown later: at equal noise a picture of
    twice the side is easier to guess. ``shift`` = side / 64 makes up for it (Hoogeboom et al. 2023,
    section 3). On ``Flow`` this is ``t -> shift t / (1 + (shift - 1) t)`` (Esser et al. 2024, eq. 23).

    Args:
        base: the schedule whose alpha and sigma are visited.
        shift: factor > 0; above 1 there is more noise at every time.

    Raises:
        ValueError: ``shift`` is not positive.
    """

    base: Schedule
    shift: float

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift = {self.shift:g} must be positive")

    def to_diffusers(self, target: str, steps: int = 1000) -> Any:
        base: Any = self
        shift = 1.0
        while isinstance(base, Shifted):
            base, shift = base.base, shift * base.shift
        if isinstance(base, Flow):
            return base.to_diffusers(target, steps, shift)
        return super().to_diffusers(target, steps)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        wanted = self.base._log_snr(t) - 2 * math.log(self.shift)
        return self.base.coefficients(self.base.time(wanted).to(t))

    def config(self) -> dict[str, Any]:
        return {"name": "Shifted", "base": self.base.config(), "shift": self.shift}


def _check_target(schedule: Schedule, target: str, only: str) -> None:
    if target != only:
        raise ValueError(f"target {target!r} with {schedule}: their scheduler means {only!r}")


def _variance_preserving(log_alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) from log alpha², with sigma = sqrt(1 - alpha²) free of cancellation."""
    return (log_alpha_bar / 2).exp(), torch.expm1(log_alpha_bar).abs().sqrt()


SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (Linear, Betas, VP, Cosine, Sigmoid, Karras, Flow, Shifted)
}


def schedule_from_config(config: dict[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.config` described.

    Raises:
        ValueError: the name is unknown.
    """
    name = config.get("name", "")
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    arguments = {key: value for key, value in config.items() if key != "name"}
    if "base" in arguments:
        arguments["base"] = schedule_from_config(arguments["base"])
    return SCHEDULES[name](**arguments)
