"""The bias of FID and its cure, coverage of real data, and shares that a fallible judge saw."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from test_metrics import gaussians
from torch import Tensor

from minidiff.metrics import (
    Interval,
    corrected_proportion,
    frechet_distance,
    frechet_floor,
    frechet_limit,
    prdc,
    proportion,
)


def draws(covariance: Tensor, n: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(covariance)
    return torch.randn(n, len(covariance), generator=g, dtype=torch.float64) @ root.T


def test_the_floor_of_equal_variances_is_a_count() -> None:
    """For the identity the double sum is F (F + 1) / 4, and the sum of the means is F."""
    for width in (1, 2, 7):
        expected = (width + width * (width + 1) / 4) * (1 / 50 + 1 / 80)
        assert frechet_floor(torch.eye(width), 50, 80) == pytest.approx(expected)
    assert frechet_floor(3 * torch.eye(4), 100) == pytest.approx(3 * (4 + 5) * 2 / 100)
    assert frechet_floor(torch.diag(torch.tensor([1.0, 0.0])), 10) == pytest.approx(1.5 * 2 / 10)
    with pytest.raises(ValueError, match="1 and 5 samples"):
        frechet_floor(torch.eye(2), 1, 5)


def test_the_floor_of_one_number_by_hand() -> None:
    """In one dimension the distance is (m - m')² + (s - s')²; Var s is close to s²/2n, Var m is s²/n."""
    n, std = 400, 3.0
    g = torch.Generator().manual_seed(0)
    x, y = std * torch.randn(2, 4000, n, generator=g, dtype=torch.float64)
    found = (x.mean(1) - y.mean(1)) ** 2 + (x.std(1) - y.std(1)) ** 2
    floor = frechet_floor(torch.tensor([[std**2]]), n)
    assert floor == pytest.approx(2 / n * 1.5 * std**2)
    assert found.mean() == pytest.approx(floor, abs=4 * float(found.std()) / 4000**0.5)


@pytest.mark.slow
def test_the_floor_is_what_two_samples_of_one_gaussian_are_apart() -> None:
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 6, generator=g, dtype=torch.float64)
    covariance = mix @ mix.T
    n, m = 300, 500
    found = torch.tensor(
        [
            frechet_distance(draws(covariance, n, 2 * s), draws(covariance, m, 2 * s + 1), groups=2).value
            for s in range(100)
        ]
    )
    floor = frechet_floor(covariance, n, m)
    error = found.std() / 100**0.5
    assert error < 0.06 * floor, "too noisy to test anything"
    assert found.mean() == pytest.approx(floor, abs=3 * float(error) + 0.01 * floor)


@pytest.mark.slow
def test_the_limit_has_no_bias_where_the_distance_has() -> None:
    exact = gaussians(1, 0)[2]
    pairs = [gaussians(60, seed)[:2] for seed in range(80)]
    plain = torch.tensor([frechet_distance(x, y, groups=2).value for x, y in pairs])
    limit = torch.tensor([frechet_limit(x, y, groups=2).value for x, y in pairs])
    error = limit.std() / len(pairs) ** 0.5
    assert plain.mean() - exact > 3 * plain.std() / len(pairs) ** 0.5, "no bias: nothing is tested"
    assert abs(limit.mean() - exact) < 3 * error
    same = [frechet_limit(torch.randn(80, 6), torch.randn(80, 6), groups=2).value for _ in range(40)]
    assert abs(sum(same) / 40) < 3 * torch.tensor(same).std() / 40**0.5
    assert min(same) < 0, "an estimate without bias of 0 falls on both sides"


@pytest.mark.slow
def test_the_interval_of_the_limit_is_as_wide_as_the_scatter() -> None:
    results = [frechet_limit(*gaussians(400, seed)[:2], groups=10) for seed in range(30)]
    scatter = torch.tensor([result.value for result in results]).std().item()
    width = sum(result.high - result.low for result in results) / len(results)
    error = width / 2 / stats.t.ppf(0.975, 9)
    assert 0.65 < error / scatter < 1.5, f"{error:.3g} for {scatter:.3g}"


def test_the_limit_refuses_what_has_no_line() -> None:
    x = torch.randn(100, 50)
    with pytest.raises(ValueError, match="100 samples in 50 dimensions: give more than 100"):
        frechet_limit(x, x)
    with pytest.raises(ValueError, match="60 samples in 20 groups"):
        frechet_limit(torch.randn(60, 2), torch.randn(90, 2))


def brute_prdc(x: list[list[float]], y: list[list[float]], k: int) -> tuple[float, float, float, float]:
    """The definitions, one point after the other."""

    def radius(points: list[list[float]], i: int) -> float:
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def balls(points: list[list[float]], at: list[float]) -> int:
        return sum(math.dist(p, at) < radius(points, i) for i, p in enumerate(points))

    n, m = len(x), len(y)
    return (
        sum(balls(y, a) > 0 for a in x) / n,
        sum(balls(x, b) > 0 for b in y) / m,
        sum(balls(y, a) for a in x) / n / k,
        sum(min(math.dist(a, b) for a in x) < radius(y, i) for i, b in enumerate(y)) / m,
    )


@pytest.mark.parametrize("k, n, m", [(1, 12, 20), (3, 25, 17), (5, 30, 30)])
def test_prdc_is_its_definition(k: int, n: int, m: int) -> None:
    g = torch.Generator().manual_seed(k)
    x, y = torch.randn(n, 2, generator=g).double(), 1.5 * torch.randn(m, 2, generator=g).double() + 0.5
    assert prdc(x, y, k=k) == pytest.approx(brute_prdc(x.tolist(), y.tolist(), k))


def test_prdc_knows_what_is_missing_and_what_is_too_much() -> None:
    g = torch.Generator().manual_seed(0)
    two = torch.randn(400, 2, generator=g) + 20 * torch.tensor([[0.0], [1.0]]).repeat(200, 1)
    one = torch.randn(400, 2, generator=g)
    half, whole = prdc(one, two), prdc(two, one)
    for share in (half.recall, half.coverage, whole.precision):
        assert 0.4 < share < 0.6
    for share in (half.precision, whole.recall, whole.coverage):
        assert share > 0.75
    # Naeem et al., eq. 11: what two sets of one distribution cover of each other, whatever it is.
    n, k = 200, 3
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    sets = [torch.randn(n, 4, generator=g) for _ in range(60)]
    found = torch.tensor([prdc(x, y, k=k).coverage for x, y in pairwise(sets)])
    assert found.mean() == pytest.approx(expected, abs=0.01)


def test_prdc_names_bad_sets() -> None:
    with pytest.raises(ValueError, match="k = 5: use 1 to 4 for 5 and 9 samples"):
        prdc(torch.randn(5, 2), torch.randn(9, 2))
    with pytest.raises(ValueError, match="3 features against 2"):
        prdc(torch.randn(9, 3), torch.randn(9, 2))


def test_prdc_is_the_package_of_its_authors() -> None:
    theirs = pytest.importorskip("prdc")
    x, y = torch.randn(80, 5), torch.randn(90, 5) + 0.3
    found = theirs.compute_prdc(y.double().numpy(), x.double().numpy(), 4)
    assert prdc(x, y, k=4)._asdict() == pytest.approx(found)


def test_a_share_is_freed_from_the_judges_errors() -> None:
    """The share that a judge with these errors sees leads back to the truth."""
    sensitivity, specificity = Interval(0.9, 0, 1, 1000, "%"), Interval(0.8, 0, 1, 1000, "%")
    for truth in (0.0, 0.35, 1.0):
        seen = 0.9 * truth + 0.2 * (1 - truth)
        found = corrected_proportion(Interval(seen, 0, 1, 500, "%"), sensitivity, specificity)
        assert found.value == pytest.approx(truth)
        assert found.low < truth < found.high
    perfect = Interval(1.0, 1, 1, 50, "%")
    plain = corrected_proportion(proportion(80, 100), perfect, perfect)
    assert plain.high - plain.value == pytest.approx(1.959964 * math.sqrt(0.8 * 0.2 / 100), rel=1e-6)
    with pytest.raises(ValueError, match="sees nothing"):
        corrected_proportion(proportion(5, 10), proportion(5, 10), proportion(4, 10))


def test_the_corrected_interval_holds_the_truth_as_often_as_it_says() -> None:
    g = torch.Generator().manual_seed(0)

    def count(p: float, n: int) -> Interval:
        return proportion(int(torch.rand(n, generator=g).lt(p).sum()), n)

    truth, hits, times = 0.7, 0, 400
    for _ in range(times):
        found = corrected_proportion(
            count(0.85 * truth + 0.1 * (1 - truth), 300), count(0.85, 200), count(0.9, 200)
        )
        hits += found.low < truth < found.high
    assert 0.92 < hits / times < 0.98
