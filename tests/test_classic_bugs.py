"""Bugs that teaching code makes, by name.

Each test holds a check, shows that the library passes it, and that the buggy variant, written out here
as it is found in the wild, does not. A check that cannot tell the two apart would prove nothing.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers import gaussian, gaussian_flow, point_mass
from runs import words
from torch import Tensor, nn

import minidiff as md
from minidiff.data import Batches
from minidiff.forward import posterior_std
from minidiff.loss import stratified_times
from minidiff.metrics import frechet_distance, proportion
from minidiff.pipeline import to_pil

LEVELS = md.Linear().levels(20)
POINT = 0.8  # where all the data of a point mass are


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def distance_from_the_point(sampled: Tensor) -> float:
    """Data are one point: a right sampler ends there exactly, whatever it starts from."""
    return (sampled - POINT).abs().max().item()


def ancestral(
    x: Tensor, levels: list[md.NoiseLevel], std: Callable[[md.NoiseLevel, md.NoiseLevel], Tensor]
) -> Tensor:
    """DDPM on a point mass as a loop, with the noise of each step left open."""
    for i, (level, target) in enumerate(pairwise(levels)):
        x0 = point_mass(POINT)(x, level).x0
        mean = md.posterior(x, x0, level, target).mean
        x = mean + std(level, target) * randn(*x.shape, seed=i)
    return x


def test_t_equal_to_T_never_trained():
    """``t = torch.randint(1, T)`` leaves out T: the network never sees what sampling starts from."""
    cpu = torch.device("cpu")
    ours = torch.cat([stratified_times(100, generator(seed), cpu) for seed in range(100)])
    assert (ours > 1 - 1 / 1000).sum() > 3  # of 10,000 draws ten are expected in the last thousandth
    assert LEVELS[0].t == 1
    buggy = torch.randint(1, 1000, (10_000,), generator=generator()) / 1000
    assert (buggy > 1 - 1 / 1000).sum() == 0


def test_t_equal_to_0_never_removed():
    """A loop over ``range(T - 1, 0, -1)`` stops one step early and returns a noisy sample."""
    assert distance_from_the_point(md.sample(md.ddim(point_mass(POINT), randn(50), LEVELS))) < 1e-10
    assert LEVELS[-1].sigma == 0
    assert distance_from_the_point(md.sample(md.ddim(point_mass(POINT), randn(50), LEVELS[:-1]))) > 0.1


def test_sampling_from_pure_noise_where_data_still_show_through():
    """Betas made for T = 1000, cut to T = 200: alpha_bar_T is 0.13, and real x_T are not N(0, I). Started
    from there all the same, samples are drawn towards 0."""
    mean, std = 2.0, 0.3
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def error_of_the_mean(schedule: md.Schedule) -> float:
        levels = schedule.levels(200)
        x = levels[0].sigma * z  # what noise() would draw
        return (md.sample(md.ddim(gaussian(mean, std), x, levels)).mean() - mean).abs().item()

    assert md.Linear(steps=200)(1.0).alpha ** 2 == pytest.approx(0.13, abs=0.005)
    assert error_of_the_mean(md.Linear()) < 0.02
    assert error_of_the_mean(md.Linear(steps=200)) > 0.15
    # The same levels are right for samples that do hold what is left of the data.
    levels = md.Linear(steps=200).levels(200)
    spread = ((levels[0].alpha * std) ** 2 + levels[0].sigma ** 2).sqrt()
    honest = md.sample(md.ddim(gaussian(mean, std), levels[0].alpha * mean + spread * z, levels))
    assert (honest.mean() - mean).abs() < 0.02


def test_sampling_from_pure_noise_where_data_still_show_through_gives_a_warning(recwarn):
    for schedule in (md.Linear(), md.Cosine(), md.Sigmoid(), md.Karras(), md.Flow()):
        md.noise((1, 2), schedule(1.0))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"alpha = 0\.36.*t = 1"):
        md.noise((1, 2), md.Linear(steps=200)(1.0))


def test_noise_added_at_the_last_step():
    """``x = mean + sqrt(beta) * randn_like(x)`` without ``if t > 1``."""

    def no_exception(level: md.NoiseLevel, target: md.NoiseLevel) -> Tensor:
        return md.transition(torch.zeros(1).double(), target, level).std  # sqrt(beta), at the last step too

    x = randn(50)
    ours = md.sample(md.ddpm(point_mass(POINT), x, LEVELS, generator=generator()))
    assert distance_from_the_point(ours) < 1e-10
    assert distance_from_the_point(ancestral(x, LEVELS, posterior_std)) < 1e-10
    assert distance_from_the_point(ancestral(x, LEVELS, no_exception)) > 0.1


def test_ddim_ending_at_alpha_bar_that_is_not_1():
    """``alphas_cumprod[0]`` taken for "no noise": it is 0.9999, after the first step of the chain."""
    x = randn(50)
    *rest, _ = LEVELS
    for sampler in (md.ddim, md.heun, md.dpmpp_2m, md.unipc):
        assert distance_from_the_point(md.sample(sampler(point_mass(POINT), x, LEVELS))) < 1e-10
        buggy = md.sample(sampler(point_mass(POINT), x, [*rest, md.Linear()(1 / 1000)]))
        assert distance_from_the_point(buggy) > 1e-3


def test_the_previous_step_recomputed_as_t_minus_stride():
    """``t_prev = t - T // steps`` where the visited t are not that far apart: each step lands on a level
    that the next one does not know of."""
    n, x = 7, randn(50)
    visited = [round(1000 - i * 1000 / n) for i in range(n)]
    for t in visited:
        level, target = md.Linear()(t / 1000), md.Linear()(max(t - 1000 // n, 0) / 1000)
        x0, eps = point_mass(POINT)(x, level)
        x = target.alpha * x0 + target.sigma * eps
    assert distance_from_the_point(x) > 1e-3
    for steps in (1, 3, 7, 13):
        ours = md.sample(md.ddim(point_mass(POINT), randn(50), md.Linear().levels(steps)))
        assert distance_from_the_point(ours) < 1e-10


def test_eps_not_derived_again_after_clipping():
    """x0 is clipped, the old eps is kept: alpha*x0 + sigma*eps is no longer x_t, and the step starts from
    a sample that was never there."""

    def buggy_clip(denoise, low=-1.0, high=1.0):
        def clipped(x_t: Tensor, level: md.NoiseLevel) -> md.Prediction:
            x0, eps = denoise(x_t, level)
            return md.Prediction(x0.clamp(low, high), eps)

        return clipped

    def inconsistency(clip) -> float:
        worst, x = 0.0, randn(50)
        denoise = clip(gaussian(0.0, 2.0))
        for level, state in zip(LEVELS, md.ddim(denoise, x, LEVELS), strict=False):
            x0, eps = denoise(x, level)
            worst = max(worst, (level.alpha * x0 + level.sigma * eps - x).abs().max().item())
            x = state.x
        return worst

    assert inconsistency(md.clamp) < 1e-12
    assert inconsistency(buggy_clip) > 0.1


def test_standard_deviation_and_variance_confused():
    """``x_t = sqrt(alpha_bar) x0 + (1 - alpha_bar) eps``, or ``sqrt(1 - beta) x + beta eps``: the square
    root forgotten. Checked by the variance of what comes out."""
    n = 100_000
    before, level = md.Linear()(0.2), md.Linear()(0.201)
    step = md.transition(torch.zeros(n).double(), before, level)
    beta = md.Linear().betas[200]

    def off(sampled: Tensor, variance: Tensor) -> float:
        return abs(float(sampled.var() / variance - 1))

    assert off(md.diffuse(torch.zeros(n).double(), randn(n), level), 1 - level.alpha**2) < 0.03
    assert off((1 - level.alpha**2) * randn(n), 1 - level.alpha**2) > 0.1
    assert off(step.mean + step.std * randn(n), beta) < 0.03
    assert off(beta * randn(n), beta) > 0.9
    # In the step back, too: Gaussian's second entry is a standard deviation.
    back = md.posterior(torch.zeros(1).double(), torch.zeros(1).double(), level, before)
    tilde = (1 - before.alpha**2) / (1 - level.alpha**2) * beta
    torch.testing.assert_close(back.std, tilde.sqrt(), rtol=1e-6, atol=0)


def test_noise_injected_twice():
    """The closed form for x0 applied to x_{t-1}: ``x = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) eps`` in
    a loop. For data of variance 1 the variance stays 1, so nothing seems wrong; the fourth moment tells
    that everything is noise far too early."""
    n = 200_000
    levels = [md.Linear()(i / 1000) for i in (0, 60, 120, 180, 240)]
    x0 = torch.where(randn(n) > 0, 1.0, -1.0).double()
    chain, buggy = x0, x0
    for i, (before, level) in enumerate(pairwise(levels)):
        step = md.transition(chain, before, level)
        chain = step.mean + step.std * randn(n, seed=10 + i)
        buggy = md.diffuse(buggy, randn(n, seed=20 + i), level)
    alpha, sigma = level.alpha.item(), level.sigma.item()
    fourth = alpha**4 + 6 * alpha**2 * sigma**2 + 3 * sigma**4
    for sampled in (chain, buggy, md.diffuse(x0, randn(n, seed=30), level)):
        assert sampled.var().item() == pytest.approx(1, abs=0.02)
    assert (chain**4).mean().item() == pytest.approx(fourth, abs=0.05)
    assert (md.diffuse(x0, randn(n, seed=30), level) ** 4).mean().item() == pytest.approx(fourth, abs=0.05)
    assert abs((buggy**4).mean().item() - fourth) > 0.3


def test_data_in_0_1_with_clamping_to_minus_1_1():
    """``ToTensor()`` gives [0, 1]; a pipeline that clamps to [-1, 1] and maps (x + 1)/2 back then shows
    washed-out pictures. What training gets and what pictures are made of must be inverse, byte by byte."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)

    def comes_back(to_data: Callable[[Tensor], Tensor]) -> bool:
        back = torch.tensor(list(to_pil(to_data(pixels)[0]).tobytes()), dtype=torch.uint8)
        return torch.equal(back, pixels.flatten())

    def ours(pixels: Tensor) -> Tensor:
        x0, _ = next(iter(Batches(pixels, ["a picture"], 1)))
        assert (x0.min(), x0.max()) == (-1, 1)
        return x0

    assert comes_back(ours)
    assert not comes_back(lambda pixels: pixels.float() / 255)
    # And samples are clamped to the range of the data, on both sides.
    wild = torch.linspace(-3, 3, 256).reshape(1, 16, 16)
    assert to_pil(wild).getextrema() == (0, 255)


def test_labels_dropped_per_batch_instead_of_per_sample():
    """``if random.random() < 0.1: labels = None``: whole batches without labels, and with dropout 0.1 nine
    of ten batches that teach nothing about their absence."""
    seen: list[Tensor] = []

    class Recorder(md.Diffusion):
        def forward(self, x_t, level, condition=None):
            seen.append(~condition.mask[:, 0])
            return torch.zeros_like(x_t)

    def mixed(drops: list[Tensor]) -> float:
        """Share of the batches in which some are dropped and some are not."""
        return sum(bool(drop.any() and not drop.all()) for drop in drops) / len(drops)

    model = Recorder(nn.Linear(1, 1), md.Cosine())
    for seed in range(100):
        x0, random = torch.zeros(64, 2), generator(seed)
        md.loss(model, x0, words(64), condition_dropout=0.1, generator=random)
    assert mixed(seen) > 0.9
    assert torch.cat(seen).float().mean().item() == pytest.approx(0.1, abs=0.02)
    draws = torch.rand(100, generator=generator())
    assert mixed([(draw < 0.1).expand(64) for draw in draws]) == 0


def test_ema_model_left_in_train_mode():
    """A deep copy of a model in training keeps its dropout on, and samples from it are damaged."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(2, 32), nn.Dropout(0.5), nn.Linear(32, 2))

        def forward(self, x, t, condition=None):
            return self.layers(x)

    def noisy(model: md.Diffusion) -> bool:
        x, level = torch.ones(1, 2), md.Cosine()(0.5)
        return len({tuple(model.denoise(x, level).x0[0].tolist()) for _ in range(5)}) > 1

    model = md.Diffusion(Net(), md.Cosine(), "v")
    for step in md.train(model, [torch.zeros(4, 2)], 3, precision="fp32"):
        assert noisy(model)
        assert not noisy(step.ema)
        assert not any(part.training for part in step.ema.modules())
        assert noisy(copy.deepcopy(model))  # the bug


def test_guidance_conventions_mixed():
    """Two scales are in use: w with eps = free + w (told - free), where 1 is off, and the paper's
    (1 + w) told - w free, where 0 is off. Here 1 is off, and 0 is the unconditional model."""

    def denoise(x_t, level, mean):
        return gaussian(0.0 if mean is None else mean, 0.5)(x_t, level)

    x, level = randn(5), md.Cosine()(0.5)
    told, free = denoise(x, level, 1.0), denoise(x, level, None)
    for scale, expected in ((0.0, free), (1.0, told)):
        found = md.guide(denoise, 1.0, scale)(x, level)
        torch.testing.assert_close(found.x0, expected.x0)
        paper = (1 + scale) * told.x0 - scale * free.x0
        assert (paper - expected.x0).abs().max() > 0.1


def test_beta_and_beta_tilde_unnamed():
    """Two variances fit the step back: beta, optimal for data N(0, I), and beta tilde, for a point. Ours is
    beta tilde and says so; with beta a point mass comes out too noisy at every level on the way."""

    def beta(level: md.NoiseLevel, target: md.NoiseLevel) -> Tensor:
        return md.transition(torch.zeros(1).double(), target, level).std

    stop = LEVELS[:-4]
    n, level = 20_000, stop[-1]
    x = LEVELS[0].alpha * POINT + LEVELS[0].sigma * randn(n, seed=99)
    ours = md.sample(md.ddpm(point_mass(POINT), x, stop, generator=generator()))

    def excess(sampled: Tensor) -> float:
        return float((sampled - level.alpha * POINT).var() / level.sigma**2 - 1)

    assert abs(excess(ours)) < 0.05
    assert abs(excess(ancestral(x, stop, posterior_std))) < 0.05
    assert excess(ancestral(x, stop, beta)) > 0.05
    for function in (md.ddpm, posterior_std):
        assert "beta tilde" in function.__doc__


def test_fid_quoted_without_its_sample_count():
    """FID falls with the number of samples, the model being the same: without the number it says nothing."""
    reals = randn(2000, 8)
    few, many = (frechet_distance(randn(n, 8, seed=n), reals, groups=2) for n in (100, 2000))
    assert few.value > 3 * many.value  # both sets are from the same distribution as the reals
    for score, n in ((few, 100), (many, 2000), (proportion(9, 10), 10)):
        assert score.n == n
        assert str(score).endswith(f"n = {n}")


def test_sigma_from_alpha_in_float32():
    """``sqrt(1 - alpha**2)`` in float32 is off by tenths of a percent at small t, and 0 before that."""
    t = 1e-4
    level = md.Cosine(offset=0.0)(t)
    exact = math.sin(math.pi / 2 * t)
    assert level.sigma.item() == pytest.approx(exact, rel=1e-12)
    buggy = (1 - level.alpha.float() ** 2).sqrt().item()
    assert abs(buggy / exact - 1) > 1e-3


def test_times_tied_to_places_in_the_batch():
    """Times that cover [0, 1] evenly, handed out in order: in a data set used as one batch, each sample
    would be seen at its own few times only. (Found in this library.)"""

    def spread(draw: Callable[[int], Tensor]) -> float:
        """Of the times that the first sample gets."""
        times = torch.stack([draw(seed)[0] for seed in range(100)])
        return float(times.max() - times.min())

    def in_order(seed: int) -> Tensor:
        return 1 - (torch.rand(1, generator=generator(seed)) + torch.arange(10)) / 10

    assert spread(lambda seed: stratified_times(10, generator(seed), torch.device("cpu"))) > 0.9
    assert spread(in_order) <= 0.1


def test_the_eps_target_at_pure_noise():
    """At alpha = 0 the network says which noise it sees, which is x itself: x0 = (x - sigma eps)/alpha is
    0/0, in floating point 1e16 times whatever the network was wrong by."""
    model = md.Diffusion(md.MLP(2, 32, 1), md.Cosine(), "eps")
    levels = md.Cosine().levels(5)
    with pytest.raises(ValueError, match="use target 'x0', 'v' or 'flow'"):
        md.sample(md.ddim(model.denoise, torch.ones(1, 2), levels))
    x = torch.ones(1, 2, dtype=torch.float64)
    buggy = (x - levels[0].sigma * 0.99) / levels[0].alpha
    assert buggy.abs().max() > 1e10


def test_network_told_the_time_of_another_step():
    """An index one off between the loop and the table: the network is asked about more noise than there
    is. Checked against the solution of the probability-flow ODE."""
    levels, x = md.Linear().levels(100), randn(9)
    exact = gaussian_flow(x, levels[0], levels[-1], 0.3, 0.5)

    def one_off(x_t: Tensor, level: md.NoiseLevel) -> md.Prediction:
        return gaussian(0.3, 0.5)(x_t, md.Linear()((level.t + 0.01).clamp(max=1)))

    def error(denoise) -> float:
        return (md.sample(md.heun(denoise, x, levels)) - exact).abs().max().item()

    assert error(gaussian(0.3, 0.5)) < 0.01
    assert error(one_off) > 0.02
