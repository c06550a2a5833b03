"""The samplers on denoisers that are exact: what is wrong here is the sampler's own error."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from minidiff.denoiser import Denoiser
from minidiff.exact import FiniteData, GaussianMixture
from minidiff.forward import NoiseLevel, Prediction, posterior, posterior_std
from minidiff.metrics import energy_test
from minidiff.sampling import State, adams, ddim, ddpm, dpmpp_2m, heun, noise, sample
from minidiff.schedule import Cosine, Flow, Karras, Linear, Schedule, Sigmoid

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([[-0.6, 0.5], [1.6, 0.9], [0.7, -1.2]]),
    torch.tensor([[0.25, 0.5], [0.4, 0.25], [0.3, 0.3]]),
    torch.tensor([0.5, 0.2, 0.3]),
)
SCHEDULES = [Linear(), Cosine(), Sigmoid(), Karras(), Flow()]
SAMPLERS = [ddpm, ddim, heun, dpmpp_2m, adams]


@cache
def mixture(dim: int) -> GaussianMixture:
    """Three Gaussians in ``dim`` dimensions, of different widths and weights."""
    if dim == 2:
        return MIXTURE
    generator = torch.Generator().manual_seed(dim)
    means = torch.randn(3, dim, generator=generator, dtype=F64) / dim**0.5
    stds = 0.3 + 0.4 * torch.rand(3, dim, generator=generator, dtype=F64)
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.2, 0.3]))


def draw(
    sampler: Callable[..., Iterator[State]], schedule: Schedule, steps: int, n: int, dim: int = 2
) -> Tensor:
    levels = schedule.levels(steps)
    generator = torch.Generator().manual_seed(0)
    x = noise((n, dim), levels[0], generator=generator)
    extra = {"generator": generator} if sampler not in (heun, dpmpp_2m, adams) else {}
    return sample(sampler(mixture(dim).denoise, x, levels, **extra))


def complaints(x: Tensor) -> dict[str, float]:
    """What tells ``x`` from samples of the mixture, in standard errors, each over what is allowed.

    Mean, covariance and fourth moments have closed forms; the log-density (at sigma = 0) sees noise
    left on narrow components, and the energy test all the rest.
    """
    oracle = mixture(x.shape[1])
    mu, s = oracle.means, oracle.stds
    away, clean = x - oracle.mean, Cosine()(0.0)
    fresh = oracle.sample(50_000, torch.Generator().manual_seed(1)).double()
    claims = {
        "mean": (x, oracle.mean),
        "covariance": ((away[:, :, None] * away[:, None]).flatten(1), oracle.covariance.flatten()),
        "fourth": (x**4, oracle.weights @ (mu**4 + 6 * mu**2 * s**2 + 3 * s**4)),
        "density": (oracle.log_density(x, clean)[:, None], oracle.log_density(fresh, clean).mean()),
    }
    found = {
        name: ((values.mean(0) - truth).abs() / (values.std(0) / math.sqrt(len(x)))).max().item()
        for name, (values, truth) in claims.items()
    }
    p = energy_test(x[:800], fresh[:800], 199, torch.Generator().manual_seed(2))
    found = {name: z for name, z in found.items() if z > 5}
    return found | ({"energy": p} if p < 0.01 else {})


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_come_from_the_mixture(sampler: Callable[..., Iterator[State]], schedule: Schedule) -> None:
    steps = {ddpm: 300, ddim: 150, heun: 60, dpmpp_2m: 60, adams: 60}[sampler]
    assert not complaints(draw(sampler, schedule, steps, 2000))


@pytest.mark.parametrize("dim", [1, 64])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_come_from_the_mixture_in_other_dimensions(
    sampler: Callable[..., Iterator[State]], dim: int
) -> None:
    steps = {ddpm: 1000, ddim: 150, heun: 60, dpmpp_2m: 60, adams: 60}[sampler]
    assert not complaints(draw(sampler, Cosine(), steps, 2000, dim))


def double_noise(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], generator: torch.Generator
) -> Iterator[State]:
    """Wrong: fresh noise on top of all the old."""
    for level, target in pairwise(levels):
        x0, eps = denoise(x, level)
        fresh = posterior_std(level, target) * torch.randn(x.shape, generator=generator)
        x = target.alpha * x0 + target.sigma * eps + fresh
        yield State(x, x0, target)


def variance_as_std(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], generator: torch.Generator
) -> Iterator[State]:
    """Wrong: the posterior's variance in the place of its standard deviation."""
    for level, target in pairwise(levels):
        x0, _ = denoise(x, level)
        mean, std = posterior(x, x0, level, target)
        x = mean + std**2 * torch.randn(x.shape, generator=generator)
        yield State(x, x0, target)


def noise_at_the_end(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], generator: torch.Generator
) -> Iterator[State]:
    """Wrong: a step's noise is added after the last step, too."""
    *states, last = ddpm(denoise, x, levels, generator=generator)
    std = 0.2 * torch.randn(x.shape, generator=generator)
    yield from [*states, last._replace(x=last.x + std)]


def start_from_unit_noise(
    denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], generator: torch.Generator
) -> Iterator[State]:
    """Wrong: N(0, I) where half of the data should still show (a schedule cut off at t = 0.5)."""
    return ddim(denoise, x, [level for level in levels if level.t <= 0.5])


@pytest.mark.parametrize("wrong", [double_noise, variance_as_std, noise_at_the_end, start_from_unit_noise])
def test_the_test_sees_a_wrong_sampler(wrong: Callable[..., Iterator[State]]) -> None:
    assert complaints(draw(wrong, Cosine(), 100, 2000))


# --- convergence --------------------------------------------------------------------------------


def at_log_snr(half: Tensor) -> NoiseLevel:
    """The variance-preserving level with log(alpha/sigma) = ``half``; t is only a label."""
    return NoiseLevel(torch.sigmoid(-half), torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt())


ORDERS = [(ddim, 0.85, 1.15), (heun, 1.75, 2.25), (dpmpp_2m, 1.7, 2.3), (adams, 2.5, 3.3)]


@cache
def flow_line(dim: int) -> tuple[GaussianMixture, Tensor, Tensor]:
    """A mixture in ``dim`` dimensions, and where the probability-flow ODE takes some points from
    lambda = -2 to lambda = 2.

    In lambda = log(alpha/sigma), with alpha² + sigma² = 1, the ODE of Song et al. 2021 (eq. 13) is
    dx/dlambda = sigma² (x + score); scipy solves it, from the score and not from eps.
    """
    oracle = mixture(dim)
    start = torch.randn(40, dim, dtype=F64, generator=torch.Generator().manual_seed(0))

    def slope(half: float, x: Tensor) -> Tensor:
        level = at_log_snr(torch.tensor(half, dtype=F64))
        x = torch.as_tensor(x, dtype=F64).reshape(-1, dim)
        return (level.sigma**2 * (x + oracle.score(x, level))).flatten()

    end = solve_ivp(slope, (-2, 2), start.flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-11).y
    return oracle, start, torch.from_numpy(end[:, -1]).reshape(-1, dim)


@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("sampler, low, high", ORDERS)
def test_order_of_convergence(
    sampler: Callable[..., Iterator[State]], low: float, high: float, dim: int
) -> None:
    """The error falls like steps^-order: a line through logarithms, fitted from 64 to 512 steps."""
    oracle, start, end = flow_line(dim)
    counts = (64, 128, 256, 512)
    errors = []
    for steps in counts:
        halves = torch.linspace(-2, 2, steps + 1, dtype=F64)
        x = sample(sampler(oracle.denoise, start, [at_log_snr(half) for half in halves]))
        errors.append((x - end).norm(dim=1).mean().item())
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert low < order < high, f"order {order}, errors {errors}"


# --- single steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_a_ddpm_step_is_the_posterior(schedule: Schedule) -> None:
    level, target = schedule(0.6), schedule(0.35)
    x = 1.5 * torch.randn(6, 2, dtype=F64)
    (state,) = ddpm(MIXTURE.denoise, x, [level, target], generator=torch.Generator().manual_seed(3))
    mean, std = posterior(x, MIXTURE.denoise(x, level).x0, level, target)
    drawn = torch.randn(6, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(state.x, mean + std * drawn)


def test_the_flow_carries_the_density() -> None:
    """dp/dr + div(p eps) = 0 in y = x/alpha, r = sigma/alpha: with the guess of eps, and not with another."""
    y = (2 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=F64)).requires_grad_()
    r = torch.linspace(0.2, 3, 200, dtype=F64).requires_grad_()
    level = NoiseLevel(torch.zeros_like(r), torch.ones_like(r), r)
    density = MIXTURE.log_density(y, level).exp()  # (200,)
    (growth,) = torch.autograd.grad(density.sum(), r, retain_graph=True)

    def divergence(flow: Tensor) -> Tensor:
        parts = [torch.autograd.grad(flow[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(2)]
        return torch.stack(parts).sum(0)

    eps = MIXTURE.denoise(y, level).eps
    assert growth.abs().max() > 0.1
    torch.testing.assert_close(growth, -divergence(density[:, None] * eps), rtol=1e-9, atol=1e-12)
    assert (growth + divergence(1.1 * density[:, None] * eps)).abs().max() > 0.01


def test_dpmpp_aims_at_the_middle_of_uneven_steps() -> None:
    """Where x0 moves along a line in lambda, the guess for the middle of a step is exact.

    The order of convergence cannot see the two step lengths exchanged: that error telescopes away.
    """

    def denoise(x_t: Tensor, level: NoiseLevel) -> Prediction:
        x0 = level.log_snr / 2 * torch.ones_like(x_t)
        return Prediction(x0, (x_t - level.alpha * x0) / level.sigma)

    halves = torch.tensor([-2.0, -1.2, 0.1, 0.3, 1.7], dtype=F64)
    levels = [at_log_snr(half) for half in halves]
    states = list(dpmpp_2m(denoise, torch.randn(2, 3), levels))
    middles = (halves[1:] + halves[:-1]) / 2
    for state, middle in zip(states[1:], middles[1:], strict=True):
        torch.testing.assert_close(state.x0, middle.expand(2, 3))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_finite_data_comes_back_whole(
    schedule: Schedule, steps: int, sampler: Callable[..., Iterator[State]]
) -> None:
    """With the exact denoiser of a training set every sample ends on a training image.

    From one step on it is finite; with 30 steps the last level before the end is clean enough that
    the nearest image is certain, and no noise may be left on it.
    """
    data = FiniteData(torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(5)))
    levels = schedule.levels(steps)
    x = noise((5, 3, 4, 4), levels[0], generator=torch.Generator().manual_seed(6))
    states = list(sampler(data.denoise, x, levels))
    assert len(states) == steps
    assert states[-1].level.sigma == 0
    assert states[-1].x.isfinite().all()
    if steps == 30:
        distance = torch.cdist(states[-1].x.flatten(1), data.means).min(1).values
        assert distance.max() < 1e-3, f"{distance.max():.2g} away from the nearest training image"
