import mpmath
import pytest
import torch
from helpers import SCHEDULES

import minidiff as md
from minidiff.forward import broadcast, posterior_std, target_coefficients

TARGETS = ("eps", "x0", "v", "flow", "edm")
# Pairs s < t: neighbours, far apart, near both ends.
PAIRS = [(0.001, 0.002), (0.1, 0.101), (0.2, 0.7), (0.03, 0.96), (0.5, 0.55), (0.97, 0.99)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --- diffuse ---------------------------------------------------------------------------------------


def test_diffuse_mixes_each_sample_with_its_own_level():
    x0, eps = randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=1)
    level = md.Cosine()(torch.tensor([0.1, 0.5, 0.9]))
    x_t = md.diffuse(x0, eps, level)
    for i in range(3):
        by_hand = level.alpha[i].item() * x0[i] + level.sigma[i].item() * eps[i]
        torch.testing.assert_close(x_t[i], by_hand)
    one = md.diffuse(x0, eps, md.Cosine()(0.5))
    torch.testing.assert_close(one[1], x_t[1], rtol=1e-6, atol=1e-6)


def test_diffuse_keeps_the_dtype_of_the_data():
    x0 = torch.ones(2, 3)
    assert md.diffuse(x0, x0, md.Flow()(0.5)).dtype == torch.float32


def test_diffuse_has_the_moments_of_the_marginal():
    """Mean alpha*x0, variance sigma², kurtosis 3, over a hundred thousand draws."""
    n, level = 200_000, md.Cosine()(0.4)
    x_t = md.diffuse(torch.full((n,), 2.0, dtype=torch.float64), randn(n), level)
    centred = x_t - 2 * level.alpha
    assert abs(centred.mean() / level.sigma) < 4 / n**0.5
    assert abs(centred.var() / level.sigma**2 - 1) < 4 * (2 / n) ** 0.5
    assert abs((centred**4).mean() / level.sigma**4 - 3) < 4 * (96 / n) ** 0.5


def test_diffuse_names_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"eps has shape \(2, 4\), x0 has \(2, 3\)"):
        md.diffuse(torch.zeros(2, 3), torch.zeros(2, 4), md.Flow()(0.5))
    with pytest.raises(ValueError, match=r"4 samples does not fit x of shape \(3, 2\)"):
        md.diffuse(torch.zeros(3, 2), torch.zeros(3, 2), md.Flow()(torch.full((4,), 0.5)))


def test_broadcast_shapes():
    x = torch.zeros(3, 2, 4, 4)
    assert broadcast(torch.ones(()), x).shape == ()
    assert broadcast(torch.ones(3), x).shape == (3, 1, 1, 1)
    assert broadcast(torch.ones(3, dtype=torch.float64), x).dtype == torch.float32
    assert all(part.shape == (3, 1, 1, 1) for part in md.Flow()(torch.rand(3)).like(x))


# --- the chain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("s,t", PAIRS)
def test_marginal_then_transition_is_the_later_marginal(name, s, t):
    """q(x_t | x0) = ∫ q(x_t | x_s) q(x_s | x0) dx_s, for the mean and for the variance."""
    level_s, level_t = SCHEDULES[name](number(s)), SCHEDULES[name](number(t))
    scale = md.transition(number(1.0).reshape(1), level_s, level_t).mean[0]
    std = md.transition(number(1.0).reshape(1), level_s, level_t).std
    torch.testing.assert_close(scale * level_s.alpha, level_t.alpha, rtol=1e-12, atol=0)
    variance = (scale * level_s.sigma) ** 2 + std**2
    torch.testing.assert_close(variance, level_t.sigma**2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chain_of_a_thousand_transitions_is_the_marginal(name):
    """Composing q(x_t | x_{t-1}) step by step from clean data gives q(x_t | x0) at every step."""
    schedule, steps = SCHEDULES[name], 1000
    one = torch.ones(1, dtype=torch.float64)
    level = schedule(number(0.0))
    mean, variance = level.alpha * one, level.sigma**2 * one
    for i in range(1, steps):  # not to t = 1: there alpha is 0 for some
        after = schedule(number(i / steps))
        step = md.transition(mean, level, after)
        scale = md.transition(one, level, after).mean
        mean, variance = step.mean, scale**2 * variance + step.std**2
        level = after
    torch.testing.assert_close(mean, level.alpha * one, rtol=1e-10, atol=0)
    torch.testing.assert_close(variance, level.sigma**2 * one, rtol=1e-10, atol=0)


def test_transition_between_neighbours_of_ddpm():
    """Ho et al. 2020, eq. 2: scale sqrt(1 - beta_t), variance beta_t."""
    schedule = md.Linear(steps=50)
    levels = [schedule(number(i / 50)) for i in range(51)]
    for beta, before, after in zip(schedule.betas, levels, levels[1:], strict=False):
        step = md.transition(torch.ones(1, dtype=torch.float64), before, after)
        torch.testing.assert_close(step.mean[0], (1 - beta).sqrt(), rtol=1e-10, atol=0)
        torch.testing.assert_close(step.std, beta.sqrt(), rtol=1e-10, atol=0)


def test_transition_takes_levels_per_sample():
    schedule, x = md.Cosine(), randn(3, 2, 2)
    s, t = number([0.1, 0.2, 0.3]), number([0.5, 0.9, 0.31])
    together = md.transition(x, schedule(s), schedule(t))
    for i in range(3):
        alone = md.transition(x[i : i + 1], schedule(s[i]), schedule(t[i]))
        torch.testing.assert_close(together.mean[i], alone.mean[0])
        torch.testing.assert_close(together.std[i].squeeze(), alone.std)


# --- the posterior ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("s,t", PAIRS)
def test_bayes(name, s, t):
    """q(x_s | x_t, x0) q(x_t | x0) = q(x_t | x_s) q(x_s | x0) as densities, at random points."""
    level_s, level_t = SCHEDULES[name](number(s)), SCHEDULES[name](number(t))
    x0 = randn(64)
    x_s = level_s.alpha * x0 + level_s.sigma * randn(64, seed=1)
    there = md.transition(x_s, level_s, level_t)
    x_t = there.mean + there.std * randn(64, seed=2)
    back = md.posterior(x_t, x0, level_t, level_s)

    def log_density(x, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(x)

    left = log_density(x_s, back.mean, back.std)
    left = left + log_density(x_t, level_t.alpha * x0, level_t.sigma)
    right = log_density(x_t, there.mean, there.std)
    right = right + log_density(x_s, level_s.alpha * x0, level_s.sigma)
    torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_the_conditional_of_the_joint_gaussian(name):
    """By the textbook rule for Gaussians: mean + cov/var (x_t - mean_t), variance - cov²/var."""
    level_s, level_t = SCHEDULES[name](number(0.3)), SCHEDULES[name](number(0.8))
    x_t, x0 = randn(16), randn(16, seed=1)
    covariance = level_t.alpha / level_s.alpha * level_s.sigma**2
    mean = level_s.alpha * x0 + covariance / level_t.sigma**2 * (x_t - level_t.alpha * x0)
    std = (level_s.sigma**2 - covariance**2 / level_t.sigma**2).sqrt()
    posterior = md.posterior(x_t, x0, level_t, level_s)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.std, std, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior_std(level_t, level_s), std, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_to_clean_data_is_the_data(name):
    """At sigma_s = 0 nothing is uncertain: the mean is x0, the standard deviation 0."""
    *_, before, clean = SCHEDULES[name].levels(10)
    x_t, x0 = randn(5), randn(5, seed=1)
    posterior = md.posterior(x_t, x0, before, clean)
    torch.testing.assert_close(posterior.mean, x0, rtol=1e-12, atol=1e-12)
    assert posterior.std == 0


def test_posterior_from_pure_noise_forgets_x_t():
    """At alpha_t = 0, x_t knows nothing: the posterior is the marginal at s."""
    top, below = md.Flow().levels(4)[:2]
    assert top.alpha == 0
    x0 = randn(5)
    posterior = md.posterior(randn(5, seed=1), x0, top, below)
    torch.testing.assert_close(posterior.mean, below.alpha * x0)
    torch.testing.assert_close(posterior.std, below.sigma)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, early, late: md.transition(x, late, early),
        lambda x, early, late: md.posterior(x, x, early, late),
        lambda x, early, late: posterior_std(early, late),
    ],
    ids=["transition", "posterior", "posterior_std"],
)
def test_levels_in_the_wrong_order_are_rejected(call):
    """Both functions name the level of their sample first, so swapping them is easy; the variance would
    be negative and its root nan."""
    with pytest.raises(ValueError, match=r"from t = 0\.6 to t = 0\.3 noise falls"):
        call(torch.zeros(1, 2), md.Cosine()(0.3), md.Cosine()(0.6))


# --- targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_round_trip(name, target):
    level = SCHEDULES[name](number([0.001, 0.01, 0.3, 0.7, 0.99]))
    x0, eps = randn(5, 3, 2), randn(5, 3, 2, seed=1)
    x_t = md.diffuse(x0, eps, level)
    found = md.from_target(md.to_target(x0, eps, level, target), x_t, level, target)
    # The less of something x_t holds, the more its rounding (1e-16) is amplified when it is solved for.
    worst = 1e-13 * max((level.alpha / level.sigma).max().item(), level.sigma.max().item())
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=max(worst, 1e-12))
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=max(worst, 1e-12))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_solve_the_two_equations(name, target):
    """x_t = alpha*x0 + sigma*eps and out = p*x0 + q*eps, solved by linear algebra for any ``out``."""
    level = SCHEDULES[name](number(0.37))
    p, q = target_coefficients(target, level)
    matrix = torch.stack([torch.stack([level.alpha, level.sigma]), torch.stack([p, q])])
    determinant = torch.linalg.det(matrix)
    torch.testing.assert_close(determinant, level.alpha * q - level.sigma * p)
    x_t, out = randn(7), randn(7, seed=1)
    x0, eps = torch.linalg.solve(matrix, torch.stack([x_t, out]))
    found = md.from_target(out, x_t, level, target)
    torch.testing.assert_close(found.x0, x0)
    torch.testing.assert_close(found.eps, eps)


def test_targets_say_what_the_papers_say():
    level = md.Cosine()(number(0.3))
    alpha, sigma = level.alpha, level.sigma
    x0, eps = randn(7), randn(7, seed=1)
    x_t = md.diffuse(x0, eps, level)
    # Salimans & Ho 2022: v = alpha*eps - sigma*x0, so x0 = alpha*x_t - sigma*v (variance preserving)
    v = md.to_target(x0, eps, level, "v")
    torch.testing.assert_close(v, alpha * eps - sigma * x0)
    torch.testing.assert_close(alpha * x_t - sigma * v, x0)
    # v is the velocity of x_t along the circle: d(alpha, sigma)/d(angle) = (-sigma, alpha)
    angle = torch.atan2(sigma, alpha).requires_grad_()
    for k in range(7):
        circle = angle.cos() * x0[k] + angle.sin() * eps[k]
        torch.testing.assert_close(torch.autograd.grad(circle, angle)[0], v[k])
    # Lipman et al. 2023: with x_t = (1 - t) x0 + t eps the velocity dx_t/dt is eps - x0
    velocity = md.to_target(x0, eps, level, "flow")
    torch.testing.assert_close(velocity, eps - x0)
    flow = md.Flow()(number(0.3))
    x_t = md.diffuse(x0, eps, flow)
    torch.testing.assert_close(x_t - 0.3 * velocity, x0)
    assert torch.equal(md.to_target(x0, eps, level, "eps"), eps)
    assert torch.equal(md.to_target(x0, eps, level, "x0"), x0)


def test_from_target_computes_in_the_dtype_of_the_output():
    out = torch.randn(2, 3)
    x0, eps = md.from_target(out, torch.randn(2, 3), md.Cosine()(number(0.4)), "v")
    assert x0.dtype == eps.dtype == torch.float32


@pytest.mark.parametrize("name", ["cosine", "sigmoid", "flow"])
def test_eps_is_rejected_at_pure_noise(name):
    """cos(pi/2) is 6e-17 in floating point: dividing by it would give an x0 of 1e16."""
    schedule = SCHEDULES[name]
    x = torch.zeros(2, 3, dtype=torch.float64)
    message = r"'eps' is undefined at t = 1.*use target 'x0', 'v' or 'flow'$"
    with pytest.raises(ValueError, match=message) as error:
        md.from_target(x, x, schedule(1.0), "eps")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"at t = 1:"):  # one bad sample is enough, and it is the one named
        md.from_target(x, x, schedule(number([0.5, 1.0])), "eps")
    for target in ("x0", "v", "flow"):
        assert torch.isfinite(md.from_target(x, x, schedule(1.0), target).x0).all()


def test_x0_is_rejected_at_clean_data():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"'x0' is undefined at t = 0: .*no noise"):
        md.from_target(x, x, md.Cosine()(0.0), "x0")
    for target in ("eps", "v", "flow"):
        assert torch.isfinite(md.from_target(x, x, md.Cosine()(0.0), target).eps).all()


def test_unknown_target_is_rejected():
    with pytest.raises(ValueError, match="unknown target 'noise': choose one of eps, x0, v, flow"):
        md.to_target(torch.zeros(1), torch.zeros(1), md.Flow()(0.5), "noise")  # type: ignore[arg-type]


# --- numbers ---------------------------------------------------------------------------------------


def exact_sigma(name: str, t: float) -> float:
    """sigma(t) from the papers' formulas with 50 digits."""
    with mpmath.workdps(50):
        t = mpmath.mpf(t)
        if name == "cosine":
            shift = mpmath.mpf(0.008)
            f_0, f_t = (mpmath.cos((u + shift) / (1 + shift) * mpmath.pi / 2) for u in (0, t))
            return float(mpmath.sqrt(1 - (f_t / f_0) ** 2))
        if name == "sigmoid":
            low, high, at = (1 / (1 + mpmath.exp(-x)) for x in (-3, 3, -3 + 6 * t))
            return float(mpmath.sqrt((at - low) / (high - low)))
        if name == "vp":
            return float(mpmath.sqrt(-mpmath.expm1(-(mpmath.mpf("0.1") * t + mpmath.mpf("19.9") * t**2 / 2))))
        assert name == "linear"
        assert t < 0.00100001  # the first step: alpha² = (1 - beta_1)^(1000 t)
        return float(mpmath.sqrt(1 - (1 - mpmath.mpf(1e-4)) ** (1000 * t)))


@pytest.mark.parametrize("name", ["linear", "vp", "cosine", "sigmoid"])
@pytest.mark.parametrize("t", [1e-3, 1e-4, 1e-6, 1e-8])
def test_sigma_is_precise_at_tiny_times(name, t):
    """sqrt(1 - alpha²) loses its digits as alpha nears 1; the schedules do not."""
    level = SCHEDULES[name](number(t))
    exact = exact_sigma(name, t)
    assert abs(level.sigma.item() / exact - 1) < 1e-12
    naive = (1 - level.alpha.float() ** 2).sqrt().item()
    if t <= 1e-6:
        assert abs(naive / exact - 1) > 0.01  # what the test is there to see


def test_snr_and_its_logarithm():
    level = md.Karras()(number([0.0, 0.3, 1.0]))
    torch.testing.assert_close(level.snr, level.sigma**-2)
    torch.testing.assert_close(level.log_snr, level.snr.log())
    clean, noise = md.Flow()(0.0), md.Flow()(1.0)
    assert clean.snr == clean.log_snr == torch.inf
    assert noise.snr == 0
    assert noise.log_snr == -torch.inf
    tiny = md.NoiseLevel(number(1.0), number(1e-200), number(1.0))  # the ratio underflows when squared
    assert tiny.log_snr.item() == pytest.approx(-400 * 2.302585092994046)


@pytest.mark.parametrize("name", SCHEDULES)
def test_transition_std_between_very_close_levels(name):
    """d(sigma²/alpha²) alpha² = std² for a step so short that subtracting variances is risky; compared
    with the subtraction in 50 digits."""
    s, t = number(0.4), number(0.4 + 1e-7)
    level_s, level_t = SCHEDULES[name](s), SCHEDULES[name](t)
    with mpmath.workdps(50):
        a_s, a_t, v_s, v_t = (
            mpmath.mpf(part.item()) for part in (level_s.alpha, level_t.alpha, level_s.sigma, level_t.sigma)
        )
        exact = float(mpmath.sqrt(v_t**2 - (a_t / a_s * v_s) ** 2))
    std = md.transition(torch.ones(1, dtype=torch.float64), level_s, level_t).std.item()
    assert std == pytest.approx(exact, rel=1e-7)


def test_edm_is_the_preconditioning_of_the_paper():
    """Karras et al. 2022, table 1: D = c_skip x + c_out F, at alpha = 1 and sigma_data = 0.5."""
    level = md.Karras()(torch.linspace(0, 1, 9, dtype=torch.float64))
    x_t, out = torch.randn(2, 9, 5, dtype=torch.float64)
    sigma = level.sigma[:, None]
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    x0 = md.from_target(out, x_t, level, "edm").x0
    torch.testing.assert_close(x0, c_skip * x_t + c_out * out, rtol=1e-10, atol=1e-10)


def test_edm_asks_for_unit_variance_at_every_level():
    """What the network is to say has variance 1 if the data's is sigma_data² (appendix B.6)."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 100_000, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        wanted = md.to_target(x0 / 2, eps, md.Cosine()(t), "edm")
        assert wanted.var().item() == pytest.approx(1, abs=0.02)
