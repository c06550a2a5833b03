"""Samplers: from noise to data, one level at a time (chapter 5).

Every sampler here is one loop over pairs of neighbouring levels. At each pair the denoiser says which
clean sample and which noise it sees in ``x_t``; the sampler mixes the two again, with less noise::

    x_s = alpha_s * x0 + sigma_s * eps'

What differs is how the two are made. eps' is kept (DDIM), partly replaced by fresh noise (DDPM), or
averaged over the step (Heun); x0 may be extrapolated from the last guesses (DPM-Solver++, Adams). On the
straight lines of ``Flow``, DDIM is Euler's method on the velocity, and eta = 1 its ancestral form.

Samplers are generators: they yield the state after every step, and the caller shows, stores or stops::

    levels = schedule.levels(20)
    for state in ddim(model.denoise, noise((4, 3, 64, 64), levels[0]), levels):
        show(state.x0)

They run on any ``denoise(x_t, level) -> Prediction``: a network, a guided network, an exact solution.
No gradients flow through them (``torch.no_grad``); a start that asks for some is refused.
Noise comes from generators on the CPU, so a seed means the same on every device, and one generator per
sample makes a sample independent of the batch it is drawn in.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minidiff.checks import seed_number, whole
from minidiff.denoiser import Denoiser
from minidiff.device import pick_device
from minidiff.forward import TINY, NoiseLevel, posterior, posterior_std, transition
from minidiff.schedule import MOST_LEVELS, Schedule

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the whole batch, one per sample, or None for torch's global one."""
FINER = 20
"""So many times as many steps stand for the exact end when levels are fitted."""
MOST_FITTED = MOST_LEVELS // FINER
"""So many levels can be fitted at most; the search, one number a step, has long become hopeless."""


class State(NamedTuple):
    """Where a sampler stands after a step.

    Attributes:
        x: (B, ...) the sample at ``level``, float64 (float32 on MPS).
        x0: (B, ...) the clean sample the step aimed at.
        level: the level of ``x``.
    """

    x: Tensor
    x0: Tensor
    level: NoiseLevel


Sampler = Callable[..., Iterator[State]]


def generators(seed: int, n: int) -> list[torch.Generator]:
    """``n`` generators seeded seed, seed + 1, ...: sample i is the same in a batch of any size.

    Raises:
        ValueError: the seed is no whole number, negative, or seed + n is larger than 2^63.
    """
    seed = seed_number(seed, n)
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise shaped like ``x``, drawn on the CPU in float32 and moved to ``x``.

    Raises:
        ValueError: the number of generators is not the number of samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples: give one per sample")
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generator]).to(x)


def noise(
    shape: Sequence[int],
    level: NoiseLevel,
    *,
    generator: Generators = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where sampling starts: N(0, sigma² I) at the first level.

    Args:
        shape: (B, ...).
        level: the first level of the run; its alpha should be close to 0 (or its sigma large), else
            real data at this level would still show through and the start is wrong.
        generator: see :data:`Generators`; ``generators(seed, B)`` for reproducible samples.
        device: where the samples are made.

    Returns:
        (B, ...) float64 (float32 on MPS).

    Warns:
        UserWarning: alpha is more than a tenth of sigma at this level.
    """
    if level.alpha > 0.1 * level.sigma:
        warnings.warn(
            f"alpha = {level.alpha:.2g} at the first level, t = {level.t:g}: samples there still hold data, "
            "so pure noise is a wrong start; use a schedule that ends in noise",
            stacklevel=2,
        )
    device = pick_device(device)
    kind = torch.float32 if device.type == "mps" else torch.float64
    return level.sigma.item() * randn_like(torch.empty(*shape, dtype=kind, device=device), generator)


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[State]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12): first order.

    Args:
        denoise: ``(x_t, level) -> Prediction``.
        x: (B, ...) a sample at ``levels[0]``, usually from :func:`noise`.
        levels: n + 1 levels of falling noise, shape () each.
        eta: share of fresh noise: 0 is deterministic, 1 is DDPM.
        generator: for the fresh noise.

    Yields:
        n states.

    Raises:
        ValueError: a model in place of ``model.denoise``, a start that requires gradients, fewer than 2
            levels, levels that do not fall, or eta outside [0, 1].
    """
    x, steps = _start(denoise, x, levels, eta)
    for level_t, level_s in steps:
        x0, eps = denoise(x, level_t)  # (B, ...) each
        x = _mix(x0, eps, level_t, level_s, eta, generator)
        yield State(x, x0, level_s)


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    variance: Literal["posterior", "transition"] = "posterior",
    generator: Generators = None,
) -> Iterator[State]:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    Each step draws from ``q(x_s | x_t, x0)`` with the denoiser's x0 in place of the true one. Of the two
    variances of the paper (section 3.2), "posterior" is the smaller "beta tilde", the right one if all
    data were one point; it makes this DDIM with eta = 1. "transition" is the larger beta, that of
    ``q(x_t | x_s)``, the right one if data were N(0, I). The last step, to sigma = 0, adds no noise.

    Args:
        denoise: ``(x_t, level) -> Prediction``.
        x: (B, ...) a sample at ``levels[0]``.
        levels: n + 1 levels of falling noise.
        variance: see above; the more steps, the less it matters.
        generator: for the fresh noise.

    Yields:
        n states.

    Raises:
        ValueError: as for :func:`ddim`, or the variance is unknown.
    """
    if variance not in ("posterior", "transition"):
        raise ValueError(f"unknown variance {variance!r}: choose 'posterior' or 'transition'")
    x, steps = _start(denoise, x, levels)
    for level_t, level_s in steps:
        x0, _ = denoise(x, level_t)  # (B, ...)
        mean, std = posterior(x, x0, level_t, level_s)
        if variance == "transition":
            std = transition(x, level_s, level_t).std
        x = mean
        if level_s.sigma > 0:
            x = x + std * randn_like(x, generator)
        yield State(x, x0, level_s)


@torch.no_grad()
def heun(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel]) -> Iterator[State]:
    """Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1): second order.

    In the scaled variable x/alpha the ODE reads d(x/alpha) = eps d(sigma/alpha): a step takes eps at
    both of its ends and goes on with their mean. That costs two calls of ``denoise`` a step, except
    where an end has no slope: the last step to sigma = 0, and a first step from alpha = 0, are DDIM's.

    Arguments and states as in :func:`ddim`; nothing here is random.
    """
    x, steps = _start(denoise, x, levels)
    for level_t, level_s in steps:
        x0, eps = denoise(x, level_t)  # (B, ...) each
        ahead = level_s.alpha * x0 + level_s.sigma * eps
        if level_s.sigma > 0 and level_t.alpha > TINY:
            eps = (eps + denoise(ahead, level_s).eps) / 2
            x0 = (x - level_t.sigma * eps) / level_t.alpha
            ahead = level_s.alpha * x0 + level_s.sigma * eps
        x = ahead
        yield State(x, x0, level_s)


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    *,
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order at one call a step.

    Seen over lambda = log(alpha/sigma), the denoiser's x0 changes almost along a line, so the last two
    guesses tell where it will be in the middle of the coming step. The first step has no past and the
    last, to sigma = 0, no finite length in lambda: both are DDIM's. With eta = 1 it is the paper's
    SDE-DPM-Solver++(2M).

    Arguments and states as in :func:`ddim`.
    """
    x, steps = _start(denoise, x, levels, eta)
    old_x0, old_h = None, torch.inf
    for level_t, level_s in steps:
        x0, _ = denoise(x, level_t)  # (B, ...)
        h = float(level_s.log_snr - level_t.log_snr) / 2  # length of the step in lambda
        ahead = x0
        if old_x0 is not None and h < torch.inf and old_h < torch.inf:
            ahead = x0 + h / (2 * old_h) * (x0 - old_x0)
        eps = (x - level_t.alpha * ahead) / level_t.sigma
        x = _mix(ahead, eps, level_t, level_s, eta, generator)
        old_x0, old_h = x0, h
        yield State(x, ahead, level_s)


@torch.no_grad()
def adams(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], *, order: int = 3) -> Iterator[State]:
    """Adams' predictor and corrector in alpha: third order at one call a step.

    On the probability-flow ODE d(x/sigma) = x0 d(alpha/sigma) (Lu et al. 2022b, proposition 4.1), so a step
    needs the mean of x0 over alpha/sigma. As in DEIS (Zhang & Chen 2023) it is that of a polynomial through
    the last guesses. A new guess first makes the step that led to it again, now that both of its ends are
    known, and then the next one: the corrector of UniPC (Zhao et al. 2023, algorithm 1), which costs no call.

    Theirs are polynomials in lambda or t; here the variable is alpha / sqrt(alpha² + sigma²). Near pure noise
    x0 is smooth in alpha, and near clean data in sigma², hence in alpha again. So the first step from
    alpha = 0 and the last to sigma = 0, where lambda is infinite, are steps like any other.

    Arguments and states as in :func:`ddim`; nothing here is random. ``order``, 2 or 3, is how many guesses
    are joined, once there are as many; ``state.x`` is not yet corrected.

    Raises:
        ValueError: as for :func:`ddim`, or the order is not 2 or 3.
    """
    if order not in (2, 3):
        raise ValueError(f"order = {order}: choose 2 or 3")
    x, steps = _start(denoise, x, levels)
    guesses: list[tuple[float, Tensor]] = []
    before = None  # where the last step began
    for level_t, level_s in steps:
        alpha = math.cos(_angle(level_t))
        # Two guesses at the same alpha, to half the digits, would make a slope of rounding errors.
        guesses = [guess for guess in guesses if guess[0] < alpha - 1e-7][: order - 1]
        guesses.insert(0, (alpha, denoise(x, level_t).x0))  # (B, ...)
        if before is not None:
            x = _adams_step(*before, level_t, guesses).x
        before = x, level_t
        state = _adams_step(x, level_t, level_s, guesses)
        x = state.x
        yield state


def sample(states: Iterable[State]) -> Tensor:
    """Run a sampler to its end and return the last sample, (B, ...).

    Raises:
        ValueError: there were no states.
    """
    last = None
    for last in states:
        pass
    if last is None:
        raise ValueError("the sampler made no step")
    return last.x


SAMPLERS: dict[str, Sampler] = {f.__name__: f for f in (ddpm, ddim, heun, dpmpp_2m, adams)}


@torch.no_grad()
def fit_levels(
    denoise: Denoiser,
    x: Tensor,
    schedule: Schedule,
    n: int,
    *,
    sampler: Sampler = adams,
    evaluations: int = 600,
) -> list[NoiseLevel]:
    """The ``n + 1`` levels at which a sampler's own error is least, for this denoiser.

    How fast x0 changes along the way depends on the data, so no fixed spacing suits all (Sabour et al. 2024,
    "Align Your Steps"). As Tong et al. 2025 do (LD3), the times are moved until few steps end where many
    end, from the same noise; here by Powell's method, which needs no gradient. The fitted levels serve any
    other noise, and any sampler that is like the one they were fitted for.

    Args:
        denoise: ``(x_t, level) -> Prediction``, guided if it will be.
        x: (B, ...) samples at the first level, to fit on: some hundred points, or a dozen pictures.
        schedule: where the levels come from; its uniform spacing is the start.
        n: steps of a run, 1 to :data:`MOST_FITTED`.
        sampler: takes ``(denoise, x, levels)``, and is not random.
        evaluations: runs of ``n`` steps that the search may take, about.

    Returns:
        Levels from ``schedule.levels(n)[0]`` to sigma = 0; of all that were tried, those that ended nearest.

    Raises:
        ValueError: ``n`` is no whole number from 1 to :data:`MOST_FITTED`, ``evaluations`` is smaller than 1,
            or the sampler refuses ``x`` or ``denoise``.
    """
    from scipy.optimize import (
        minimize,
    )  # here: few ask for it, and importing the library stays as light as torch

    n = whole("n", n, most=MOST_FITTED)
    if evaluations < 1:
        raise ValueError(f"evaluations = {evaluations}: the search needs at least 1 run")
    start = schedule.levels(n)
    end = sample(adams(denoise, x, schedule.levels(max(FINER * n, 100))))
    best = (math.inf, start)

    def error(logits: np.ndarray) -> float:
        nonlocal best
        shares = np.exp(logits - logits.max()) + 1e-6  # no step vanishes
        times = start[0].t.item() * (1 - np.cumsum(shares / shares.sum())[:-1])
        levels = [start[0], *(schedule(t) for t in times.tolist()), start[-1]]
        far = (sample(sampler(denoise, x, levels)) - end).flatten(1).norm(dim=1).mean().item()
        best = min(best, (far, levels), key=lambda pair: pair[0])
        return far

    error(np.zeros(n))
    if n > 1:
        minimize(error, np.zeros(n), method="Powell", options={"maxfev": evaluations})
    return best[1]


def _mix(
    x0: Tensor, eps: Tensor, level_t: NoiseLevel, level_s: NoiseLevel, eta: float, generator: Generators
) -> Tensor:
    """``alpha_s x0 + sigma_s eps'``, eta deciding how much of eps' is fresh (Song et al. 2021, eq. 12)."""
    noise_std = eta * posterior_std(level_t, level_s)  # eq. 16
    kept = (level_s.sigma**2 - noise_std**2).clamp(min=0).sqrt()  # noise that stays as it was
    x = level_s.alpha * x0 + kept * eps
    if noise_std > 0:  # not at eta = 0, and not at the last step
        x = x + noise_std * randn_like(x, generator)
    return x


def _adams_step(
    x: Tensor, level_t: NoiseLevel, level_s: NoiseLevel, guesses: Sequence[tuple[float, Tensor]]
) -> State:
    """A step with the mean of the polynomial through the guesses, each an alpha and an x0.

    With alpha = cos(a) and sigma = sin(a), d(alpha/sigma) = -da / sin²(a). The integrals of 1, alpha and
    alpha² are cot(a), 1/sin(a) and cot(a) + a: times sigma_s they are finite down to sigma_s = 0.
    """
    t, s = _angle(level_t), _angle(level_s)
    one = math.sin(t - s) / math.sin(t)  # sin(s) (cot(s) - cot(t))
    integrals = [one, 1 - math.sin(s) / math.sin(t), one - math.sin(s) * (t - s)]
    powers = np.vander([alpha for alpha, _ in guesses], increasing=True).T
    # Weights that give every power its true mean, and so every polynomial through the guesses.
    weights = np.linalg.solve(powers, np.divide(integrals[: len(guesses)], one)).tolist()
    x0 = weights[0] * guesses[0][1]
    for weight, (_, guess) in zip(weights[1:], guesses[1:], strict=True):
        x0 = x0.add(guess, alpha=weight)
    # alpha_s x0 + sigma_s eps with eps = (x - alpha_t x0)/sigma_t, collected: two passes over x, not five.
    kept = (level_s.sigma / level_t.sigma).item()
    return State((kept * x).add(x0, alpha=level_s.alpha.item() - kept * level_t.alpha.item()), x0, level_s)


def _angle(level: NoiseLevel) -> float:
    """Between clean data, 0, and pure noise, pi/2, at any scale: alpha = cos and sigma = sin."""
    return math.atan2(level.sigma, level.alpha)


def _start(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], eta: float = 0.0
) -> tuple[Tensor, Iterator[tuple[NoiseLevel, NoiseLevel]]]:
    """``x`` in the precision of the sampler, and the checked steps (from, to)."""
    if isinstance(denoise, nn.Module) and hasattr(denoise, "denoise"):
        # A model's own output is one tensor: a batch of two would pass for x0 and eps.
        raise ValueError(
            f"a sampler takes a function, not a {type(denoise).__name__}: give model.denoise, "
            "or guide(model.denoise, condition)"
        )
    if x.requires_grad:
        raise ValueError(
            "x requires gradients, and a sampler keeps none: give x.detach(), or call denoise step by step"
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta:g} is outside [0, 1]: 0 is deterministic, 1 is DDPM")
    if len(levels) < 2:
        raise ValueError(f"{len(levels)} levels make no step: schedule.levels(n) gives n + 1")
    device = torch.device("cpu") if x.device.type != "mps" else x.device
    numbers = [NoiseLevel(*(value.to(device) for value in level)) for level in levels]
    for level_t, level_s in pairwise(numbers):
        if not level_s.sigma * level_t.alpha < level_t.sigma * level_s.alpha:
            raise ValueError(
                f"noise must fall from level to level, but sigma/alpha does not from "
                f"t = {level_t.t:g} to t = {level_s.t:g}: give schedule.levels(n) as it is"
            )
    # Numbers on the CPU multiply tensors on any device without a copy or a wait.
    return x.to(x.dtype if x.device.type == "mps" else torch.float64), pairwise(numbers)
