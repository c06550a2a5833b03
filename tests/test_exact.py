"""The exact denoisers against integrals, derivatives and limits computed in other ways."""

import math

import pytest
import torch
from torch import Tensor

from minidiff.exact import FiniteData, GaussianMixture
from minidiff.forward import NoiseLevel, diffuse, posterior_std, transition
from minidiff.guidance import guide
from minidiff.schedule import Cosine, Flow, Karras

F64 = torch.float64
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])
STDS = {
    "one": torch.tensor(0.3),
    "per component": torch.tensor([0.2, 0.5, 0.35]),
    "per value": torch.tensor([[0.2, 0.4], [0.5, 0.1], [0.3, 0.6]]),
}
LEVELS = [Cosine()(t) for t in (0.02, 0.4, 0.9, 1.0)] + [Flow()(1.0), Karras()(0.5)]


@pytest.fixture(params=STDS)
def mixture(request: pytest.FixtureRequest) -> GaussianMixture:
    means = torch.tensor([[-1.0, 0.5], [0.8, 1.0], [0.3, -1.2]])
    return GaussianMixture(means, STDS[request.param], WEIGHTS)


def noisy(oracle: GaussianMixture, level: NoiseLevel, n: int = 7) -> Tensor:
    x0 = oracle.sample(n).to(F64)
    return diffuse(x0, torch.randn_like(x0), level)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Karras(sigma_max=5)])
def test_denoise_is_the_mean_of_the_posterior(schedule: Cosine | Flow | Karras, t: float) -> None:
    """Bayes' rule in one dimension, integrated on a grid, with none of the module's algebra."""
    means, stds = torch.tensor([[-1.0], [0.2], [1.5]]), torch.tensor([0.1, 0.4, 0.2])
    oracle, level = GaussianMixture(means, stds, WEIGHTS), schedule(t)
    x_t = torch.linspace(-2, 2, 9, dtype=F64)
    x0 = torch.linspace(-4, 4, 160_001, dtype=F64)

    def normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (-(((x - mean) / std) ** 2) / 2).exp() / std

    prior = sum(w * normal(x0, m, s) for w, m, s in zip(WEIGHTS, means[:, 0], stds, strict=True))
    joint = prior * normal(x_t[:, None], level.alpha * x0, level.sigma)  # (9, grid)
    posterior = joint / joint.sum(1, keepdim=True)
    eps = (x_t[:, None] - level.alpha * x0) / level.sigma
    result = oracle.denoise(x_t[:, None], level)
    torch.testing.assert_close(result.x0[:, 0], posterior @ x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.eps[:, 0], (posterior * eps).sum(1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
def test_score_is_the_gradient_of_the_log_density(mixture: GaussianMixture, level: NoiseLevel) -> None:
    x_t = noisy(mixture, level).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, level).sum(), x_t)
    torch.testing.assert_close(mixture.score(x_t, level), gradient, rtol=1e-8, atol=1e-8)
    eps = mixture.denoise(x_t, level).eps
    torch.testing.assert_close(-eps / level.sigma, gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("level", LEVELS)
def test_prediction_adds_up_to_x_t(mixture: GaussianMixture, level: NoiseLevel) -> None:
    x_t = noisy(mixture, level)
    x0, eps = mixture.denoise(x_t, level)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x_t, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.6, 1.0])
def test_density_integrates_to_one(mixture: GaussianMixture, t: float) -> None:
    across = torch.linspace(-7, 7, 561, dtype=F64)
    values = mixture.log_density(torch.cartesian_prod(across, across), Cosine()(t)).exp()
    assert values.sum().item() * (across[1] - across[0]).item() ** 2 == pytest.approx(1, abs=1e-6)


def test_density_is_that_of_noisy_samples(mixture: GaussianMixture) -> None:
    """E[log p_t(x_t)] over samples must exceed that under any wrong density (Gibbs' inequality)."""
    level = Cosine()(0.3)
    x_t = noisy(mixture, level, 20_000)
    right = mixture.log_density(x_t, level)
    for wrong in (Cosine()(0.2), Cosine()(0.4)):
        lost = right - mixture.log_density(x_t, wrong)
        assert lost.mean() > 4 * lost.std() / math.sqrt(len(lost))


def test_limits(mixture: GaussianMixture) -> None:
    """At alpha = 0 nothing is known of x0 and all of eps; at sigma = 0 the other way round."""
    x_t = torch.randn(5, 2, dtype=F64)
    zero, one = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    x0, eps = mixture.denoise(x_t, NoiseLevel(one, zero, one))
    torch.testing.assert_close(x0, mixture.mean.expand(5, 2))
    torch.testing.assert_close(eps, x_t)
    for alpha in (one, 0.3 * one):
        x0, eps = mixture.denoise(x_t, NoiseLevel(zero, alpha, zero))
        torch.testing.assert_close(x0, x_t / alpha)
        assert (eps == 0).all()
    for t in (1e-4, 1e-8, 1e-12):
        x0, eps = mixture.denoise(x_t, Flow()(t))
        torch.testing.assert_close(x0, x_t, atol=100 * t, rtol=0)
        assert eps.abs().max() < 1000 * t


def test_one_level_per_sample(mixture: GaussianMixture) -> None:
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    x_t = torch.randn(4, 2, dtype=F64)
    together = mixture.denoise(x_t, Cosine()(t))
    for i in range(4):
        alone = mixture.denoise(x_t[i : i + 1], Cosine()(t[i]))
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps)
    densities = mixture.log_density(x_t, Cosine()(t))
    torch.testing.assert_close(densities[2], mixture.log_density(x_t[2:3], Cosine()(t[2]))[0])


def test_finite_data_is_a_mixture_of_vanishing_width() -> None:
    points = torch.randn(40, 3, 4, 4)
    exact, narrow = FiniteData(points), GaussianMixture(points, 1e-7)
    for t in (0.3, 0.7, 0.95, 1.0):
        level = Cosine()(t)
        x_t = noisy(exact, level, 6)
        for name, a, b in zip(
            ("x0", "eps"), exact.denoise(x_t, level), narrow.denoise(x_t, level), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(exact.score(x_t, level), narrow.score(x_t, level))


def test_finite_data_is_a_softmax_over_the_training_set() -> None:
    """The same by brute force, with every difference written out."""
    points, level = torch.randn(30, 3, 4, 4, dtype=F64), Cosine()(0.85)
    x_t = noisy(FiniteData(points), level, 5)
    distances = ((x_t[:, None] - level.alpha * points) ** 2).sum((2, 3, 4))
    r = (-distances / (2 * level.sigma**2)).softmax(1)
    assert r.max(1).values.min() < 0.99, "the level tells too much to test the softmax"
    torch.testing.assert_close(FiniteData(points).responsibilities(x_t, level), r)
    expected = torch.einsum("bn,nchw->bchw", r, points)
    torch.testing.assert_close(FiniteData(points).denoise(x_t, level).x0, expected)


@pytest.mark.parametrize("t", [1e-3, 1e-5, 1e-7])
def test_finite_data_finds_the_noise_that_was_added(t: float) -> None:
    points = torch.randn(50, 2, dtype=F64)
    eps, level = torch.randn(50, 2, dtype=F64), Flow()(t)
    x0, found = FiniteData(points).denoise(diffuse(points, eps, level), level)
    torch.testing.assert_close(x0, points, atol=1e-12, rtol=0)
    torch.testing.assert_close(found, eps, atol=1e-15 / t * 10, rtol=0)


def test_finite_data_without_noise_is_the_nearest_point() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    oracle, clean = FiniteData(points), Flow()(0.0)
    x0, eps = oracle.denoise(torch.tensor([[0.9, 0.1], [0.1, 1.2], [0.0, 0.0]]), clean)
    torch.testing.assert_close(x0, points[[1, 2, 0]])
    assert (eps == 0).all()
    with pytest.raises(ValueError, match="no density at sigma = 0"):
        oracle.score(points, clean)
    with pytest.raises(ValueError, match="no density at sigma = 0"):
        oracle.log_density(points, clean)


def test_samples_have_the_moments_of_the_mixture(mixture: GaussianMixture) -> None:
    n = 100_000
    x0 = mixture.sample(n, torch.Generator().manual_seed(1)).double()
    error = x0.std(0) / math.sqrt(n)
    assert ((x0.mean(0) - mixture.mean).abs() < 4 * error).all()
    torch.testing.assert_close(x0.T.cov(), mixture.covariance, atol=0.02, rtol=0)
    # The fourth moment, in closed form for each Gaussian: mu⁴ + 6 mu² s² + 3 s⁴.
    mu, s = mixture.means, mixture.stds
    fourth = mixture.weights @ (mu**4 + 6 * mu**2 * s**2 + 3 * s**4)
    assert ((x0**4).mean(0) - fourth).abs().max() < 4 * (x0**4).std(0).max() / math.sqrt(n)
    again = mixture.sample(n, torch.Generator().manual_seed(1))
    assert (again == x0).all()


def test_mean_and_covariance_match_the_noisy_density(mixture: GaussianMixture) -> None:
    """Cov[x_t] = alpha² Cov[x0] + sigma² I, read off the density on a grid."""
    level, across = Cosine()(0.4), torch.linspace(-7, 7, 561, dtype=F64)
    at = torch.cartesian_prod(across, across)
    p = mixture.log_density(at, level).exp()
    p = p / p.sum()
    mean = p @ at
    torch.testing.assert_close(mean, level.alpha * mixture.mean)
    cov = (at - mean).T @ (p[:, None] * (at - mean))
    expected = level.alpha**2 * mixture.covariance + level.sigma**2 * torch.eye(2)
    torch.testing.assert_close(cov, expected, atol=1e-6, rtol=0)


def test_condition_is_bayes_rule(mixture: GaussianMixture) -> None:
    """Averaging over what is known gives back the answer of one who knows nothing."""
    level = Cosine()(0.5)
    x_t = noisy(mixture, level)
    r = mixture.responsibilities(x_t, level)
    known = [mixture.denoise(x_t, level, row) for row in torch.eye(3, dtype=torch.bool)]
    expected = sum(r[:, k, None] * known[k].x0 for k in range(3))
    torch.testing.assert_close(mixture.denoise(x_t, level).x0, expected)
    each = torch.eye(3, dtype=torch.bool)[torch.arange(7) % 3]
    torch.testing.assert_close(mixture.denoise(x_t, level, each).x0[4], known[1].x0[4])


def test_guidance_follows_the_sharpened_density() -> None:
    """Guided score = (1 - w) grad log p + w grad log p(. | c), with p(. | c) built by hand."""
    means = torch.tensor([[-1.0, 0.5], [0.8, 1.0], [0.3, -1.2]])
    whole = GaussianMixture(means, 0.3, WEIGHTS)
    part = GaussianMixture(means[1:], 0.3, WEIGHTS[1:])
    level, scale = Cosine()(0.6), 2.5
    x_t = noisy(whole, level).requires_grad_()
    log_p = (1 - scale) * whole.log_density(x_t, level) + scale * part.log_density(x_t, level)
    (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
    condition = torch.tensor([False, True, True])
    guided = guide(whole.denoise, condition, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(-guided(x_t, level).eps / level.sigma, gradient)


def test_answers_in_the_dtype_of_the_question(mixture: GaussianMixture) -> None:
    level = Cosine()(0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x_t = torch.zeros(2, 2, dtype=dtype)
        result = (*mixture.denoise(x_t, level), mixture.score(x_t, level))
        assert [part.dtype for part in result] == [dtype] * 3
    assert mixture.sample(3).dtype == torch.float32
    assert FiniteData(torch.zeros(2, 3, dtype=F64)).sample(1).dtype == F64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3),), r"give \(K, \*D\)"),
        ((torch.zeros(0, 2),), r"give \(K, \*D\)"),
        ((torch.zeros(3, 2), torch.ones(2)), r"stds of shape \(2,\)"),
        ((torch.zeros(3, 2), -1.0), "a std is -1"),
        ((torch.full((3, 2), math.nan),), "a mean is nan"),
        ((torch.zeros(3, 2), 1.0, torch.ones(2)), r"weights of shape \(2,\)"),
        ((torch.zeros(3, 2), 1.0, torch.tensor([1.0, -0.5, 1])), r"a weight is -0\.5"),
        ((torch.zeros(3, 2), 1.0, torch.zeros(3)), "all 0"),
    ],
)
def test_bad_mixtures_are_named(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_bad_questions_are_named(mixture: GaussianMixture) -> None:
    level = Cosine()(0.5)
    with pytest.raises(ValueError, match=r"x_t of shape \(4, 3\)"):
        mixture.denoise(torch.zeros(4, 3), level)
    with pytest.raises(ValueError, match="level for 3 samples"):
        mixture.denoise(torch.zeros(4, 2), Cosine()(torch.tensor([0.1, 0.2, 0.3])))
    with pytest.raises(ValueError, match=r"condition is torch\.int64"):
        mixture.denoise(torch.zeros(4, 2), level, torch.tensor([1, 0, 0]))
    with pytest.raises(ValueError, match="leaves no component"):
        mixture.denoise(torch.zeros(4, 2), level, torch.zeros(3, dtype=torch.bool))


# --- full covariances, posterior, point mass ---------------------------------------------------


def correlated(generator: torch.Generator | None = None) -> tuple[GaussianMixture, Tensor, Tensor]:
    """Three Gaussians in 4 dimensions, none of them aligned with the axes; one has no width one way."""
    generator = generator or torch.Generator().manual_seed(3)
    means = torch.randn(3, 4, generator=generator, dtype=F64)
    roots = torch.randn(3, 4, 4, generator=generator, dtype=F64) / 2
    roots[0, :, 3] = 0
    return GaussianMixture(means, weights=WEIGHTS, covariances=roots @ roots.mT), means, roots


@pytest.mark.parametrize("level", LEVELS)
def test_full_covariances_are_torchs_normal_distributions(level: NoiseLevel) -> None:
    oracle, means, roots = correlated()
    covariances = level.alpha**2 * roots @ roots.mT + level.sigma**2 * torch.eye(4, dtype=F64)
    x_t = noisy(oracle, level).requires_grad_()
    parts = torch.distributions.MultivariateNormal(level.alpha * means, covariances)
    wanted = (oracle.weights.log() + parts.log_prob(x_t[:, None])).logsumexp(1)
    torch.testing.assert_close(oracle.log_density(x_t, level), wanted, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(wanted.sum(), x_t)
    torch.testing.assert_close(oracle.score(x_t, level), gradient, rtol=1e-7, atol=1e-7)
    x0, eps = oracle.denoise(x_t, level)
    torch.testing.assert_close(-eps / level.sigma, gradient, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x_t, rtol=1e-9, atol=1e-9)


def test_a_full_covariance_that_is_diagonal_changes_nothing(mixture: GaussianMixture) -> None:
    full = torch.diag_embed(mixture.stds.expand(3, 2) ** 2)
    same = GaussianMixture(mixture.means, weights=mixture.weights, covariances=full)
    level = Cosine()(0.4)
    x_t = noisy(mixture, level)
    for mine, other in zip(mixture.denoise(x_t, level), same.denoise(x_t, level), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.covariance, same.covariance)


def test_samples_of_full_covariances_have_their_moments() -> None:
    oracle, means, roots = correlated()
    x0 = oracle.sample(200_000, torch.Generator().manual_seed(0)).to(F64)
    weights = WEIGHTS.to(F64)
    mean = weights @ means
    second = torch.einsum("k,kfg->fg", weights, roots @ roots.mT + means[:, :, None] * means[:, None])
    torch.testing.assert_close(oracle.mean, mean)
    torch.testing.assert_close(oracle.covariance, second - mean[:, None] * mean)
    torch.testing.assert_close(x0.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close(x0.T.cov(), oracle.covariance, rtol=0, atol=0.03)


@pytest.mark.parametrize("level", LEVELS)
def test_the_posterior_has_the_denoisers_mean_and_bayes_density(level: NoiseLevel) -> None:
    """p(x0 | x_t) = q(x_t | x0) p(x0) / p(x_t), at points of x0 taken at random."""
    oracle, *_ = correlated()
    diagonal = GaussianMixture(oracle.means, torch.rand(3, 4) + 0.1, WEIGHTS)
    clean = Flow()(0.0)
    for mixture in (GaussianMixture(oracle.means, weights=WEIGHTS, covariances=torch.eye(4)), diagonal):
        x_t = noisy(mixture, level, 1)
        posterior = mixture.posterior(x_t, level)
        torch.testing.assert_close(posterior.mean, mixture.denoise(x_t, level).x0[0], rtol=1e-9, atol=1e-9)
        x0 = mixture.sample(50).to(F64)
        away = (x_t - level.alpha * x0) / level.sigma
        likelihood = -(away**2).sum(1) / 2 - 4 * (level.sigma * math.sqrt(2 * math.pi)).log()
        wanted = likelihood + mixture.log_density(x0, clean) - mixture.log_density(x_t, level)
        torch.testing.assert_close(posterior.log_density(x0, clean), wanted, rtol=1e-7, atol=1e-7)


def test_the_posteriors_spread_is_the_derivative_of_the_denoiser() -> None:
    """Cov[x0 | x_t] = (sigma²/alpha) d E[x0 | x_t] / d x_t, the second-order Tweedie formula."""
    oracle, *_ = correlated()
    level = Cosine()(0.35)
    x_t = noisy(oracle, level, 1)
    slope = torch.autograd.functional.jacobian(lambda x: oracle.denoise(x[None], level).x0[0], x_t[0])
    wanted = level.sigma**2 / level.alpha * slope
    torch.testing.assert_close(oracle.posterior(x_t, level).covariance, wanted, rtol=1e-8, atol=1e-8)


def test_a_single_point_is_always_the_answer() -> None:
    point = torch.randn(3, 4, 4)
    oracle = FiniteData(point[None])
    for level in LEVELS:
        x_t = torch.randn(5, 3, 4, 4)
        x0, eps = oracle.denoise(x_t, level)
        torch.testing.assert_close(x0, point.expand(5, 3, 4, 4))
        torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x_t.to(F64), check_dtype=False)
    assert torch.equal(oracle.sample(2), torch.stack([point, point]))


def test_bad_covariances_are_named() -> None:
    means = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"covariances of shape \(2, 2\): give \(3, 3\) or \(2, 3, 3\)"):
        GaussianMixture(means, covariances=torch.eye(2))
    with pytest.raises(ValueError, match="not symmetric"):
        GaussianMixture(means, covariances=torch.ones(3, 3).triu())
    with pytest.raises(ValueError, match="negative eigenvalue -1"):
        GaussianMixture(means, covariances=-torch.eye(3))
    with pytest.raises(ValueError, match="both stds and covariances"):
        GaussianMixture(means, 1.0, covariances=torch.eye(3))
    with pytest.raises(ValueError, match="2 samples: ask for one posterior"):
        GaussianMixture(means).posterior(torch.zeros(2, 3), Cosine()(0.5))


def test_the_variance_of_a_step_back_has_two_parts() -> None:
    """Var[x_s | x_t] is the posterior's own variance plus what x0's uncertainty adds. Against samples of
    x_t near one value, for which nothing but the forward process is used."""
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.0]], dtype=F64), 0.2)
    t, s = Cosine()(0.6), Cosine()(0.4)
    generator = torch.Generator().manual_seed(0)
    x0 = mixture.sample(4_000_000, generator)
    x_s = diffuse(x0, torch.randn(x0.shape, generator=generator, dtype=F64), s)
    mean, std = transition(x_s, s, t)
    x_t = mean + std * torch.randn(x0.shape, generator=generator, dtype=F64)
    near = (x_t - 0.2).abs() < 0.01
    at = torch.full((1, 1), 0.2, dtype=F64)
    from_x0 = s.alpha * (std / t.sigma) ** 2
    wanted = posterior_std(t, s) ** 2 + from_x0**2 * mixture.posterior(at, t).covariance[0, 0]
    assert near.sum() > 20_000
    assert x_s[near].var().item() == pytest.approx(wanted.item(), rel=0.03)
