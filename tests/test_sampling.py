import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from helpers import SCHEDULES, gaussian, gaussian_flow, point_mass, two_peaks
from torch import Tensor

import minidiff as md
from minidiff.forward import posterior_std
from minidiff.sampling import SAMPLERS, randn_like

STEPS = (1, 2, 7, 13, 20, 50)
all_samplers = pytest.mark.parametrize("sampler", SAMPLERS)
all_schedules = pytest.mark.parametrize("name", SCHEDULES)
CALLS = [("ddim", 8), ("ddpm", 8), ("dpmpp_2m", 8), ("unipc", 8), ("heun", 15)]
ODE_SAMPLERS = ("ddim", "heun", "dpmpp_2m", "unipc")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(sampler: str, denoise, x: Tensor, levels, seed: int = 0) -> list[md.State]:
    """All states; ddpm alone takes noise."""
    noise = {"generator": generator(seed)} if sampler == "ddpm" else {}
    return list(SAMPLERS[sampler](denoise, x, levels, **noise))


class Counting:
    """A denoiser that keeps the levels it was asked at."""

    def __init__(self, denoise):
        self.denoise, self.levels = denoise, []

    def __call__(self, x_t, level):
        self.levels.append(level)
        return self.denoise(x_t, level)


# --- noise and seeds -------------------------------------------------------------------------------


def test_each_image_has_the_noise_of_its_own_seed():
    level = md.Karras()(1.0)
    x = md.noise((3, 2, 4), level, generator=md.generators(10, 3))
    assert x.dtype == torch.float64
    for i in range(3):
        own = torch.randn(2, 4, generator=generator(10 + i))
        torch.testing.assert_close(x[i], level.sigma * own.double())
    later = md.noise((1, 2, 4), level, generator=md.generators(12, 1))
    assert torch.equal(later[0], x[2])


def test_starting_noise_is_as_strong_as_the_level():
    for name, schedule in SCHEDULES.items():
        level = schedule(1.0)
        x = md.noise((20_000,), level, generator=generator(3))
        assert scipy.stats.kstest(x / level.sigma, "norm").pvalue > 1e-3, name


def test_generators_are_counted():
    with pytest.raises(ValueError, match="2 generators for 3 samples: give one per sample"):
        randn_like(torch.zeros(3, 2), md.generators(0, 2))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        md.noise((3, 2), md.Flow()(1.0), generator=md.generators(0, 2))


@all_samplers
@all_schedules
def test_image_i_does_not_depend_on_the_batch(sampler, name):
    """Seed s of a batch of 5 is seed s alone (to rounding: vectorised functions differ in the last bit)."""
    levels, denoise = SCHEDULES[name].levels(6), two_peaks(0.3)

    def draw(seed: int, n: int) -> Tensor:
        generators = md.generators(seed, n)
        x = md.noise((n, 2, 3), levels[0], generator=generators)
        extra = {"generator": generators} if sampler == "ddpm" else {}
        return md.sample(SAMPLERS[sampler](denoise, x, levels, **extra))

    together = draw(100, 5)
    for i in range(5):
        torch.testing.assert_close(draw(100 + i, 1)[0], together[i], rtol=1e-10, atol=1e-10)
    assert len({tuple(sample.flatten().tolist()) for sample in together}) == 5


# --- what every sampler does -----------------------------------------------------------------------


@all_samplers
@all_schedules
@pytest.mark.parametrize("n", STEPS)
def test_a_point_mass_is_found_in_any_number_of_steps(sampler, name, n):
    """If all data are c, the exact denoiser says so at once, and no right sampler ends anywhere else: not
    with noise left, not scaled, not one level off."""
    c = torch.tensor([1.5, -0.5], dtype=torch.float64)
    levels = SCHEDULES[name].levels(n)
    x = md.noise((4, 2), levels[0], generator=generator())
    states = run(sampler, point_mass(c), x, levels)
    assert len(states) == n
    for state, level in zip(states, levels[1:], strict=True):
        assert state.level == level
    torch.testing.assert_close(states[-1].x, c.expand(4, 2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
@all_schedules
def test_on_a_point_mass_every_state_lies_on_the_line(sampler, name):
    """There eps never changes, so x_t = alpha*c + sigma*eps at every level, not only at the last."""
    levels = SCHEDULES[name].levels(7)
    eps = torch.randn(3, 2, generator=generator(), dtype=torch.float64)
    x = levels[0].alpha * 0.5 + levels[0].sigma * eps
    for state in run(sampler, point_mass(0.5), x, levels):
        expected = state.level.alpha * 0.5 + state.level.sigma * eps
        torch.testing.assert_close(state.x, expected, rtol=1e-9, atol=1e-9)


@all_samplers
@all_schedules
def test_the_last_step_adds_no_noise(sampler, name):
    """It ends at the denoiser's x0 itself, whatever the random numbers."""
    levels = SCHEDULES[name].levels(5)
    denoise = Counting(two_peaks(0.3))
    x = md.noise((4, 2), levels[0], generator=generator())
    states = run(sampler, denoise, x, levels)
    guess = two_peaks(0.3)(states[-2].x, levels[-2]).x0
    torch.testing.assert_close(states[-1].x, guess, rtol=1e-12, atol=1e-12)
    assert torch.equal(states[-1].x, states[-1].x0)
    before, clean = levels[-2], levels[-1]
    assert posterior_std(before, clean) == 0


@all_samplers
@all_schedules
def test_one_step_is_the_guess_from_pure_noise(sampler, name):
    levels = SCHEDULES[name].levels(1)
    x = md.noise((4, 2), levels[0], generator=generator())
    (state,) = run(sampler, two_peaks(0.3), x, levels)
    torch.testing.assert_close(state.x, two_peaks(0.3)(x, levels[0]).x0, rtol=1e-12, atol=1e-12)


@all_schedules
@pytest.mark.parametrize("sampler,calls", CALLS)
def test_calls_of_the_network(name, sampler, calls):
    """One a step; Heun two, but for the last step and for a first step from alpha = 0."""
    levels, denoise = SCHEDULES[name].levels(8), Counting(two_peaks(0.3))
    run(sampler, denoise, md.noise((1, 2), levels[0], generator=generator()), levels)
    if sampler == "heun" and levels[0].alpha < 1e-9:
        calls -= 1
    assert len(denoise.levels) == calls
    if sampler != "heun":
        assert denoise.levels == levels[:-1]


@all_samplers
def test_states_are_float64_and_free_of_gradients(sampler):
    model = md.Diffusion(md.MLP(2, 32, 1), md.Cosine(), "v")
    torch.nn.init.normal_(model.net.last.weight)
    levels = md.Cosine().levels(3)
    for state in run(sampler, model.denoise, torch.zeros(2, 2), levels):
        assert state.x.dtype == state.x0.dtype == torch.float64
        assert not state.x.requires_grad


@all_samplers
def test_levels_are_checked(sampler):
    levels, x = md.Cosine().levels(4), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"1 levels make no step: schedule.levels\(n\) gives n \+ 1"):
        run(sampler, point_mass(0.0), x, levels[:1])
    with pytest.raises(ValueError, match=r"does not from t = 0.25 to t = 0.5"):
        run(sampler, point_mass(0.0), x, [levels[0], levels[3], levels[2]])
    with pytest.raises(ValueError, match="noise must fall"):
        run(sampler, point_mass(0.0), x, [levels[1], levels[1]])


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_is_a_share(eta):
    with pytest.raises(ValueError, match=rf"eta = {eta} is outside \[0, 1\]"):
        list(md.ddim(point_mass(0.0), torch.zeros(1, 2), md.Cosine().levels(2), eta=eta))


def test_sample_is_the_last_state():
    levels = md.Cosine().levels(3)
    states = list(md.ddim(two_peaks(0.3), torch.ones(1, 2), levels))
    assert md.sample(states) is states[-1].x
    with pytest.raises(ValueError, match="the sampler made no step"):
        md.sample([])


# --- randomness ------------------------------------------------------------------------------------


@all_schedules
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_draws_from_the_posterior(name, eta):
    """From one x_t and a known x0, DDIM's eq. 12 draws from N(alpha_s x0 + sqrt(sigma_s² - v²) eps, v²)
    with v = eta times the posterior's; for eta = 1 that is q(x_s | x_t, x0). Mean, standard deviation
    and fourth moment over many draws."""
    n, c = 100_000, 0.6
    level, target = SCHEDULES[name].levels(10)[3:5]
    eps = torch.tensor(-0.9, dtype=torch.float64)
    x_t = (level.alpha * c + level.sigma * eps).expand(n)
    (state,) = md.ddim(point_mass(c), x_t, [level, target], eta=eta, generator=generator(1))
    std = eta * posterior_std(level, target)
    mean = target.alpha * c + (target.sigma**2 - std**2).sqrt() * eps
    if eta == 0:
        torch.testing.assert_close(state.x, mean.expand(n))
        return
    if eta == 1:
        exact = md.posterior(x_t[:1], torch.full((1,), c, dtype=torch.float64), level, target)
        torch.testing.assert_close(mean, exact.mean[0])
        torch.testing.assert_close(std, exact.std)
    deviation = (state.x - mean) / std
    assert abs(deviation.mean()) < 4 / n**0.5
    assert abs(deviation.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((deviation**4).mean() - 3) < 4 * (96 / n) ** 0.5


@all_schedules
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_keeps_the_marginals(name, eta):
    """Song et al. 2021, section 3: whatever eta, x_s is distributed as q(x_s | x0) at every level."""
    n, c = 50_000, -0.7
    levels = SCHEDULES[name].levels(6)
    x = levels[0].alpha * c + md.noise((n,), levels[0], generator=generator(2))
    for state in md.ddim(point_mass(c), x, levels, eta=eta, generator=generator(3)):
        if state.level.sigma > 0:
            standard = (state.x - state.level.alpha * c) / state.level.sigma
            assert scipy.stats.kstest(standard, "norm").pvalue > 1e-4


def test_ddpm_is_ddim_with_eta_1():
    levels = md.Cosine().levels(5)
    x = md.noise((3, 2), levels[0], generator=generator())
    one = md.sample(md.ddpm(two_peaks(0.3), x, levels, generator=generator(1)))
    other = md.sample(md.ddim(two_peaks(0.3), x, levels, eta=1.0, generator=generator(1)))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(one, md.sample(md.ddpm(two_peaks(0.3), x, levels, generator=generator(2))))


def test_fresh_noise_at_every_step():
    """The noise of different steps is independent: on a point mass the part of x that is not carried over
    is exactly what was added."""
    levels = md.Cosine().levels(6)
    x = md.noise((20_000,), levels[0], generator=generator())
    added, before = [], x
    for (level, target), state in zip(
        pairwise(levels), md.ddpm(point_mass(0.0), x, levels, generator=generator(1)), strict=True
    ):
        std = posterior_std(level, target)
        kept = (target.sigma**2 - std**2).clamp(min=0).sqrt()
        if std > 0:
            added.append((state.x - kept * before / level.sigma) / std)
        before = state.x
    correlations = torch.corrcoef(torch.stack([x / levels[0].sigma, *added]))
    assert (correlations - torch.eye(6)).abs().max() < 5 / 20_000**0.5


# --- accuracy --------------------------------------------------------------------------------------


@all_schedules
@pytest.mark.parametrize("sampler,order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence(name, sampler, order):
    """On Gaussian data the probability-flow ODE has a solution in closed form: with twice the steps the
    error must fall by 2 (first order), by 4 (second) or by 8 (third).

    Measured between t = 0.9 and t = 0.1. Over a whole run the two ends may hide the order: where sigma
    grows like sqrt(t), as in all schedules of DDPM's kind, the last step alone errs by O(1/n).
    """
    schedule, mean, std, errors = SCHEDULES[name], 0.7, 0.4, []
    z = torch.tensor([-1.3, 0.4, 2.1], dtype=torch.float64)
    for n in (640, 1280) if sampler == "unipc" else (160, 320):  # its error crosses 0 on the way
        levels = [schedule(t) for t in torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)]
        start = levels[0].alpha * mean + ((levels[0].alpha * std) ** 2 + levels[0].sigma ** 2).sqrt() * z
        exact = gaussian_flow(start, levels[0], levels[-1], mean, std)
        errors.append((run(sampler, gaussian(mean, std), start, levels)[-1].x - exact).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("name", ["karras", "flow", "cosine"])
def test_second_order_pays(sampler, name):
    """At equal calls of the network (80), second order comes much closer than DDIM, over a whole run."""

    def error(sampler: str, n: int) -> float:
        levels = SCHEDULES[name].levels(n)
        x = levels[0].sigma * torch.linspace(-2, 2, 9, dtype=torch.float64)
        exact = gaussian_flow(x, levels[0], levels[-1], 0.7, 0.4)
        return (run(sampler, gaussian(0.7, 0.4), x, levels)[-1].x - exact).abs().max().item()

    assert error(sampler, 40 if sampler == "heun" else 80) < 0.4 * error("ddim", 80)


def test_from_the_middle():
    """img2img: ``levels[k:]`` from a sample diffused to ``levels[k]``, as exact as a whole run."""
    levels = md.Cosine().levels(200)
    x0 = 0.7 + 0.4 * torch.linspace(-2, 2, 9, dtype=torch.float64)
    eps = torch.randn(9, generator=generator(), dtype=torch.float64)
    for k in (50, 150, 199):
        x = md.diffuse(x0, eps, levels[k])
        exact = gaussian_flow(x, levels[k], levels[-1], 0.7, 0.4)
        found = run("heun", gaussian(0.7, 0.4), x, levels[k:])[-1].x
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


STEPS = [("ddpm", 200), ("ddim", 200), ("heun", 40), ("dpmpp_2m", 60), ("unipc", 40)]


@pytest.mark.parametrize("sampler,n", STEPS)
@pytest.mark.parametrize("name", ["cosine", "karras", "flow"])
def test_samples_have_the_distribution_of_the_data(sampler, n, name):
    """Two narrow peaks, from pure noise: a test of the whole distribution (Kolmogorov-Smirnov) and of the
    second and fourth moments, which noise put in twice or at the wrong place would change."""
    std, count = 0.25, 4000
    levels = SCHEDULES[name].levels(n)
    x = md.noise((count,), levels[0], generator=generator(5))
    found = run(sampler, two_peaks(std), x, levels, seed=6)[-1].x

    def cdf(value):
        normal = scipy.stats.norm.cdf
        return (normal((value - 1) / std) + normal((value + 1) / std)) / 2

    assert scipy.stats.kstest(found.numpy(), cdf).pvalue > 1e-3
    second, fourth = 1 + std**2, 1 + 6 * std**2 + 3 * std**4
    eighth = 1 + 28 * std**2 + 210 * std**4 + 420 * std**6 + 105 * std**8
    for power, exact, variance in ((2, second, fourth - second**2), (4, fourth, eighth - fourth**2)):
        error = (found**power).mean().item() - exact
        assert abs(error) < 4 * (variance / count) ** 0.5 + 0.02 * exact, power


@pytest.mark.parametrize("n", [3, 10])
def test_the_transition_variance_is_right_for_normal_data(n):
    """Ho et al. 2020, section 3.2: for data N(0, I) the larger variance beta makes every step back exact,
    and beta tilde loses variance. At the last step no noise is added in either case."""
    levels = md.Cosine().levels(n)
    x = md.noise((200_000, 1), levels[0], generator=torch.Generator().manual_seed(0))
    stds = {}
    for variance in ("transition", "posterior"):
        run = md.ddpm(
            gaussian(0.0, 1.0), x, levels, variance=variance,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        stds[variance] = [state.x.std().item() for state in run][:-1]
    assert stds["transition"] == pytest.approx([1.0] * (n - 1), abs=0.01)
    assert stds["posterior"][-1] < 0.97


def test_an_unknown_variance_is_named():
    with pytest.raises(ValueError, match="unknown variance 'beta': choose 'posterior' or 'transition'"):
        list(md.ddpm(gaussian(0.0, 1.0), torch.zeros(1, 1), md.Cosine().levels(2), variance="beta"))


@pytest.mark.parametrize("sampler", [md.ddpm, md.ddim, md.heun, md.dpmpp_2m, md.unipc])
def test_a_model_in_place_of_its_denoiser_is_refused(sampler):
    """A batch of two would be taken apart into x0 and eps, and something would come out."""
    model = md.Diffusion(md.MLP(dim=2), md.Cosine(), "v")
    levels = model.schedule.levels(3)
    with pytest.raises(ValueError, match=r"not a Diffusion: give model\.denoise"):
        md.sample(sampler(model, md.noise((2, 2), levels[0]), levels))


@pytest.mark.parametrize("name", ["cosine", "linear-zero-snr", "flow"])
def test_unipc_corrects_a_step_from_pure_noise(name):
    """The first step, from alpha = 0, is made again by the trapezoidal rule over alpha/sigma. To half the
    signal, DDIM's first step errs by a quarter; the corrected one by an eighth or less."""
    schedule, mean, std = SCHEDULES[name], 0.7, 0.4
    z = torch.tensor([-1.3, 0.4, 2.1], dtype=torch.float64)
    order = {}
    for sampler in ("ddim", "unipc"):
        errors = []
        for share in (0.04, 0.02):
            at = [schedule(schedule.time(2 * math.log(r))) for r in (share, 1.001 * share)]
            levels = [schedule(1.0), *at]
            start = z * levels[0].sigma
            exact = gaussian_flow(start, levels[0], levels[-1], mean, std)
            errors.append((run(sampler, gaussian(mean, std), start, levels)[-1].x - exact).norm().item())
        order[sampler] = math.log2(errors[0] / errors[1])
    assert order["ddim"] == pytest.approx(2, abs=0.2)
    assert order["unipc"] > 2.8
