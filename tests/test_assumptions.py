"""What chapter 9 says of the assumptions behind diffusion, against algebra and automatic differentiation."""

import math

import pytest
import torch
from helpers import SCHEDULES, gaussian, gaussian_flow
from torch import nn

import minidiff as md
from minidiff.exact import GaussianMixture
from minidiff.forward import posterior_std, transition
from minidiff.step import EMA

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)


def level(ratio: float) -> md.NoiseLevel:
    """Data at full size, and this much noise."""
    return md.NoiseLevel(*(torch.tensor(value, dtype=F64) for value in (0.5, 1.0, ratio)))


def partial_correlation(covariance: torch.Tensor) -> float:
    """Of the outer two of three, from the inverse of their covariance."""
    inverse = torch.linalg.inv(covariance)
    return (-inverse[0, 2] / (inverse[0, 0] * inverse[2, 2]).sqrt()).item()


def joint(correlations: tuple[float, float], levels: list[md.NoiseLevel], variance: float) -> torch.Tensor:
    """Covariance of three states whose noises form a chain with these correlations of neighbours."""
    first, second = correlations
    rows = [[1, first, first * second], [first, 1, second], [first * second, second, 1]]
    noise = torch.tensor(rows, dtype=F64)
    alpha, sigma = (torch.stack([getattr(at, name) for at in levels]) for name in ("alpha", "sigma"))
    return variance * torch.outer(alpha, alpha) + torch.outer(sigma, sigma) * noise


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_chain_is_markov(name: str) -> None:
    """Its joint distribution, built with `transition` alone, has no partial correlation; the walk down with
    eta = 1 has the same joint distribution."""
    s, t, u = (SCHEDULES[name](time) for time in (0.2, 0.5, 0.8))
    variance = 0.7
    steps = [transition(ONE, *pair) for pair in ((s, t), (t, u))]  # of 1, so the mean is the scale
    a, c = (step.mean.item() for step in steps)
    first = (s.alpha**2 * variance + s.sigma**2).item()
    second = a**2 * first + steps[0].std.item() ** 2
    third = c**2 * second + steps[1].std.item() ** 2
    covariance = torch.tensor(
        [
            [first, a * first, a * c * first],
            [a * first, second, c * second],
            [a * c * first, c * second, third],
        ],
        dtype=F64,
    )
    assert partial_correlation(covariance) == pytest.approx(0, abs=1e-9)
    kept = [(1 - (posterior_std(*pair) / pair[1].sigma) ** 2).sqrt().item() for pair in ((t, s), (u, t))]
    torch.testing.assert_close(
        joint((kept[0], kept[1]), [s, t, u], variance), covariance, rtol=1e-9, atol=1e-12
    )


def test_partial_correlation_of_three_is_the_formula() -> None:
    """r_su.t from the three correlations, as from the inverse of the covariance."""
    levels = [md.Linear()(time) for time in (0.1, 0.2, 0.3)]
    covariance = joint((0.9, 0.8), levels, 1.0)
    std = covariance.diag().sqrt()
    r = covariance / torch.outer(std, std)
    formula = (r[0, 2] - r[0, 1] * r[1, 2]) / ((1 - r[0, 1] ** 2) * (1 - r[1, 2] ** 2)).sqrt()
    assert formula.item() == pytest.approx(partial_correlation(covariance))
    assert abs(formula.item()) > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_walk_down_with_x0_in_hand_keeps_the_marginals(eta: float) -> None:
    """A DDIM step with the true x0 leads from one marginal to the other, at every eta."""
    x0, s, t = 0.6, md.Cosine()(0.3), md.Cosine()(0.6)
    n = 200_000
    start = t.alpha * x0 + t.sigma * torch.randn(n, 1, dtype=F64)

    def knows(x: torch.Tensor, at: md.NoiseLevel) -> md.Prediction:
        return md.Prediction(torch.full_like(x, x0), (x - at.alpha * x0) / at.sigma)

    generator = torch.Generator().manual_seed(1)
    end = md.sample(md.ddim(knows, start, [t, s], eta=eta, generator=generator))
    assert end.mean().item() == pytest.approx((s.alpha * x0).item(), abs=5 * s.sigma.item() / n**0.5)
    assert end.std().item() == pytest.approx(s.sigma.item(), rel=5 / (2 * n) ** 0.5)


def test_a_step_back_misses_a_gaussian_by_the_cube_of_its_width() -> None:
    """Total variation on a grid against the third derivative of log q by automatic differentiation."""
    mixture = GaussianMixture(torch.tensor([[-1.2], [0.8]], dtype=F64), 0.2, torch.tensor([0.4, 0.6]))
    grid = torch.linspace(-4, 4, 16_001, dtype=F64)[:, None]
    constant = math.sqrt(2 / math.pi) * (1 + 4 * math.exp(-1.5))  # E|z³ - 3z|
    z = torch.linspace(-12, 12, 200_001, dtype=F64)
    normal = (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    assert torch.trapezoid((z**3 - 3 * z).abs() * normal, z).item() == pytest.approx(constant, rel=1e-6)
    t, ratios, distances = md.Linear()(0.3), [], []
    for h in (0.004, 0.001):
        s = md.Linear()(0.3 - h)
        step = transition(grid, s, t)
        p = (-(((0.3 - step.mean) / step.std) ** 2)[:, 0] / 2 + mixture.log_density(grid, s)).softmax(0)
        mean = p @ grid[:, 0]
        std = (p @ (grid[:, 0] - mean) ** 2).sqrt()
        best = (-(((grid[:, 0] - mean) / std) ** 2) / 2).softmax(0)
        distances.append(((p - best).abs().sum() / 2).item())
        x = mean.reshape(1, 1).requires_grad_()
        value = mixture.log_density(x, s)
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        ratios.append(distances[-1] / (constant / 12 * abs(value.item()) * std.item() ** 3))
    assert ratios[0] == pytest.approx(1, abs=0.06)
    assert ratios[1] == pytest.approx(1, abs=0.03)
    assert math.log(distances[0] / distances[1]) / math.log(4) == pytest.approx(1.5, abs=0.05)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_an_average_of_a_ramp_is_late_by_d_over_1_minus_d(decay: float) -> None:
    """A weight that grows by 1 in every step."""
    model = nn.Linear(1, 1, bias=False).to(F64)
    ema = EMA(model, decay)
    for step in range(3000):
        with torch.no_grad():
            model.weight.fill_(step)
        ema.mix(model, 1 - decay)
    lag = step - ema.module.weight.item()
    assert lag == pytest.approx(decay / (1 - decay), rel=1e-6)


def test_the_slope_of_the_guess_is_the_covariance_that_is_left() -> None:
    """Jacobian of x0 and Hessian of the log-density, by automatic differentiation, in the plane."""
    mixture = GaussianMixture(torch.randn(5, 2, dtype=F64), torch.rand(5, 2) / 2 + 0.1, torch.rand(5))
    at = md.Cosine()(0.4)
    x = torch.tensor([[0.3, -0.5]], dtype=F64)
    covariance = mixture.posterior(x, at).covariance
    jacobian = torch.func.jacrev(lambda x: mixture.denoise(x[None], at).x0[0])(x[0])
    torch.testing.assert_close(jacobian, at.alpha / at.sigma**2 * covariance)
    hessian = torch.func.jacrev(lambda x: mixture.score(x[None], at)[0])(x[0])
    identity = torch.eye(2, dtype=F64)
    torch.testing.assert_close(hessian, -identity / at.sigma**2 + at.alpha**2 / at.sigma**4 * covariance)


@pytest.mark.parametrize("width", [0.3, 0.1, 0.02])
def test_the_steepest_place_between_two_modes(width: float) -> None:
    """By automatic differentiation of the denoiser over many levels and places."""
    m = 0.8
    mixture = GaussianMixture(torch.tensor([[-m], [m]], dtype=F64), width)
    ratios = torch.logspace(-2.5, 1, 600, dtype=F64).tolist()
    places = torch.linspace(-1.5, 1.5, 31, dtype=F64)[:, None]

    def slopes(ratio: float, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(mixture.denoise(x, level(ratio)).x0.sum(), x)[0]

    middle = [slopes(ratio, places[15:16]).item() for ratio in ratios]
    peak = (m / width + width / m) ** 2 / 4
    where = width * math.sqrt((m**2 - width**2) / (m**2 + width**2))
    assert max(middle) == pytest.approx(peak, rel=1e-3)
    assert ratios[middle.index(max(middle))] == pytest.approx(where, rel=0.02)
    assert (
        max(slopes(ratio, places).max().item() for ratio in ratios[::40]) < peak * 1.0001
    )  # nowhere steeper


@pytest.mark.parametrize("width", [0.05, 0.02])
def test_width_is_lost_as_the_spacing_says(width: float) -> None:
    """DDIM on a Gaussian: pi h / 8w for equal steps in sigma, kappa / 4 for equal steps in its logarithm."""

    def lost(levels: list[md.NoiseLevel]) -> float:
        start = (levels[0].alpha ** 2 * width**2 + levels[0].sigma ** 2).sqrt().reshape(1, 1)
        end = md.sample(md.ddim(gaussian(0, width), start, levels))
        exact = gaussian_flow(start, levels[0], levels[-1], 0, width)
        return math.log(exact.item() / end.item())

    steps = 4000
    evenly = [level(3 * (1 - i / steps)) for i in range(steps + 1)]
    assert lost(evenly) == pytest.approx(math.pi * (3 / steps) / (8 * width), rel=0.05)
    kappa = math.log(3 / (width / 1000)) / 400
    logarithmic = [level(3 * math.exp(-kappa * i)) for i in range(401)] + [level(0.0)]
    assert lost(logarithmic) == pytest.approx(kappa / 4, rel=0.05)
