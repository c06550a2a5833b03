"""Scores against closed forms and scipy, and their intervals against repeated draws."""

import math

import pytest
import torch
from scipy import linalg, stats
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd

from minidiff import metrics
from minidiff.metrics import (
    Interval,
    _student_quantile,
    energy_distance,
    energy_test,
    frechet_distance,
    kernel_distance,
    proportion,
)


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_proportions_are_newcombes(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, table I, method 3: the intervals of Wilson's score, without a correction.
    assert proportion(successes, n) == pytest.approx((successes / n, low, high, n, "%"), abs=5e-5)


def test_proportions_refuse_what_is_no_share() -> None:
    assert proportion(0, 20).low == 0
    assert proportion(20, 20).high == 1
    for bad in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"{bad[0]} successes in {bad[1]} trials"):
            proportion(*bad)
    with pytest.raises(ValueError, match="confidence = 95"):
        proportion(1, 2, 95)


def test_intervals_print_with_their_count() -> None:
    assert str(proportion(503, 512)) == "98.2 % [96.7, 99.1], n = 512"
    assert str(Interval(12.3456, 11.91, 12.78, 2048)) == "12.35 [11.91, 12.78], n = 2048"
    assert str(Interval(0.001234, 0.0011, 0.0014, 9)) == "0.00123 [0.00110, 0.00140], n = 9"
    assert str(Interval(1500.0, 1400.0, 1600.0, 9)) == "1500 [1400, 1600], n = 9"
    assert str(Interval(1.0, 1.0, 1.0, 9)) == "1.000 [1.000, 1.000], n = 9"


@pytest.mark.parametrize("freedom, quantile", [(9, 2.262), (19, 2.093), (49, 2.010)])
def test_student_quantile_is_that_of_the_tables(freedom: int, quantile: float) -> None:
    assert _student_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-3)


def test_energy_distance_is_scipys_in_one_dimension() -> None:
    x, y = torch.randn(200, 1), 1.3 * torch.randn(150, 1) + 0.5
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy()) ** 2
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert energy_distance(x, x) == pytest.approx(0, abs=1e-7)


def test_energy_distance_of_images_is_that_of_their_values() -> None:
    x, y = torch.randn(20, 3, 2, 2), torch.randn(30, 3, 2, 2) + 1
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.flatten(1), y.flatten(1)))
    with pytest.raises(ValueError, match=r"\(20, 3, 2, 2\) and \(30, 12\)"):
        energy_distance(x, y.flatten(1))


def test_energy_test_keeps_its_promise() -> None:
    """Of p-values under the null hypothesis, a tenth lies below 0.1, whatever n and m are."""
    generator = torch.Generator().manual_seed(0)
    p = []
    for _ in range(300):
        x, y = (torch.randn(n, 2, generator=generator) for n in (20, 35))
        p.append(energy_test(x, y, 99, generator))
    assert 0.06 < sum(value <= 0.1 for value in p) / len(p) < 0.15
    assert 0.45 < sum(p) / len(p) < 0.56


def test_energy_test_sees_more_than_mean_and_variance() -> None:
    """Two points at ±1 have mean 0 and variance 1, as a normal distribution has."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, generator=generator)
    y = torch.randint(0, 2, (300, 1), generator=generator) * 2.0 - 1
    assert energy_test(x, y, 499, generator) == 1 / 500
    with pytest.raises(ValueError, match="permutations = 0"):
        energy_test(x, y, 0)


def gaussians(n: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Samples of two correlated Gaussians in 4 dimensions, and the exact distance between these."""
    fixed = torch.Generator().manual_seed(7)
    a, b = (torch.randn(4, 4, generator=fixed, dtype=torch.float64) for _ in range(2))
    shift = torch.tensor([0.5, 0.0, -0.3, 1.0], dtype=torch.float64)
    cov_x, cov_y = a @ a.T, b @ b.T
    mixed = linalg.sqrtm((cov_x @ cov_y).numpy()).real.trace()
    exact = float(shift @ shift + cov_x.trace() + cov_y.trace()) - 2 * float(mixed)
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return x @ a.T + shift, y @ b.T, exact


def test_frechet_distance_of_gaussians() -> None:
    x, y, exact = gaussians(20_000, 0)
    result = frechet_distance(x, y)
    assert result.n == 20_000
    assert result.low < exact < result.high
    assert result.value == pytest.approx(exact, rel=0.05)


def test_intervals_are_as_wide_as_the_scatter() -> None:
    """The standard error behind each interval against the scatter over 40 fresh draws."""
    for distance in (frechet_distance, kernel_distance):
        results = [distance(*gaussians(400, seed)[:2], groups=20) for seed in range(40)]
        scatter = torch.tensor([result.value for result in results]).std().item()
        width = sum(result.high - result.low for result in results) / len(results)
        error = width / 2 / stats.t.ppf(0.975, 19)
        assert 0.7 < error / scatter < 1.4, f"{distance.__name__}: {error:.3g} for {scatter:.3g}"


def test_frechet_distance_warns_of_too_few_samples() -> None:
    with pytest.warns(UserWarning, match="50 samples in 60 dimensions"):
        result = frechet_distance(torch.randn(50, 60), torch.randn(80, 60), groups=5)
    assert result.n == 50
    assert result.value > 10, "the truth is 0: such a number says nothing, which is why it warns"


@pytest.mark.parametrize("kernels", [1, 300, 10**6])
def test_kernel_distance_a_few_rows_at_a_time_is_that_of_all(monkeypatch, kernels) -> None:
    """As torchmetrics has it of the whole table, which of 50,000 samples takes 20 GB."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 3, generator=g), torch.randn(60, 3, generator=g) + 1
    monkeypatch.setattr(metrics, "KERNELS", kernels)
    found = kernel_distance(x, y, groups=5)
    whole = float(poly_mmd(y[:50].double(), x.double()))
    assert found.value == pytest.approx(whole, rel=1e-12)
    assert found.low < whole < found.high


def test_kernel_distance_of_gaussians() -> None:
    """E (ab + 1)³ is a polynomial in the moments of a and b; the moments of N(m, s²) are known."""

    def kernel(m1: float, s1: float, m2: float, s2: float) -> float:
        moments = [(m, m**2 + s**2, m**3 + 3 * m * s**2) for m, s in ((m1, s1), (m2, s2))]
        first, second, third = (a * b for a, b in zip(*moments, strict=True))
        return third + 3 * second + 3 * first + 1

    x_is, y_is = (0.5, 0.8), (0.0, 1.2)
    exact = kernel(*x_is, *x_is) + kernel(*y_is, *y_is) - 2 * kernel(*x_is, *y_is)
    values = []
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        x, y = (m + s * torch.randn(1500, 1, generator=g) for m, s in (x_is, y_is))
        values.append(kernel_distance(x, y, groups=2).value)
    spread = torch.tensor(values)
    assert abs(spread.mean() - exact) < 3 * spread.std() / math.sqrt(10)
    assert exact > 0.3, "the two Gaussians are too alike to test anything"


def test_kernel_distance_has_no_bias_where_frechet_has() -> None:
    g = torch.Generator().manual_seed(0)
    sets = [torch.randn(60, 8, generator=g) for _ in range(40)]
    pairs = list(zip(sets[::2], sets[1::2], strict=True))
    kid = torch.tensor([kernel_distance(x, y, groups=2).value for x, y in pairs])
    fid = torch.tensor([frechet_distance(x, y, groups=2).value for x, y in pairs])
    assert abs(kid.mean()) < 3 * kid.std() / math.sqrt(len(pairs))
    assert fid.mean() > 10 * fid.std() / math.sqrt(len(pairs))


def test_any_network_can_judge() -> None:
    judge = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    judge.train()
    x, y = torch.rand(50, 3, 8, 8) * 2 - 1, torch.rand(60, 3, 8, 8) * 2 - 1
    state = torch.get_rng_state()
    for distance in (frechet_distance, kernel_distance):
        result = distance(x, y, judge, groups=5, batch_size=16)
        assert judge.training, "the judge is left as it was"
        judge.eval()
        with torch.no_grad():
            again = distance(judge(x), judge(y), groups=5)
        judge.train()
        assert result.value == pytest.approx(again.value, rel=1e-4)
    assert (torch.get_rng_state() == state).all(), "measuring must not use up random numbers"


def test_bad_sets_are_named() -> None:
    x = torch.randn(30, 3)
    with pytest.raises(ValueError, match=r"features of shape \(4, 3, 8, 8\)"):
        frechet_distance(torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 8, 8))
    with pytest.raises(ValueError, match="30 samples in 20 groups"):
        kernel_distance(x, x)
    with pytest.raises(ValueError, match="3 features against 2"):
        kernel_distance(x, x[:, :2], groups=2)
