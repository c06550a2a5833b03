"""Samplers: from noise to data, one level at a time (chapter 5).

Every sampler here is one loop over pairs of neighbouring levels. At each pair the denoiser says which
clean sample and which noise it sees in ``x_t``; the sampler mixes the two again, with less noise::

    x_s = alpha_s * x0 + sigma_s * eps'

What differs is how the two are made. eps' is kept (DDIM), partly replaced by fresh noise (DDPM), or
averaged over the step (Heun); x0 may be extrapolated from the last two guesses (DPM-Solver++), and the
step made again when the next one is known (UniPC). On the straight lines of ``Flow``, DDIM is Euler's
method on the velocity, and eta = 1 its ancestral form.

Samplers are generators: they yield the state after every step, and the caller shows, stores or stops::

    levels = schedule.levels(20)
    for state in ddim(model.denoise, noise((4, 3, 64, 64), levels[0]), levels):
        show(state.x0)

They run on any ``denoise(x_t, level) -> Prediction``: a network, a guided network, an exact solution.
Noise comes from generators on the CPU, so a seed means the same on every device, and one generator per
sample makes a sample independent of the batch it is drawn in.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.denoiser import Denoiser
from minidiff.forward import TINY, NoiseLevel, posterior, posterior_std, transition

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the whole batch, one per sample, or None for torch's global one."""


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
    """``n`` generators seeded seed, seed + 1, ...: sample i is the same in a batch of any size."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def randn_like(x: Tensor, generator: Generators = None) -> Tensor:
    """Standard normal noise shaped like ``x``, drawn on the CPU in float32 and moved to ``x``.

    Raises:
        ValueError: the number of generators is not the number of samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(x.shape, generator=generator).to(x)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples: give one per sample")
    return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generator]).to(x)


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
    kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
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
        ValueError: a model in place of ``model.denoise``, fewer than 2 levels, levels that do not fall, or
            eta outside [0, 1].
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
def unipc(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel]) -> Iterator[State]:
    """UniPC-2 (Zhao et al. 2023, algorithms 1 and 2): third order at one call a step.

    Every step but the last is made twice. First x0 is extrapolated from the last two guesses, as in
    :func:`dpmpp_2m`. The denoiser is asked where that leads, and with its answer the step is made again, by
    the parabola through all three; the next step begins there, and nothing is asked twice. Over
    lambda = log(alpha/sigma) the integral of the polynomial is exact (the paper's B(h) stands in for it).

    Arguments and states as in :func:`ddim`; ``state.x`` is that of the first time.
    """
    x, steps = _start(denoise, x, levels)
    guesses: list[tuple[NoiseLevel, Tensor]] = []  # newest first
    before = x
    for level_t, level_s in steps:
        guesses = [(level_t, denoise(x, level_t).x0), *guesses[:2]]
        if len(guesses) > 1:
            level_r = guesses[1][0]  # where the last step began
            ahead = _mean_x0(guesses, level_r, level_t)
            x = level_t.alpha * ahead + level_t.sigma * (before - level_r.alpha * ahead) / level_r.sigma
        before, ahead = x, _mean_x0(guesses[:2], level_t, level_s)
        x = level_s.alpha * ahead + level_s.sigma * (x - level_t.alpha * ahead) / level_t.sigma
        yield State(x, ahead, level_s)


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


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp_2m": dpmpp_2m, "unipc": unipc,
}  # fmt: skip


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


def _mean_x0(
    guesses: Sequence[tuple[NoiseLevel, Tensor]], level_t: NoiseLevel, level_s: NoiseLevel
) -> Tensor:
    """The x0 which, kept for the whole step from t to s, leads where the polynomial through guesses does.

    With u = lambda - lambda_t the ODE's answer is ``x_s = sigma_s/sigma_t x_t + alpha_s I[x0]``, where
    I[f] is the integral of exp(u - h) f(u) from 0 to h (Lu et al. 2022b, proposition 4.1): so this is
    I[polynomial]/I[1]. A step from alpha = 0 has no end in lambda; over alpha/sigma it is a plain mean, and
    the trapezoidal rule serves. One to sigma = 0 knows no better than the newest guess.
    """
    if level_s.sigma == 0:
        return guesses[0][1]
    if level_t.alpha < TINY:
        return torch.stack([x0 for _, x0 in guesses]).mean(0)
    h = float(level_s.log_snr - level_t.log_snr) / 2
    near = [(float(level.log_snr - level_t.log_snr) / 2, x0) for level, x0 in guesses if level.alpha >= TINY]
    moments = [-math.expm1(-h)]  # I[u^k]
    for k in range(1, len(near)):
        moments.append(h**k - k * moments[-1])
    powers = torch.tensor([[u**k for u, _ in near] for k in range(len(near))], dtype=torch.float64)
    weights = torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64) / moments[0]).tolist()
    return torch.stack([weight * x0 for weight, (_, x0) in zip(weights, near, strict=True)]).sum(0)


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
