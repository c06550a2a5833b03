"""Exported schedules sample what they should: runs of ``diffusers``, of any length, with exact networks.

The data are N(1, 0.5²). Then every deterministic step is an affine map, and the mean and the spread of the
samples are known for each run, however short: the mean is that of the data, the spread what the steps leave.
"""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers import DPMSolverMultistepScheduler as DPMSolver
from helpers import gaussian

import minidiff as md

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MEAN, STD, COUNT = 1.0, 0.5, 20_000


class Exact(md.Diffusion):
    """The perfect model of N(1, 0.5²), whatever its schedule and target."""

    def __init__(self, schedule: md.Schedule, target: str):
        super().__init__(torch.nn.Linear(1, 1), schedule, target, shape=(1, 1, 1))  # type: ignore[arg-type]

    def forward(self, x_t, level, condition=None):
        if self.target == "edm":  # the adapter has undone their scaling of the input
            x0 = gaussian(MEAN, STD)(x_t, level).x0
            return md.to_target(x0, (x_t - x0) / level.sigma, level, "edm")
        return md.to_target(*gaussian(MEAN, STD)(x_t, level), level, self.target)


def run(unet, scheduler, n: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the samples of a run of n steps."""
    random = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(n)
    x = torch.randn(COUNT, 1, 1, 1, generator=random) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = unet(scheduler.scale_model_input(x, t), t).sample
        extra = {"generator": random} if isinstance(scheduler, DDPMScheduler) else {}
        x = scheduler.step(out, t, x, **extra).prev_sample
    return x.double().mean().item(), x.double().std().item()


def spread(levels: list[md.NoiseLevel]) -> float:
    """The standard deviation that Euler's (DDIM's) steps along these levels leave, in closed form."""
    std = 1.0 * levels[0].sigma.item()
    denoise = gaussian(MEAN, STD)
    for level, after in itertools.pairwise(levels):
        ends = [denoise(torch.tensor(x, dtype=torch.float64), level) for x in (0.0, 1.0)]
        low, high = (after.alpha * x0 + after.sigma * eps for x0, eps in ends)
        std *= abs(high - low).item()
    return std


def check(found: tuple[float, float], std: float) -> None:
    """Within five standard errors, and rounding."""
    assert found[0] == pytest.approx(MEAN, abs=5 * max(std, 0.01) / math.sqrt(COUNT) + 2e-3)
    assert found[1] == pytest.approx(std, abs=5 * std / math.sqrt(2 * COUNT) + 2e-3)


CHAINS = {"cosine": md.Cosine(), "zero snr": md.Linear(zero_terminal_snr=True), "sigmoid": md.Sigmoid()}


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize("target", ["v", "x0"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_samples_with_ddim(name, target, n):
    unet, scheduler = Exact(CHAINS[name], target).to_diffusers()
    zero = CHAINS[name](torch.tensor(0.0, dtype=torch.float64))
    levels = [*CHAINS[name].levels(n, "trailing")[:-1], zero]
    check(run(unet, DDIMScheduler.from_config(scheduler.config), n), spread(levels))


@pytest.mark.parametrize("n", [1, 4, 20])
def test_a_chain_samples_as_it_comes(n):
    """Ancestral: the noise that each step adds is the posterior's."""
    unet, scheduler = Exact(md.Cosine(), "v").to_diffusers()
    levels = md.Cosine().levels(n, "trailing")
    variance = 1.0
    for level, after in itertools.pairwise(levels):
        ends = [gaussian(MEAN, STD)(torch.tensor(x, dtype=torch.float64), level).x0 for x in (0.0, 1.0)]
        moves = [
            md.posterior(torch.tensor(x, dtype=torch.float64), x0, level, after)
            for x, x0 in zip((0.0, 1.0), ends, strict=True)
        ]
        slope = (moves[1].mean - moves[0].mean).item()
        variance = slope**2 * variance + moves[0].std.item() ** 2
    check(run(unet, scheduler, n), math.sqrt(variance))


@pytest.mark.parametrize("kind", [DPMSolver, EulerDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("n", [4, 20])
def test_other_samplers_made_of_it_keep_the_mean(kind, n):
    unet, scheduler = Exact(md.Cosine(), "v").to_diffusers()
    mean, std = run(unet, kind.from_config(scheduler.config), n)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.2 if n == 4 else 0.05)


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_samples(shift, n):
    schedule = md.Flow() if shift == 1 else md.Shifted(md.Flow(), shift)
    unet, scheduler = Exact(schedule, "flow").to_diffusers()
    found = run_flow(unet, scheduler, n)
    sigmas = scheduler.sigmas.double()
    levels = [md.NoiseLevel(s, 1 - s, s) for s in sigmas]
    check(found, spread(levels))


def run_flow(unet, scheduler, n: int) -> tuple[float, float]:
    scheduler.set_timesteps(n)
    x = torch.randn(COUNT, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    return x.double().mean().item(), x.double().std().item()


@pytest.mark.parametrize("n", [1, 4, 20])
def test_edm_samples(n):
    unet, scheduler = Exact(md.Karras(), "edm").to_diffusers()
    found = run(unet, scheduler, n)
    levels = [md.NoiseLevel(s, torch.ones_like(s), s) for s in scheduler.sigmas.double()]
    check(found, spread(levels))
