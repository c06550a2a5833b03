"""Likelihoods against closed forms: a Gaussian's every term, a mixture's density."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import minidiff as md
from minidiff import likelihood
from minidiff.exact import GaussianMixture
from minidiff.likelihood import bits_per_dim, flow_log_likelihood, variational_bound

F64 = torch.float64
STD = 0.6


def gaussian(std: float = STD, dim: int = 1) -> GaussianMixture:
    return GaussianMixture(torch.zeros(1, dim, dtype=F64), std)


@pytest.fixture
def four_corners(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """x0 and noise at +-1 standard deviation in all combinations: the mean over the four is the exact
    expectation of any quadratic form (Gauss-Hermite quadrature with two nodes each)."""
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=F64)
    monkeypatch.setattr(likelihood, "randn_like", lambda x, generator=None: signs)
    return STD * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=F64)


@pytest.mark.parametrize("schedule", [md.Cosine(), md.Linear(), md.Flow(), md.Karras()])
@pytest.mark.parametrize("n", [2, 10, 300])
def test_every_term_of_a_gaussian_is_its_closed_form(schedule, n, four_corners):
    """For data N(0, s²) the best guess errs by s² sigma²/v with v = alpha² s² + sigma²."""
    levels = schedule.levels(n)
    bound = variational_bound(gaussian().denoise, four_corners, levels)
    snr = torch.stack([level.snr for level in levels[:-1]])
    error = STD**2 / (snr * STD**2 + 1)  # s² sigma² / v
    closed = {
        "prior": snr[0] * STD**2 / 2,
        "steps": (snr[1:] - snr[:-1]) * error[:-1] / 2,
        "reconstruction": (error[-1] * snr[-1] + (2 * math.pi / snr[-1]).log()) / 2,
    }
    torch.testing.assert_close(bound.prior.mean(), closed["prior"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bound.steps.mean(0), closed["steps"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bound.reconstruction.mean(), closed["reconstruction"], rtol=1e-9, atol=1e-9)
    in_bits = bits_per_dim(bound.total.mean(), four_corners).item()
    assert in_bits == pytest.approx(sum(v.sum().item() for v in closed.values()) / math.log(2), abs=1e-9)


def test_the_bound_closes_with_the_number_of_steps(four_corners):
    """-log p of a Gaussian is on average its entropy; the bound lies above it by something like 1/n."""
    entropy = math.log(2 * math.pi * math.e * STD**2) / 2
    gaps = []
    for n in (250, 500, 1000):
        levels = md.VP().levels(n, "log_snr")
        total = variational_bound(gaussian().denoise, four_corners, levels).total.mean().item()
        gaps.append(total - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.2)
    assert abs(2 * gaps[2] - gaps[1]) < 0.002  # nothing is left in the limit


@pytest.mark.parametrize("schedule", [md.Cosine(), md.Linear(), md.Flow(), md.Karras()])
def test_a_step_costs_half_the_gain_in_snr(schedule):
    """Each step is the divergence of two posteriors, with the true x0 and with the guess (torch's)."""
    oracle = GaussianMixture(torch.tensor([[-0.9, 0.2], [0.7, -0.4]], dtype=F64), 0.3)
    x0, levels = oracle.sample(6, torch.Generator().manual_seed(0)), schedule.levels(9)
    bound = variational_bound(oracle.denoise, x0, levels, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for i, (level_t, level_s) in enumerate(itertools.pairwise(levels[:-1])):
        x_t = md.diffuse(x0, torch.randn(x0.shape, generator=generator).double(), level_t)
        guess = oracle.denoise(x_t, level_t).x0
        told, guessed = (
            torch.distributions.Normal(*md.posterior(x_t, clean, level_t, level_s)) for clean in (x0, guess)
        )
        wanted = torch.distributions.kl_divergence(told, guessed).sum(1)
        torch.testing.assert_close(bound.steps[:, i], wanted, rtol=1e-6, atol=1e-12)


def test_the_terms_add_up_to_the_ratio_of_the_walks():
    """Before Jensen's inequality is taken apart: E log q(x_1, ..., x_n | x0) / p(x0, x_1, ..., x_n),
    with every walk drawn forward, step by step, and every density written out."""
    oracle = GaussianMixture(torch.tensor([[-0.9], [0.7]], dtype=F64), 0.3)
    generator = torch.Generator().manual_seed(0)
    x0 = oracle.sample(200_000, generator)
    *levels, end = (md.VP()(t) for t in (1.0, 0.6, 0.3, 0.1, 0.0))
    log_ratio, x, below = torch.zeros(len(x0), dtype=F64), x0, md.VP()(0.0)
    for level in reversed(levels):  # forward: log q(x_t | x_s), and log p(x_s | x_t) with the guess
        step = torch.distributions.Normal(*md.transition(x, below, level))
        x_t = step.mean + step.stddev * torch.randn(x0.shape, generator=generator, dtype=F64)
        guess = oracle.denoise(x_t, level).x0
        if below.sigma > 0:
            back = torch.distributions.Normal(*md.posterior(x_t, guess, level, below))
        else:
            back = torch.distributions.Normal(guess, level.sigma / level.alpha)  # the decoder
        log_ratio += (step.log_prob(x_t) - back.log_prob(x))[:, 0]
        x, below = x_t, level
    log_ratio -= torch.distributions.Normal(0.0, levels[0].sigma).log_prob(x)[:, 0]
    bound = variational_bound(oracle.denoise, x0, [*levels, end], generator=generator).total
    error = (log_ratio.var() + bound.var()).sqrt().item() / len(x0) ** 0.5
    assert abs((log_ratio - bound).mean().item()) < 4 * error < 0.05
    assert bound.mean() > -oracle.log_density(x0, end).mean()  # and it is a bound


def test_many_steps_tend_to_half_the_integral_over_the_snr(four_corners):
    """For a Gaussian the integral of s²/(SNR s² + 1) / 2 is log(1 + SNR s²) / 2, between the ends."""
    misses = []
    for n in (200, 400, 800):
        levels = md.VP().levels(n, "log_snr")
        steps = variational_bound(gaussian().denoise, four_corners, levels).steps.sum(1).mean()
        ends = [(1 + level.snr * STD**2).log() / 2 for level in (levels[0], levels[-2])]
        misses.append((steps - (ends[1] - ends[0])).item())
    assert 0 < misses[2] < 0.1
    assert misses[0] / misses[1] == pytest.approx(2, rel=0.1)
    assert misses[1] / misses[2] == pytest.approx(2, rel=0.1)


def test_a_worse_denoiser_has_a_worse_bound(four_corners):
    levels = md.Cosine().levels(50)
    totals = [
        variational_bound(gaussian(std).denoise, four_corners, levels).total.mean().item()
        for std in (STD, 0.5, 0.8)
    ]
    assert totals[0] < min(totals[1:])


def test_drawn_noise_gives_the_same_on_average():
    levels, generator = md.Cosine().levels(20), torch.Generator().manual_seed(0)
    x0 = STD * torch.randn(20_000, 3, generator=generator, dtype=F64)
    bound = variational_bound(gaussian(dim=3).denoise, x0, levels, generator=generator)
    snr = torch.stack([level.snr for level in levels[:-1]])
    wanted = 3 * (snr[1:] - snr[:-1]) * STD**2 / (snr[:-1] * STD**2 + 1) / 2
    torch.testing.assert_close(bound.steps.mean(0), wanted, rtol=0.04, atol=0)


# --- bins ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-3.0, -0.99, 0.1, 1.0])
@pytest.mark.parametrize("std", [0.001, 0.05, 2.0])
def test_the_masses_of_the_bins_add_up_to_one(mean, std):
    x0 = torch.linspace(-1, 1, 256, dtype=F64)
    log_p = likelihood._log_bin(x0, torch.tensor(mean, dtype=F64), torch.tensor(std, dtype=F64), 256)
    assert log_p.isfinite().all()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    cdf = scipy.stats.norm(mean, std).cdf
    edges = np.concatenate([[-np.inf], np.linspace(-1, 1, 256)[1:] - 1 / 255, [np.inf]])
    np.testing.assert_allclose(log_p.exp(), np.diff(cdf(edges)), atol=1e-12)


def test_data_that_is_known_costs_nothing_and_unknown_data_8_bits():
    x0 = (torch.randint(0, 256, (4, 1, 8, 8)) / 127.5 - 1).double()
    levels = md.Linear().levels(100)
    knows = lambda x, level: md.Prediction(x0, (x - level.alpha * x0) / level.sigma)  # noqa: E731
    bound = variational_bound(knows, x0, levels, bins=256)
    assert bound.steps.abs().max() < 1e-12
    told = bits_per_dim(bound.reconstruction, x0)
    width = 2 / 255 / (levels[-2].sigma / levels[-2].alpha).item()  # of a bin, in standard deviations
    assert told.mean().item() == pytest.approx(-math.log2(math.erf(width / 2 / math.sqrt(2))), rel=0.01)
    assert bits_per_dim(torch.tensor(64 * math.log(256.0)), x0).item() == pytest.approx(8)


# --- the probability flow --------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [md.VP(), md.Cosine(), md.Karras(), md.Flow()])
def test_the_flow_finds_the_density_of_a_mixture(schedule):
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[-1.0, 0.3], [0.8, -0.5]], dtype=F64)
    root = torch.randn(2, 2, 2, generator=generator, dtype=F64) / 2
    oracle = GaussianMixture(means, weights=torch.tensor([0.3, 0.7]), covariances=root @ root.mT)
    x = oracle.sample(20, generator)
    errors = []
    for n in (100, 200, 400):
        levels = schedule.levels(n, "log_snr")
        last = levels[-2]
        truth = oracle.log_density(last.alpha * x, last) + 2 * last.alpha.log()
        errors.append(flow_log_likelihood(oracle.denoise, x, levels) - truth)
    # What stays is the start: N(0, 80² I), where the noisy data are centred at means of size 1.
    assert errors[2].abs().max() < 0.02
    first, second = (b.mean() - a.mean() for a, b in itertools.pairwise(errors))
    assert first / second == pytest.approx(4, rel=0.15)  # second order


def test_random_signs_estimate_the_divergence():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(1, 3, 3, generator=generator, dtype=F64) / 2
    oracle = GaussianMixture(torch.zeros(1, 3, dtype=F64), covariances=root @ root.mT)
    x, levels = oracle.sample(5, generator), md.VP().levels(12, "log_snr")
    exact = flow_log_likelihood(oracle.denoise, x, levels)
    guessed = flow_log_likelihood(oracle.denoise, x, levels, probes=150, generator=generator)
    torch.testing.assert_close(guessed, exact, rtol=0, atol=1.0)
    # For a diagonal Jacobian a single probe is exact: every sign squares to 1.
    levels, x = md.VP().levels(20, "log_snr"), torch.randn(4, 3, dtype=F64)
    one = flow_log_likelihood(gaussian(dim=3).denoise, x, levels, probes=1)
    torch.testing.assert_close(one, flow_log_likelihood(gaussian(dim=3).denoise, x, levels))


def test_bad_arguments_are_named():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="at least 3 levels that end at sigma = 0"):
        variational_bound(gaussian().denoise, x, md.Cosine().levels(1))
    with pytest.raises(ValueError, match="bins = 1"):
        variational_bound(gaussian().denoise, x, md.Cosine().levels(5), bins=1)
    with pytest.raises(ValueError, match="alpha > 0: use log_snr spacing"):
        flow_log_likelihood(gaussian().denoise, x, md.Cosine().levels(5))
    with pytest.raises(ValueError, match="probes = 0"):
        flow_log_likelihood(gaussian().denoise, x, md.VP().levels(5, "log_snr"), probes=0)
    with pytest.raises(ValueError, match="x0 reaches 255"):
        variational_bound(gaussian().denoise, x + 255, md.Cosine().levels(5), bins=256)


def test_a_density_over_bins_is_the_bits_that_name_a_bin():
    """Uniform on [-1, 1]³, cut into 256 bins a side: each number takes 8 bits, whatever it is."""
    x = torch.rand(5, 3) * 2 - 1
    nats = torch.full((5,), 3 * math.log(2), dtype=torch.float64)  # -log of the density 1/2 per dimension
    torch.testing.assert_close(bits_per_dim(nats, x), torch.ones_like(nats))
    torch.testing.assert_close(bits_per_dim(nats, x, width=2 / 256), torch.full_like(nats, 8))
