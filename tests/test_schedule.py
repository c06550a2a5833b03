import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from helpers import SCHEDULES, VARIANCE_PRESERVING
from torch import Tensor

import minidiff as md
from minidiff.schedule import schedule_from_config

STEPS = (1, 2, 7, 13, 20, 50)


def number(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- the curves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_linear_is_the_product_of_the_betas(steps):
    """alpha_bar_i = prod_{j<=i} (1 - beta_j), multiplied out in plain Python (Ho et al. 2020, eq. 4)."""
    schedule = md.Linear(steps=steps)
    product = 1.0
    for i in range(1, steps + 1):
        beta = 1e-4 + (0.02 - 1e-4) * (i - 1) / max(steps - 1, 1)  # beta_t = beta_min + t/T (...)
        product *= 1 - beta
        assert schedule.betas[i - 1].item() == pytest.approx(beta, rel=1e-13)
        if i % 97 == 0 or i in (1, steps):
            level = schedule(number(i / steps))
            assert level.alpha.item() ** 2 == pytest.approx(product, rel=1e-11)
            assert level.sigma.item() ** 2 == pytest.approx(1 - product, rel=1e-10)


def test_linear_between_grid_points_is_geometric():
    """Half a step multiplies alpha² by the square root of the step's factor."""
    schedule = md.Linear()
    for i in (0, 1, 500, 998, 999):
        before, middle, after = (schedule(number((i + k / 2) / 1000)).alpha for k in range(3))
        torch.testing.assert_close(middle**2, before * after, rtol=1e-12, atol=0)


def test_cosine_is_the_formula_of_the_paper():
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar = f(t)/f(0), f(t) = cos²((t/T + s)/(1 + s) · π/2)."""
    for offset in (0.0, 0.008, 0.1):
        schedule = md.Cosine(offset)
        for t in np.linspace(0, 1, 41):

            def f(u):
                return math.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2  # noqa: B023

            level = schedule(number(t))
            assert level.alpha.item() ** 2 == pytest.approx(f(t) / f(0), abs=1e-15)
            assert level.sigma.item() ** 2 == pytest.approx(1 - f(t) / f(0), abs=1e-15)


def test_cosine_without_offset_turns_at_constant_speed():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    level = md.Cosine(offset=0.0)(t)
    torch.testing.assert_close(torch.atan2(level.sigma, level.alpha), t * math.pi / 2)


@pytest.mark.parametrize("start,end,tau", [(-3, 3, 1.0), (-3, 3, 0.5), (0, 3, 0.3), (-1.0, 2.5, 1.1)])
def test_sigmoid_is_the_algorithm_of_the_paper(start, end, tau):
    """Chen 2023, algorithm 1 ("sigmoid_schedule"), without its clipping."""

    def logistic(x):
        return 1 / (1 + np.exp(-x))

    t = np.linspace(0, 1, 31)
    v_start, v_end = logistic(start / tau), logistic(end / tau)
    output = (v_end - logistic((t * (end - start) + start) / tau)) / (v_end - v_start)
    level = md.Sigmoid(start, end, tau)(torch.from_numpy(t))
    np.testing.assert_allclose(level.alpha.numpy() ** 2, output, atol=1e-14)
    np.testing.assert_allclose(level.sigma.numpy() ** 2, 1 - output, atol=1e-14)


def test_karras_interpolates_the_seventh_root():
    level = md.Karras(0.01, 10.0, rho=3.0)(number([0.0, 0.5, 1.0]))
    middle = ((0.01 ** (1 / 3) + 10 ** (1 / 3)) / 2) ** 3
    torch.testing.assert_close(level.sigma, number([0.01, middle, 10.0]))
    assert (level.alpha == 1).all()


def test_flow_is_a_straight_line():
    t = torch.rand(9, dtype=torch.float64)
    level = md.Flow()(t)
    assert torch.equal(level.alpha, 1 - t)
    assert torch.equal(level.sigma, t)


# --- what all have in common -----------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name):
    level = SCHEDULES[name](torch.linspace(0, 1, 1001, dtype=torch.float64))
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(level.t))


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_only_grows(name):
    level = SCHEDULES[name](torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert (level.log_snr.diff() < 0).all()
    assert (level.alpha.diff() <= 0).all()
    assert (level.sigma.diff() >= 0).all()  # 1 - 1e-20 is 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends(name):
    """t = 0 is data; t = 1 is noise, as far as the schedule promises."""
    schedule = SCHEDULES[name]
    clean, noise = schedule(0.0), schedule(1.0)
    assert clean.alpha == 1
    assert clean.sigma == (pytest.approx(0.002) if name == "karras" else 0)
    if name == "karras":
        assert noise.sigma == pytest.approx(80)
    elif name == "linear":
        assert noise.alpha**2 == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al.: KL at T of 1e-5 bits
    elif name == "vp":
        assert noise.alpha**2 == pytest.approx(math.exp(-0.1 - 19.9 / 2))  # Song et al. 2021b, eq. 33
    else:
        assert 0 <= noise.alpha < 1e-9
        assert noise.sigma == pytest.approx(1, abs=1e-15)


def test_alpha_is_never_negative_for_any_cosine():
    """(1 + s)/(1 + s) π/2 may round to more than π/2; a negative alpha has no logarithm, and every
    sample of a run would be nan."""
    tops = [md.Cosine(i / 1000)(1.0) for i in range(1000)]
    assert min(top.alpha.item() for top in tops) >= 0
    assert not any(top.log_snr.isnan() for top in tops)


def test_sigmoid_ends_exactly_for_any_parameters():
    generator = torch.Generator().manual_seed(0)
    for low, width, tau in torch.rand(300, 3, generator=generator, dtype=torch.float64).tolist():
        schedule = md.Sigmoid(-8 * low, -8 * low + 10 * width + 0.1, 0.2 + 2 * tau)
        for n in (1, 3, 8):  # a vectorised exponential may round otherwise than a lone one
            t = torch.cat([torch.linspace(0, 1, n, dtype=torch.float64), number([0.0, 1.0])])
            level = schedule(t)
            assert (level.sigma[t == 0] == 0).all()
            assert (level.alpha[t == 1] < 1e-9).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_may_be_numbers_or_tensors_of_any_kind(name):
    schedule = SCHEDULES[name]
    batch = schedule(number([0.0, 0.3, 1.0]))
    for i, t in enumerate([0, 0.3, 1]):
        alone = schedule(t)
        for part, entry in zip(alone, batch, strict=True):
            assert part.shape == ()
            assert part.dtype == torch.float64
            torch.testing.assert_close(part, entry[i], rtol=1e-14, atol=1e-16)
    half = schedule(torch.tensor([0.25, 0.5], dtype=torch.float16))
    assert half.alpha.dtype == torch.float64
    torch.testing.assert_close(half.sigma, schedule(number([0.25, 0.5])).sigma, rtol=1e-14, atol=0)


def test_a_python_number_is_not_rounded_to_float32():
    """torch.as_tensor(0.3) is a float32; t = i/1000 as a Python number must be the chain after i steps."""
    assert md.Cosine()(0.3).t.item() == 0.3
    product = torch.cumprod(1 - md.Linear().betas, 0)
    for i in (1, 7, 333, 999):
        assert md.Linear()(i / 1000).alpha.item() ** 2 == pytest.approx(product[i - 1].item(), rel=1e-12)


@pytest.mark.parametrize("t,named", [(-0.1, "-0.1"), (1.5, "1.5"), (math.nan, "nan")])
def test_times_outside_are_named(t, named):
    for bad in (t, number([0.5, t])):
        with pytest.raises(ValueError, match=rf"^t = {named} is outside \[0, 1\]: 0 is data, 1 is noise$"):
            md.Cosine()(bad)


# --- the levels of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", STEPS)
def test_levels_go_from_the_top_to_exactly_clean_data(name, n):
    schedule = SCHEDULES[name]
    levels = schedule.levels(n)
    assert len(levels) == n + 1
    assert levels[0] == schedule(1.0)
    assert levels[-1].sigma == 0  # exactly: DDPM's last step ends at x0, not at alpha_bar_1
    assert levels[-1].alpha == 1
    assert levels[-1].t == 0
    assert all(part.shape == () for level in levels for part in level)
    ratios = torch.stack([level.sigma / level.alpha for level in levels])
    assert (ratios.diff() < 0).all()


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "karras"])
@pytest.mark.parametrize("n", STEPS)
def test_levels_are_uniform_in_t(name, n):
    levels = SCHEDULES[name].levels(n)
    for i, level in enumerate(levels):
        assert level.t.item() == pytest.approx(1 - i / n, abs=1e-15)
        expected = SCHEDULES[name](level.t)
        assert torch.equal(level.sigma, expected.sigma)


@pytest.mark.parametrize("n", STEPS)
def test_levels_of_karras_are_equation_5(n):
    """sigma_i = (80^(1/7) + i/(n-1) (0.002^(1/7) - 80^(1/7)))^7 for i < n, and sigma_n = 0."""
    sigmas = [level.sigma.item() for level in md.Karras().levels(n)]
    top, bottom = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = [(top + i / max(n - 1, 1) * (bottom - top)) ** 7 for i in range(n)]
    assert sigmas == pytest.approx([*expected, 0.0], rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [0, -3])
def test_levels_need_a_step(name, n):
    with pytest.raises(ValueError, match=rf"levels: n = {n}: use at least 1"):
        SCHEDULES[name].levels(n)


# --- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        md.Linear(2e-4, 0.03, 77), md.Cosine(0.02), md.Sigmoid(-2, 4, 0.7), md.Karras(0.01, 50, 5), md.Flow(),
    ],
    ids=lambda schedule: type(schedule).__name__,
)  # fmt: skip
def test_config_round_trip(schedule):
    again = schedule_from_config(json.loads(json.dumps(schedule.config())))
    assert again == schedule
    assert type(again) is type(schedule)
    assert torch.equal(again(0.4).sigma, schedule(0.4).sigma)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="unknown schedule 'Quadratic': choose one of Linear, Betas,"):
        schedule_from_config({"name": "Quadratic"})


def test_schedules_cannot_be_changed_after_use():
    schedule = md.Linear()
    _ = schedule.betas  # computed once and kept, so the parameters must stay
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps = 10  # type: ignore[misc]


@pytest.mark.parametrize(
    "make,named",
    [
        (lambda: md.Linear(beta_min=0), "beta_min = 0 "),
        (lambda: md.Linear(beta_max=1.5), "beta_max = 1.5 "),
        (lambda: md.Linear(steps=0), "steps = 0"),
        (lambda: md.Cosine(-0.1), "offset = -0.1 "),
        (lambda: md.Sigmoid(3, -3), "start = 3 "),
        (lambda: md.Sigmoid(tau=0), "tau = 0 "),
        (lambda: md.Karras(sigma_min=0), "sigma_min = 0 "),
        (lambda: md.Karras(sigma_max=0.001), "sigma_max = 0.001"),
        (lambda: md.Karras(rho=-1), "rho = -1 "),
    ],
)
def test_bad_parameters_are_named_in_one_line(make, named):
    with pytest.raises(ValueError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


# --- spacings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_the_inverse_of_log_snr(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0.001, 0.999, 333, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule(t).log_snr), t, rtol=0, atol=1e-9)
    assert schedule.time(math.inf) == 0
    assert schedule.time(-math.inf) == 1


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "trailing", "log_snr", "karras"])
@pytest.mark.parametrize("n", STEPS)
def test_every_spacing_falls_from_noise_to_data(name, spacing, n):
    levels = SCHEDULES[name].levels(n, spacing)
    assert len(levels) == n + 1
    assert levels[-1].sigma == 0
    assert levels[-1].alpha == 1
    ratios = torch.stack([level.sigma / level.alpha for level in levels])
    assert (ratios.diff() < 0).all()
    assert ratios[0] > 10  # a start that pure noise may stand for


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_the_schedule_is_asked_for_all_levels_at_once(name, spacing, monkeypatch):
    """One by one a hundred thousand levels took seconds, of a shifted schedule minutes."""
    asked = []
    kind = type(SCHEDULES[name])
    coefficients = kind.coefficients

    def spy(self, t):
        asked.append(t.numel())
        return coefficients(self, t)

    monkeypatch.setattr(kind, "coefficients", spy)
    counts = []
    for n in (10, 1000):
        asked.clear()
        assert len(SCHEDULES[name].levels(n, spacing)) == n + 1
        counts.append(len(asked))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_spacing_is_even_in_log_snr(name):
    log_snr = torch.stack([level.log_snr for level in SCHEDULES[name].levels(12, "log_snr")[:-1]])
    torch.testing.assert_close(log_snr.diff(), log_snr.diff().mean().expand(11))
    assert log_snr[0] >= -2 * math.log(80) - 1e-9
    assert log_snr[-1] <= -2 * math.log(0.002) + 1e-9


def test_karras_spacing_is_the_formula_of_the_paper_on_any_schedule():
    """Karras et al. 2022, eq. 5, which the Karras schedule follows by itself."""
    own = torch.stack([level.sigma for level in md.Karras().levels(9)])
    for name in ("cosine", "karras", "shifted"):
        levels = SCHEDULES[name].levels(9, "karras")
        ratios = torch.stack([level.sigma / level.alpha for level in levels])
        torch.testing.assert_close(ratios, own, rtol=1e-6, atol=0)


def test_trailing_times_lie_on_the_grid_of_the_chain():
    """Lin et al. 2023, table 2: round(flip(arange(T, 0, -T/n))), the last timestep first."""
    times = [level.t.item() * 1000 for level in md.Linear().levels(7, "trailing")[:-1]]
    assert times == pytest.approx([1000, 857, 714, 571, 429, 286, 143])
    with pytest.raises(ValueError, match=r"levels\(30\): a chain of 20 steps"):
        md.Linear(steps=20).levels(30, "trailing")


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_unknown_spacing_is_named(name):
    with pytest.raises(ValueError, match="unknown spacing 'leading': choose one of uniform"):
        SCHEDULES[name].levels(5, "leading")


# --- variants --------------------------------------------------------------------------------------


def test_the_chain_tends_to_its_continuous_limit():
    """Song et al. 2021b, appendix B: T steps with betas beta(t)/T; the difference falls like 1/T."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    limit = md.VP()(t).log_snr[1:]
    errors = [
        (md.Linear(0.1 / steps, 20 / steps, steps)(t).log_snr[1:] - limit).abs().max().item()
        for steps in (1000, 10_000)
    ]
    assert errors[0] < 0.12
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)


def test_vp_is_the_integral_of_its_rate():
    t = number(0.37)
    times = torch.linspace(0, 0.37, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + times * 19.9, times)
    assert md.VP()(t).alpha.item() ** 2 == pytest.approx(math.exp(-integral.item()), rel=1e-9)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_of_the_flow_is_sd3s_formula(shift):
    """Esser et al. 2024, eq. 23."""
    t = torch.linspace(0, 1, 51, dtype=torch.float64)
    level = md.Shifted(md.Flow(), shift)(t)
    wanted = shift * t / (1 + (shift - 1) * t)
    torch.testing.assert_close(level.sigma, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(level.alpha, 1 - wanted, rtol=0, atol=1e-12)
    assert torch.equal(level.t, t)  # what the network is told


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "linear", "flow"])
def test_shift_scales_the_ratio_of_noise_to_data(name):
    t = torch.linspace(0.01, 0.9, 41, dtype=torch.float64)
    base, shifted = SCHEDULES[name](t), md.Shifted(SCHEDULES[name], 2.0)(t)
    torch.testing.assert_close(shifted.sigma / shifted.alpha, 2 * base.sigma / base.alpha, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_come_back_from_json(name):
    config = json.loads(json.dumps(SCHEDULES[name].config()))
    assert schedule_from_config(config) == SCHEDULES[name]


def test_bad_variants_are_named():
    with pytest.raises(ValueError, match="shift = 0 must be positive"):
        md.Shifted(md.Flow(), 0)
    with pytest.raises(ValueError, match="beta_min = -1 and beta_max = 20 are rates"):
        md.VP(-1.0)
