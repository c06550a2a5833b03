import numpy as np
import pytest
import torch
from helpers import gaussian, two_peaks
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


@pytest.mark.parametrize(
    "t,inside", [(0.1, False), (0.25, True), (0.5, True), (0.75, True), (0.9, False)]
)
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


# --- clipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.02, 0.5, 0.99, 1.0])
def test_clipping_derives_the_noise_again(t):
    """x_t stays what it is: alpha*x0 + sigma*eps, with the clipped x0."""
    level = md.Cosine()(torch.tensor(t, dtype=torch.float64))
    x_t = 5 * x(50)
    plain = gaussian(0.0, 3.0)(x_t, level)
    found = md.clip(gaussian(0.0, 3.0))(x_t, level)
    assert torch.equal(found.x0, plain.x0.clamp(-1, 1))
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x_t)
    within = plain.x0.abs() <= 1
    torch.testing.assert_close(found.eps[within], plain.eps[within], rtol=1e-9, atol=1e-9)
    if t == 0.02:
        assert (found.eps - plain.eps)[~within].abs().max() > 0.1


def test_clipping_to_another_range_and_with_levels_per_sample():
    level = md.Cosine()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    found = md.clip(gaussian(0.5, 3.0), 0.0, 1.0)(4 * x(), level)
    assert found.x0.min() >= 0
    assert found.x0.max() <= 1
    alpha, sigma = level.alpha[:, None], level.sigma[:, None]
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, 4 * x())


def test_clipping_changes_nothing_that_lies_inside():
    levels, x_t = md.Cosine().levels(20), x()
    plain = md.sample(md.ddim(two_peaks(0.05), x_t, levels))
    wide = md.sample(md.ddim(md.clip(two_peaks(0.05), -9, 9), x_t, levels))
    torch.testing.assert_close(plain, wide, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [md.ddim, md.ddpm, md.heun, md.dpmpp_2m])
def test_a_clipped_and_guided_run_stays_in_range(sampler):
    """Strong guidance throws x0 far out; the run ends inside, at the side that was asked for."""

    def denoise(x_t, level, mean):
        return gaussian(0.0 if mean is None else mean, 0.3)(x_t, level)

    guided = md.clip(md.guide(denoise, 0.8, 10.0))  # type: ignore[arg-type]
    found = md.sample(sampler(guided, x(50), md.Cosine().levels(25)))
    assert found.min() > 0.9
    assert found.max() <= 1 + 1e-9


def test_dynamic_thresholding_is_imagens():
    """Saharia et al. 2022, appendix A.1, in NumPy; and x_t is still the mixture of the two answers."""
    level = md.Cosine()(0.6)
    x_t = 2 * torch.randn(3, 1, 8, 8, dtype=torch.float64)
    x0 = torch.randn(3, 1, 8, 8, dtype=torch.float64) * torch.tensor([0.1, 1.0, 3.0]).reshape(
        3, 1, 1, 1
    )
    result = md.threshold(lambda *_: md.Prediction(x0, x0), 0.9)(x_t, level)
    for ours, plain in zip(result.x0, x0, strict=True):
        s = max(1.0, np.quantile(plain.abs().numpy(), 0.9))
        wanted = torch.from_numpy(np.clip(plain.numpy(), -s, s) / s)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(level.alpha * result.x0 + level.sigma * result.eps, x_t)
    with pytest.raises(ValueError, match="percentile = 0 is a share"):
        md.threshold(lambda *_: md.Prediction(x0, x0), 0)
