import numpy as np
import pytest
import torch
from helpers import SCHEDULES, gaussian, two_peaks
from torch import Tensor

import minidiff as md

D = 4


def condition(n: int, seed: int = 0, tokens: int = 3) -> md.Condition:
    generator = torch.Generator().manual_seed(seed)
    return md.Condition(
        torch.randn(n, tokens, D, generator=generator, dtype=torch.float64),
        torch.ones(n, tokens).bool(),
        torch.randn(n, D, generator=generator, dtype=torch.float64),
    )


class Recorder:
    """A denoiser with a formula for an answer, x0 = x_t + pooled + (number of tokens): every part of a
    condition shows in it, and every call is recorded."""

    def __init__(self):
        self.calls: list[tuple[Tensor, md.NoiseLevel, md.Condition | None]] = []

    def __call__(self, x_t, level, condition=None):
        self.calls.append((x_t, level, condition))
        x0 = x_t.clone()
        if condition is not None:
            x0 = x0 + condition.pooled[:, :2] + condition.mask.sum(1, keepdim=True)
        _, alpha, sigma = level.like(x_t)
        return md.Prediction(x0, (x_t - alpha * x0) / sigma)


def x(n: int = 3) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


LEVEL = md.Cosine()(0.4)


# --- classifier-free guidance ----------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 3.0, 7.5, -1.0])
def test_guidance_is_the_formula(scale):
    """x0 = x0_without + scale (x0_with - x0_without), and the same for eps."""
    c, recorder = condition(3), Recorder()
    found = md.guide(recorder, c, scale)(x(), LEVEL)
    told, free = Recorder()(x(), LEVEL, c), Recorder()(x(), LEVEL)
    torch.testing.assert_close(found.x0, free.x0 + scale * (told.x0 - free.x0))
    torch.testing.assert_close(found.eps, free.eps + scale * (told.eps - free.eps))
    torch.testing.assert_close(LEVEL.alpha * found.x0 + LEVEL.sigma * found.eps, x())


def test_guidance_is_one_batch_of_twice_the_size():
    """First with the condition, then without: the same x_t, every sample's condition dropped."""
    c, recorder = condition(3), Recorder()
    md.guide(recorder, c, 3.0)(x(), LEVEL)
    ((asked, level, both),) = recorder.calls
    assert torch.equal(asked, torch.cat([x(), x()]))
    assert level == LEVEL
    assert both.mask.any(1).tolist() == [True] * 3 + [False] * 3
    assert torch.equal(both.pooled[:3], c.pooled)
    assert (both.pooled[3:] == 0).all()


def test_scale_1_asks_once_with_the_plain_batch():
    c, recorder = condition(3), Recorder()
    found = md.guide(recorder, c, 1.0, negative=condition(3, seed=1))(x(), LEVEL)
    ((asked, _, given),) = recorder.calls
    assert len(asked) == 3
    assert given is c
    assert torch.equal(found.x0, Recorder()(x(), LEVEL, c).x0)


def test_scale_0_is_the_unconditional_model():
    found = md.guide(Recorder(), condition(3), 0.0)(x(), LEVEL)
    torch.testing.assert_close(found.x0, Recorder()(x(), LEVEL).x0)


def test_a_negative_prompt_takes_the_place_of_no_prompt():
    c, negative, recorder = condition(3), condition(1, seed=1, tokens=5), Recorder()
    found = md.guide(recorder, c, 2.5, negative)(x(), LEVEL)
    told = Recorder()(x(), LEVEL, c)
    away = Recorder()(x(), LEVEL, negative.expand(3))
    torch.testing.assert_close(found.x0, away.x0 + 2.5 * (told.x0 - away.x0))
    assert len(recorder.calls) == 1  # prompts of different lengths still go in one batch


def test_one_condition_serves_all_samples():
    c = condition(1)
    one = md.guide(Recorder(), c, 2.0)(x(), LEVEL)
    many = md.guide(Recorder(), c.expand(3), 2.0)(x(), LEVEL)
    assert torch.equal(one.x0, many.x0)
    with pytest.raises(ValueError, match="2 conditions for 3 samples: give 1 or 3"):
        md.guide(Recorder(), condition(2), 2.0)(x(), LEVEL)


@pytest.mark.parametrize("t,inside", [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.9, False)])
def test_guidance_acts_inside_its_interval(t, inside):
    """Outside, the condition is still followed, with scale 1 and one question."""
    c, recorder = condition(3), Recorder()
    level = md.Cosine()(torch.tensor(t, dtype=torch.float64))
    found = md.guide(recorder, c, 3.0, interval=(0.25, 0.75))(x(), level)
    assert len(recorder.calls[0][0]) == (6 if inside else 3)
    scale = 3.0 if inside else 1.0
    told, free = Recorder()(x(), level, c), Recorder()(x(), level)
    torch.testing.assert_close(found.x0, free.x0 + scale * (told.x0 - free.x0))


def test_each_sample_may_have_its_own_level():
    """A denoiser takes levels of shape (B,) too, and so does a guided one, interval included."""
    c = condition(3)
    level = md.Cosine()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    together = md.guide(Recorder(), c, 3.0, interval=(0.3, 1.0))(x(), level)
    for i in range(3):
        alone = md.guide(
            Recorder(), md.Condition(*(part[i : i + 1] for part in c)), 3.0, interval=(0.3, 1.0)
        )(x()[i : i + 1], md.NoiseLevel(*(part[i] for part in level)))
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps)


def test_a_condition_of_the_callers_own_kind():
    """A number, say: then the two questions are asked one after the other."""

    def denoise(x_t, level, number):
        return gaussian(0.0 if number is None else number, 0.3)(x_t, level)

    found = md.guide(denoise, 2.0, 3.0, negative=-1.0)(x(), LEVEL)  # type: ignore[arg-type]
    told, away = gaussian(2.0, 0.3)(x(), LEVEL), gaussian(-1.0, 0.3)(x(), LEVEL)
    torch.testing.assert_close(found.x0, away.x0 + 3 * (told.x0 - away.x0))
    free = md.guide(denoise, 2.0, 3.0)(x(), LEVEL)  # type: ignore[arg-type]
    torch.testing.assert_close(free.x0, 3 * told.x0 - 2 * gaussian(0.0, 0.3)(x(), LEVEL).x0)


def test_guidance_of_a_network_is_guidance_of_its_parts():
    """With a real model, one doubled batch gives what two separate calls give."""
    torch.manual_seed(0)
    model = md.Diffusion(
        md.UNet(1, 32, (1,), patch=2, attention=(0,), condition_dim=D), md.Cosine(), "v"
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x_t, c = torch.randn(2, 1, 4, 4, dtype=torch.float64), condition(2)
    found = md.guide(model.denoise, c, 3.0)(x_t, LEVEL)
    told, free = model.denoise(x_t, LEVEL, c), model.denoise(x_t, LEVEL)
    assert (told.x0 - free.x0).abs().max() > 1e-3
    torch.testing.assert_close(found.x0, free.x0 + 3 * (told.x0 - free.x0), rtol=1e-9, atol=1e-9)


def test_guidance_of_gaussians_samples_the_sharpened_product():
    """Guided scores are those of p(x|c)^w p(x)^(1-w) at t = 0. For N(1, s²) against N(0, s²) that is
    N(w, s²), and with equal widths it is so at every level: guidance must land at w."""

    def denoise(x_t, level, mean):
        return gaussian(0.0 if mean is None else mean, 0.5)(x_t, level)

    levels = md.Cosine().levels(300)
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    guided = md.guide(denoise, 1.0, 3.0)  # type: ignore[arg-type]
    found = md.sample(md.ddim(guided, z, levels))
    torch.testing.assert_close(found, 3.0 + 0.5 * z, rtol=0, atol=0.02)


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 1.0), (0.0, 1.2)])
def test_bad_intervals_are_named(interval):
    with pytest.raises(ValueError, match=r"interval = .*give two times with 0 <= low <= high <= 1"):
        md.guide(Recorder(), condition(1), 3.0, interval=interval)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_no_numbers_are_named(scale):
    for make in (md.guide, md.gradient_guide):
        with pytest.raises(ValueError, match=f"^scale = {scale}: give a finite number"):
            make(Recorder(), lambda x0, level: x0.sum(1), scale)


# --- rescaled guidance -----------------------------------------------------------------------------


class Pictures:
    """Answers with given x0 for "told" and "free", whatever x_t shows; eps is what is then left."""

    def __init__(self, n: int = 3):
        spread = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64).reshape(-1, 1, 1, 1)[:n]
        noise = torch.randn(3, n, 2, 4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        self.told, self.free, self.x_t = spread * noise[0] + 0.3, spread * noise[1], noise[2]

    def __call__(self, x_t, level, condition):
        x0 = self.told if condition == "told" else self.free
        _, alpha, sigma = level.like(x_t)
        return md.Prediction(x0, (x_t - alpha * x0) / sigma)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("t", [0.02, 0.5, [0.1, 0.5, 0.9], 1.0])
def test_rescaling_is_the_papers(rescale, t):
    """Lin et al. 2024, eq. 14-16, in NumPy, sample by sample; and x_t is still alpha*x0 + sigma*eps."""
    net, level = Pictures(), md.Cosine()(torch.tensor(t, dtype=torch.float64))
    found = md.guide(net, "told", 4.0, rescale=rescale)(net.x_t, level)
    for ours, told, free in zip(found.x0, net.told.numpy(), net.free.numpy(), strict=True):
        cfg = free + 4 * (told - free)
        rescaled = cfg * np.std(told) / np.std(cfg)
        wanted = rescale * rescaled + (1 - rescale) * cfg
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)
    _, alpha, sigma = level.like(net.x_t)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, net.x_t)
    if rescale == 1:
        torch.testing.assert_close(found.x0.std((1, 2, 3)), net.told.std((1, 2, 3)))


def test_without_rescaling_no_digit_changes():
    net = Pictures()
    found = md.guide(net, "told", 4.0, rescale=0.0)(net.x_t, LEVEL)
    told, free = net(net.x_t, LEVEL, "told"), net(net.x_t, LEVEL, "free")
    assert torch.equal(found.x0, free.x0 + 4 * (told.x0 - free.x0))
    assert torch.equal(found.eps, free.eps + 4 * (told.eps - free.eps))


def test_rescaling_leaves_alone_what_is_not_guided():
    """Scale 1, and samples outside the interval."""
    net, level = Pictures(), md.Cosine()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert torch.equal(md.guide(net, "told", 1.0, rescale=1.0)(net.x_t, level).x0, net.told)
    found = md.guide(net, "told", 4.0, interval=(0.4, 0.6), rescale=1.0)(net.x_t, level)
    for i in (0, 2):
        torch.testing.assert_close(found.x0[i], net.told[i])
    assert (found.x0[1] - net.told[1]).abs().max() > 0.1


def test_rescaling_where_it_means_nothing():
    """Pictures of one colour and single numbers have no spread; at sigma = 0 x_t tells x0."""
    level, clean = LEVEL, md.NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))

    def answers(told: Tensor, free: Tensor):
        return lambda x_t, level, c: md.Prediction(*([told] * 2 if c == "told" else [free] * 2))

    flat, number = torch.ones(2, 1, 4, 4), torch.ones(2, 1)
    random = torch.randn(2, 1, 4, 4)
    for told, free, at in [
        (flat, -flat, level), (number, -number, level), (random, -random + 1, clean)
    ]:  # fmt: skip
        plain = md.guide(answers(told, free), "told", 3.0)(told, at)
        found = md.guide(answers(told, free), "told", 3.0, rescale=0.7)(told, at)
        assert torch.equal(found.x0, plain.x0)
        assert torch.equal(found.eps, plain.eps)


@pytest.mark.parametrize("rescale", [-0.1, 1.1, float("nan")])
def test_a_rescale_that_is_no_share_is_named(rescale):
    with pytest.raises(ValueError, match=rf"^rescale = {rescale:g} is a share: give it in \[0, 1\]"):
        md.guide(Recorder(), condition(1), 3.0, rescale=rescale)


# --- guidance by a gradient ------------------------------------------------------------------------


class Measured:
    """x0 ~ N(mean, diag(std²)) in two dimensions, of which y = a·x0 + r n was measured, n ~ N(0, 1).

    Given y, x0 is Gaussian again, with the precisions of both added up. Given x_t, a·x0 is Gaussian
    around a·x0(x_t), so p(y | x_t) can be written through the denoiser's x0, exactly.
    """

    mean, std = torch.tensor([[0.5, -1.0]]).double(), torch.tensor([[0.8, 1.5]]).double()
    a, r, y = torch.tensor([1.0, -0.7]).double(), 0.6, 2.0

    def __init__(self):
        self.prior = md.exact.GaussianMixture(self.mean, self.std)
        precision = (self.std[0] ** -2).diag()
        covariance = (precision + torch.outer(self.a, self.a) / self.r**2).inverse()
        mean = covariance @ (precision @ self.mean[0] + self.a * self.y / self.r**2)
        self.posterior = md.exact.GaussianMixture(mean[None], covariances=covariance)

    def log_likelihood(self, x0: Tensor, level: md.NoiseLevel) -> Tensor:
        alpha, sigma = level.alpha.reshape(-1, 1), level.sigma.reshape(-1, 1)
        spread = self.std**2 * sigma**2 / (alpha**2 * self.std**2 + sigma**2)  # Var[x0 | x_t]
        variance = self.r**2 + (self.a**2 * spread).sum(1)
        return -((x0 @ self.a - self.y) ** 2) / (2 * variance) - variance.log() / 2


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.01, 0.4, 0.95, [0.2, 0.5, 0.8]])
def test_gradient_guidance_of_a_gaussian_is_its_posterior(name, t):
    """Bayes' rule: the denoiser of p(x0) and the slope of p(y | x_t) make the denoiser of p(x0 | y)."""
    case, level = Measured(), SCHEDULES[name](torch.tensor(t, dtype=torch.float64))
    x_t = x() * (level.alpha**2 + level.sigma**2).sqrt().reshape(-1, 1)
    found = md.gradient_guide(case.prior.denoise, case.log_likelihood)(x_t, level)
    wanted = case.posterior.denoise(x_t, level)
    assert (wanted.eps - case.prior.denoise(x_t, level).eps).abs().max() > 1e-3
    torch.testing.assert_close(found.x0, wanted.x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.eps, wanted.eps, rtol=1e-8, atol=1e-8)


def test_gradient_guidance_samples_the_posterior():
    """Everything is affine, so a deterministic sampler maps noise z to A z + b: mean b, covariance A Aᵀ,
    with no error of sampling."""
    case = Measured()
    guided = md.gradient_guide(case.prior.denoise, case.log_likelihood)
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for schedule in (md.Cosine(), md.Linear()):
        b, *columns = md.sample(md.heun(guided, z, schedule.levels(100)))
        a = torch.stack(columns, 1) - b[:, None]
        torch.testing.assert_close(b, case.posterior.mean, rtol=0, atol=0.01)
        torch.testing.assert_close(a @ a.T, case.posterior.covariance, rtol=0, atol=0.01)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, -1.0])
def test_the_scale_of_gradient_guidance_is_the_power_of_the_likelihood(scale):
    """eps - scale sigma grad (Dhariwal & Nichol 2021, eq. 14), the gradient by finite differences."""
    case, level, h = Measured(), md.Cosine()(0.4), 1e-6

    def log_likelihood(x_t):
        return case.log_likelihood(case.prior.denoise(x_t, level).x0, level)

    slope = torch.stack(
        [(log_likelihood(x() + h * e) - log_likelihood(x() - h * e)) / (2 * h)
         for e in torch.eye(2, dtype=torch.float64)], 1
    )  # fmt: skip
    found = md.gradient_guide(case.prior.denoise, case.log_likelihood, scale)(x(), level)
    plain = case.prior.denoise(x(), level)
    wanted = plain.eps - scale * level.sigma * slope
    torch.testing.assert_close(found.eps, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x())


def test_gradient_guidance_at_both_ends_is_the_plain_answer():
    """At alpha = 0 nothing in x_t depends on c, at sigma = 0 nothing is left to say."""
    case = Measured()
    for level in (
        md.Cosine()(1.0), md.NoiseLevel(*torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    ):  # fmt: skip
        found = md.gradient_guide(case.prior.denoise, case.log_likelihood, 5.0)(x(), level)
        plain = case.prior.denoise(x(), level)
        assert torch.equal(found.x0, plain.x0)
        assert torch.equal(found.eps, plain.eps)


def test_gradient_guidance_goes_around_one_guidance_and_inside_clipping():
    """Two conditions at once: a mean that the denoiser was told of, and a measurement."""
    case, level = Measured(), md.Cosine()(0.4)

    def denoise(x_t, level, mean):
        return gaussian(0.0 if mean is None else mean, 0.5)(x_t, level)

    inner = md.guide(denoise, 1.0, 3.0)
    found = md.clamp(md.gradient_guide(inner, case.log_likelihood, 2.0))(x(), level)
    with_grad = x().requires_grad_()
    (slope,) = torch.autograd.grad(case.log_likelihood(inner(with_grad, level).x0, level).sum(), with_grad)
    wanted = inner(x(), level).x0 + 2 * level.sigma**2 / level.alpha * slope
    torch.testing.assert_close(found.x0, wanted.clamp(-1, 1))
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x())


def test_gradient_guidance_of_a_network():
    """Under no_grad too, leaving no gradients behind; and a sample does not depend on its batch."""
    torch.manual_seed(0)
    model = md.Diffusion(md.UNet(1, 32, (1,), patch=2, attention=(0,)), md.Cosine(), "v").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x_t = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def brighter(x0, level):
        return x0.mean((1, 2, 3))

    guided = md.gradient_guide(model.denoise, brighter, 20.0)
    with torch.no_grad():
        found, plain = guided(x_t, LEVEL), model.denoise(x_t, LEVEL)
        alone = guided(x_t[:1], LEVEL)
    assert not found.x0.requires_grad
    assert not found.eps.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x_t.requires_grad
    assert (found.x0.mean((1, 2, 3)) > plain.x0.mean((1, 2, 3)) + 0.01).all()
    torch.testing.assert_close(alone.x0, found.x0[:1])
    outside = guided(x_t, LEVEL)
    assert torch.equal(outside.x0, found.x0)
    assert not outside.x0.requires_grad


def test_a_log_likelihood_without_a_slope_is_refused():
    case, weight = Measured(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    deaf = torch.no_grad()(case.prior.denoise)
    for denoise, judge, says in [
        (case.prior.denoise, lambda x0, level: x0, r"has shape \(3, 2\): .* per sample, \(3,\)"),
        (case.prior.denoise, lambda x0, level: x0.sum(), r"has shape \(\): give one number"),
        (case.prior.denoise, lambda x0, level: (x0 > 0).double().sum(1), "has no slope in x_t"),
        (deaf, lambda x0, level: weight * x0.sum(1), "it, or the denoiser, is not differentiable"),
    ]:
        with pytest.raises(ValueError, match=f"^the log-likelihood {says}" if "has" in says else says):
            md.gradient_guide(denoise, judge)(x(), LEVEL)


# --- clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.02, 0.5, 0.99, 1.0])
def test_clipping_derives_the_noise_again(t):
    """x_t stays what it is: alpha*x0 + sigma*eps, with the clipped x0."""
    level = md.Cosine()(torch.tensor(t, dtype=torch.float64))
    x_t = 5 * x(50)
    plain = gaussian(0.0, 3.0)(x_t, level)
    found = md.clamp(gaussian(0.0, 3.0))(x_t, level)
    assert torch.equal(found.x0, plain.x0.clamp(-1, 1))
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x_t)
    within = plain.x0.abs() <= 1
    torch.testing.assert_close(found.eps[within], plain.eps[within], rtol=1e-9, atol=1e-9)
    if t == 0.02:
        assert (found.eps - plain.eps)[~within].abs().max() > 0.1


def test_clipping_to_another_range_and_with_levels_per_sample():
    level = md.Cosine()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    found = md.clamp(gaussian(0.5, 3.0), 0.0, 1.0)(4 * x(), level)
    assert found.x0.min() >= 0
    assert found.x0.max() <= 1
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, 4 * x())


def test_clipping_changes_nothing_that_lies_inside():
    levels, x_t = md.Cosine().levels(20), x()
    plain = md.sample(md.ddim(two_peaks(0.05), x_t, levels))
    wide = md.sample(md.ddim(md.clamp(two_peaks(0.05), -9, 9), x_t, levels))
    torch.testing.assert_close(plain, wide, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [md.ddim, md.ddpm, md.heun, md.dpmpp_2m, md.unipc])
def test_a_clipped_and_guided_run_stays_in_range(sampler):
    """Strong guidance throws x0 far out; the run ends inside, at the side that was asked for."""

    def denoise(x_t, level, mean):
        return gaussian(0.0 if mean is None else mean, 0.3)(x_t, level)

    guided = md.clamp(md.guide(denoise, 0.8, 10.0))  # type: ignore[arg-type]
    found = md.sample(sampler(guided, x(50), md.Cosine().levels(25)))
    assert found.min() > 0.9
    assert found.max() <= 1 + 1e-9


def test_dynamic_thresholding_is_imagens():
    """Saharia et al. 2022, appendix A.1, in NumPy; and x_t is still the mixture of the two answers."""
    level = md.Cosine()(0.6)
    x_t = 2 * torch.randn(3, 1, 8, 8, dtype=torch.float64)
    x0 = torch.randn(3, 1, 8, 8, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0]).reshape(3, 1, 1, 1)
    result = md.threshold(lambda *_: md.Prediction(x0, x0), 0.9)(x_t, level)
    for ours, plain in zip(result.x0, x0, strict=True):
        s = max(1.0, np.quantile(plain.abs().numpy(), 0.9))
        wanted = torch.from_numpy(np.clip(plain.numpy(), -s, s) / s)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(level.alpha * result.x0 + level.sigma * result.eps, x_t)
    with pytest.raises(ValueError, match="percentile = 0 is a share"):
        md.threshold(lambda *_: md.Prediction(x0, x0), 0)
