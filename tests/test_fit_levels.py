"""Levels fitted to a denoiser: where the best are known, and that they serve other noise."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import minidiff as md
from minidiff.data import points
from minidiff.exact import GaussianMixture

COSINE = md.Cosine()


def noise_of(oracle, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *oracle.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("std", [0.1, 0.3, 2.0])
def test_two_steps_on_a_gaussian_meet_where_the_error_is_least(std):
    """DDIM multiplies by a number known in closed form, and the flow by std: one time is to be found."""
    oracle = GaussianMixture(torch.zeros(1, 1), torch.tensor(std))

    def factor(t):
        """Of DDIM from t = 1 over t to 0, where x0 = k x and k = alpha std^2 / (alpha^2 std^2 + sigma^2)."""
        _, alpha, sigma = COSINE(t)
        k = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return float(sigma * k)  # at t = 1 x0 is 0, so the first step leaves sigma x

    grid = np.linspace(0.001, 0.999, 999)
    best = min(grid, key=lambda t: abs(factor(t) - std))
    x = noise_of(oracle, 64, 0)
    levels = md.fit_levels(oracle.denoise, x, COSINE, 2, sampler=md.ddim)
    assert len(levels) == 3
    assert abs(factor(levels[1].t) - std) <= abs(factor(best) - std) + 1e-3
    # And what a run does there is what the formula says.
    end = md.sample(md.ddim(oracle.denoise, x, levels))
    torch.testing.assert_close(end, factor(levels[1].t) * x, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [md.adams, md.dpmpp_2m])
@pytest.mark.parametrize("name", ["ring", "scattered"])
def test_on_other_noise_the_error_falls_by_a_third_and_more(name, sampler):
    means = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = points.ring_of_gaussians() if name == "ring" else GaussianMixture(means, 0.25)
    fit_on = noise_of(oracle, 100, 0)
    levels = md.fit_levels(oracle.denoise, fit_on, COSINE, 10, sampler=sampler, evaluations=250)
    other = noise_of(oracle, 400, 1)
    end = md.sample(md.heun(oracle.denoise, other, COSINE.levels(400)))

    def error(at):
        return (md.sample(sampler(oracle.denoise, other, at)) - end).norm(dim=1).mean()

    assert error(levels) < 2 / 3 * error(COSINE.levels(10))


@pytest.mark.parametrize("schedule", [COSINE, md.Linear(), md.Karras(), md.Flow()])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_they_are_levels_of_the_schedule_from_its_top_to_clean_data(schedule, n):
    oracle = points.ring_of_gaussians()
    start = schedule.levels(n)
    x = start[0].sigma * noise_of(oracle, 16, 0)
    levels = md.fit_levels(oracle.denoise, x, schedule, n, sampler=md.ddim, evaluations=20)
    assert len(levels) == n + 1
    assert levels[0] == start[0]
    assert (levels[-1].alpha, levels[-1].sigma) == (1, 0)
    for level in levels[:-1]:
        assert level == schedule(level.t)
    assert all(a.t > b.t for a, b in pairwise(levels[:-1]))


def test_never_worse_than_where_the_search_begins():
    oracle = points.ring_of_gaussians()
    x = noise_of(oracle, 50, 0)
    levels = md.fit_levels(oracle.denoise, x, COSINE, 6, evaluations=1)
    far = {}
    for name, at in (("fitted", levels), ("uniform", COSINE.levels(6)), ("end", COSINE.levels(120))):
        far[name] = md.sample(md.adams(oracle.denoise, x, at))
    error = {name: (far[name] - far["end"]).norm(dim=1).mean() for name in ("fitted", "uniform")}
    assert error["fitted"] <= error["uniform"]


def test_bad_arguments_are_named():
    oracle = points.ring_of_gaussians()
    x = noise_of(oracle, 4, 0)
    with pytest.raises(ValueError, match="evaluations = 0"):
        md.fit_levels(oracle.denoise, x, COSINE, 3, evaluations=0)
    with pytest.raises(ValueError, match="n = 0: use at least 1"):
        md.fit_levels(oracle.denoise, x, COSINE, 0)
    with pytest.raises(ValueError, match="n = 5001: use at most 5000"):  # 20 times as many stand for the end
        md.fit_levels(oracle.denoise, x, COSINE, 5001)
