"""How good are the samples? Numbers that come with their uncertainty.

Samples are random, so every score computed from them is, too. Each function here says how far its
number can be trusted: an :class:`Interval` holds the value, both ends of a confidence interval, and
the number of samples, without which a score means little::

    print(proportion(503, 512))      # 98.2 % [96.7, 99.1], n = 512

* :func:`proportion`: how often something is right, for instance the prompt.
  :func:`corrected_proportion` allows for the errors of who judged it.
* :func:`energy_test`: could two sets of points come from the same distribution?
* :func:`frechet_distance`, :func:`kernel_distance`: FID and KID, through torchmetrics, with any
  network in between. FID is biased: fewer samples, higher FID, with the same model. No interval
  shows that, so compare only FIDs of equal n. KID has no such bias. :func:`frechet_floor` says how
  large the bias is where there is nothing to find, :func:`frechet_limit` takes it out.
* :func:`prdc`: do the samples look real, and do they show all that is real?
"""

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn

FEWEST = 40
"""Samples below which the distances have no error bars: 20 groups of 2."""
KERNELS = 2**22
"""So many numbers of a table of pairs are in memory at a time."""


class Interval(NamedTuple):
    """A value, and the range in which it would probably lie if all were known.

    Attributes:
        value: the estimate.
        low: lower end of the confidence interval.
        high: upper end.
        n: number of samples behind it.
        unit: "%" for a share in [0, 1] that is printed in per cent, else "".
    """

    value: float
    low: float
    high: float
    n: int
    unit: Literal["", "%"] = ""

    def __str__(self) -> str:
        numbers = self.value, self.low, self.high
        if self.unit == "%":
            value, low, high = (f"{100 * number:.1f}" for number in numbers)
            return f"{value} % [{low}, {high}], n = {self.n}"
        # As many decimals as the width of the interval makes meaningful: two digits of it.
        width = self.high - self.low
        decimals = max(0, 1 - math.floor(math.log10(width))) if 0 < width < math.inf else 3
        value, low, high = (f"{number:.{decimals}f}" for number in numbers)
        return f"{value} [{low}, {high}], n = {self.n}"


def proportion(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The share of ``successes`` in ``n`` trials with its confidence interval (Wilson 1927), in per cent.

    Unlike p ± 2 std the interval stays inside [0, 1] and does not shrink to nothing at 0 or n successes.

    Args:
        successes: 0 to ``n``.
        n: number of independent trials, >= 1.
        confidence: chance, in (0, 1), that such an interval holds the truth.

    Returns:
        Interval, its ends in [0, 1].

    Raises:
        ValueError: an argument is out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials: give 0 <= successes <= n, n >= 1")
    _check_confidence(confidence)
    low, high = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(low), float(high), n, "%")


def corrected_proportion(
    share: Interval, sensitivity: Interval, specificity: Interval, confidence: float = 0.95
) -> Interval:
    """A share as a fallible judge saw it, freed from the judge's known errors (Rogan & Gladen 1978).

    A judge who says yes to true cases with chance ``a`` and no to false ones with chance ``b`` sees
    the share ``p = a q + (1 - b) (1 - q)`` of a true share q, so ``q = (p + b - 1) / (a + b - 1)``.
    The interval (delta method) knows that all three are estimates.

    Args:
        share: what the judge saw; its ``value`` and ``n`` are used, here and below.
        sensitivity: share of yes among cases known to be true.
        specificity: share of no among cases known to be false.
        confidence: of the interval, in (0, 1).

    Returns:
        Interval, n that of ``share``. It is not cut off at 0 and 1: a value outside says that the judge
        does not err on these cases as on those where the errors were counted.

    Raises:
        ValueError: the judge does no better than chance, ``sensitivity + specificity <= 1``.
    """
    p, a, b = share.value, sensitivity.value, specificity.value
    skill = a + b - 1
    if skill <= 0:
        raise ValueError(f"sensitivity {a:g} + specificity {b:g} - 1 is {skill:g}: such a judge sees nothing")
    _check_confidence(confidence)
    q = (p + b - 1) / skill
    variance = p * (1 - p) / share.n
    variance += q**2 * a * (1 - a) / sensitivity.n + (1 - q) ** 2 * b * (1 - b) / specificity.n
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt(variance) / skill
    return Interval(q, q - half, q + half, share.n, "%")


def mean(values: Tensor, confidence: float = 0.95) -> Interval:
    """The mean of independent numbers (n,), n >= 2, with the interval of Student's t."""
    n = len(values)
    stderr = float(values.double().std()) / math.sqrt(n)
    half = _student_quantile(confidence, n - 1) * stderr
    value = float(values.double().mean())
    return Interval(value, value - half, value + half, n)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """How different two sets of samples are: 2 E|x-y| - E|x-x'| - E|y-y'| (Székely & Rizzo 2013).

    In the limit of many samples it is 0 exactly if both have one distribution; for finite sets
    it is a little above 0, which :func:`energy_test` allows for.

    Args:
        x: (n, ...).
        y: (m, ...), of the same shape behind the batch.

    Returns:
        The distance, >= 0, in the units of ``x``.

    Raises:
        ValueError: shapes do not fit, or a set has fewer than 2 samples.
    """
    distances, weights = _pooled(x, y)
    return max(0.0, float(-weights @ distances @ weights))


def energy_test(
    x: Tensor, y: Tensor, permutations: int = 999, generator: torch.Generator | None = None
) -> float:
    """Could ``x`` and ``y`` come from one distribution? A permutation test of the energy distance.

    If they do, it does not matter which sample carries which name: the p-value is the share of
    random namings whose distance is at least the observed one (Székely & Rizzo 2004). A tiny one
    says that they differ; a large one, only that these samples show no difference. Needs memory
    for (n + m)² distances.

    Args:
        x: (n, ...).
        y: (m, ...), of the same shape behind the batch.
        permutations: number of random namings; the smallest p-value is 1/(permutations + 1).
        generator: source of the namings, on the CPU.

    Returns:
        The p-value, in (0, 1].

    Raises:
        ValueError: as for :func:`energy_distance`, or ``permutations`` is smaller than 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations = {permutations}: give at least 1")
    distances, weights = _pooled(x, y)
    observed = -weights @ distances @ weights
    shuffles = [torch.randperm(len(weights), generator=generator) for _ in range(permutations)]
    named = weights[torch.stack(shuffles).to(weights.device)]  # (permutations, n + m)
    chance = -((named @ distances) * named).sum(dim=1)
    as_large = chance >= observed - 1e-12 * distances.mean()  # rounding must not break ties
    return (1 + int(as_large.sum())) / (1 + permutations)


@torch.no_grad()
def features_of(x: Tensor, feature: nn.Module | None, batch_size: int = 64) -> Tensor:
    """Features of samples, (n, F) float64, as all distances here take them.

    Args:
        x: samples (n, ...), or their features (n, F).
        feature: takes batches of ``x`` as they are, gives (B, F); None for features.
        batch_size: samples given to ``feature`` at a time.

    Raises:
        ValueError: what comes out is not (n, F).
    """
    if feature is not None:
        was_training = feature.training
        feature.eval()
        x = torch.cat([feature(batch) for batch in x.split(batch_size)])
        feature.train(was_training)
    if x.ndim != 2:
        raise ValueError(f"features of shape {tuple(x.shape)}: give (n, F), or a network as `feature`")
    return x.double()


def frechet_distance(
    x: Tensor,
    y: Tensor,
    feature: nn.Module | None = None,
    *,
    groups: int = 20,
    confidence: float = 0.95,
    batch_size: int = 64,
) -> Interval:
    """Fréchet distance of two sets of samples; FID when ``feature`` is Inception.

    Gaussians are fitted to the features of both (Heusel et al. 2017), and
    ``|mu_x - mu_y|² + tr(C_x + C_y - 2 (C_x C_y)^(1/2))`` is the squared distance between them.
    The interval says how the value would scatter if the same number of samples were drawn again.

    Args:
        x: generated samples (n, ...), or their features (n, F).
        y: real samples (m, ...), or their features (m, F).
        feature: takes batches of ``x`` and ``y`` as they are, gives (B, F); None for features.
        groups: number of groups of the jackknife; each costs one more distance, and with it the
            eigenvalues of an (F, F) matrix.
        confidence: of the interval, in (0, 1).
        batch_size: samples given to ``feature`` at a time.

    Returns:
        Interval, n being the size of the smaller set.

    Raises:
        ValueError: shapes do not fit, or a set is smaller than 2 * groups.

    Warns:
        UserWarning: fewer samples than features; most of such a value is bias.
    """
    x, y = features_of(x, feature, batch_size), features_of(y, feature, batch_size)
    n, width = min(len(x), len(y)), x.shape[1]
    if n <= width:
        warnings.warn(f"a Fréchet distance of {n} samples in {width} dimensions", stacklevel=2)
    return _jackknife(_frechet(x), x, y, groups, confidence)


def frechet_limit(
    x: Tensor,
    y: Tensor,
    feature: nn.Module | None = None,
    *,
    groups: int = 20,
    confidence: float = 0.95,
    batch_size: int = 64,
) -> Interval:
    """The Fréchet distance that endlessly many samples would have: FID∞ (Chong & Forsyth 2020).

    The bias of a Fréchet distance falls like 1/n, as soon as n is well above the number of features. So
    half of the samples have twice the bias, and ``2 D(n) - D(n/2)`` has none of that order (Quenouille
    1949); D(n/2) is the mean of both halves. What is without bias can come out slightly negative.
    Arguments, result and errors as in :func:`frechet_distance`; the interval is wider.

    Raises:
        ValueError: no more than twice as many samples as features: there is no line to follow yet.
    """
    x, y = features_of(x, feature, batch_size), features_of(y, feature, batch_size)
    n, width = min(len(x), len(y)), x.shape[1]
    if n <= 2 * width:
        raise ValueError(f"{n} samples in {width} dimensions: give more than {2 * width}")
    if groups < 2 or n < 4 * groups:
        raise ValueError(f"{n} samples in {groups} groups: give at least 2 groups of 4 samples")
    distance = _frechet(x)

    def limit(x: Tensor, y: Tensor) -> float:  # (pairs, 2, F) each
        halves = [distance(x[:, part], y[:, part]) for part in (0, 1)]
        return 2 * distance(x.flatten(0, 1), y.flatten(0, 1)) - sum(halves) / 2

    # One of two neighbours in each half: the jackknife, which leaves out pairs, takes as many from both.
    x, y = (part[: len(part) // 2 * 2].unflatten(0, (-1, 2)) for part in (x, y))
    return _jackknife(limit, x, y, groups, confidence)._replace(n=n)


def frechet_floor(covariance: Tensor, n: int, m: int | None = None) -> float:
    """What two sets of samples of one distribution are apart on average: FID's bias where the truth is 0.

    To first order in 1/n, for features that are Gaussian with eigenvalues l_i of their covariance::

        (1/n + 1/m) (sum_i l_i + 1/2 sum_ij (1 + [i = j]) l_i l_j / (l_i + l_j))

    The first sum comes from the means, for any distribution. The second comes from the covariances: the
    Fréchet distance of C and C + E is ``sum_ij E_ij² / (l_i + l_j) / 2`` for a small E, and sampling has
    ``Var E_ij = (1 + [i = j]) l_i l_j / n``. Heavier tails than a Gaussian's make it larger.

    Args:
        covariance: (F, F) of the features.
        n: samples in one set.
        m: samples in the other; None for as many.

    Raises:
        ValueError: n or m is below 2.
    """
    if min(n, m or n) < 2:
        raise ValueError(f"{n} and {m or n} samples: give at least 2")
    values = torch.linalg.eigvalsh(covariance.double()).clamp(min=0)
    pairs = values[:, None] * values / (values[:, None] + values).clamp(min=1e-300)
    per_sample = values.sum() + (pairs.sum() + pairs.diagonal().sum()) / 2
    return float(per_sample) * (1 / n + 1 / (m or n))


def kernel_distance(
    x: Tensor,
    y: Tensor,
    feature: nn.Module | None = None,
    *,
    groups: int = 20,
    confidence: float = 0.95,
    batch_size: int = 64,
) -> Interval:
    """Kernel distance of two sets of samples; KID when ``feature`` is Inception.

    The squared maximum mean discrepancy with the kernel ``(a·b/F + 1)³`` (Binkowski et al. 2018),
    estimated without bias, so it can come out slightly negative. Of the larger set as many samples
    are used as the smaller has. Arguments, result and errors as in :func:`frechet_distance`.
    """
    x, y = features_of(x, feature, batch_size), features_of(y, feature, batch_size)
    n = min(len(x), len(y))
    return _jackknife(_squared_mmd, x[:n], y[:n], groups, confidence)


class PRDC(NamedTuple):
    """How samples and real data cover each other.

    Attributes:
        precision: share of the samples that lie among real data.
        recall: share of the real data that lie among samples.
        density: as precision, but counts among how many; above 1 where samples crowd.
        coverage: share of the real data that have a sample near by.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(x: Tensor, y: Tensor, feature: nn.Module | None = None, *, k: int = 5, batch_size: int = 64) -> PRDC:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    A point lies *among* a set if it is nearer to one of its members than that member's k-th neighbour in the
    set. All four depend on n, m and k, even where both sets have one distribution: compare with real against
    real, at the same numbers.

    Args:
        x: generated samples (n, ...), or their features (n, F).
        y: real samples (m, ...), or their features (m, F).
        feature: as in :func:`frechet_distance`.
        k: which neighbour sets the radius.
        batch_size: samples given to ``feature`` at a time.

    Raises:
        ValueError: shapes do not fit, or a set has no more than k samples.
    """
    x, y = features_of(x, feature, batch_size), features_of(y, feature, batch_size)
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"{x.shape[1]} features against {y.shape[1]}: they must be of one kind")
    if not 1 <= k < min(len(x), len(y)):
        raise ValueError(f"k = {k}: use 1 to {min(len(x), len(y)) - 1} for {len(x)} and {len(y)} samples")
    # The nearest to a point is the point itself, so its k-th neighbour is number k + 1.
    radius_x, radius_y = (torch.cdist(z, z).kthvalue(k + 1, dim=1).values for z in (x, y))
    apart = torch.cdist(x, y)  # (n, m)
    near_real, near_sample = apart < radius_y, apart < radius_x[:, None]
    return PRDC(
        precision=float(near_real.any(1).double().mean()),
        recall=float(near_sample.any(0).double().mean()),
        density=float(near_real.sum(1).double().mean() / k),
        coverage=float(near_real.any(0).double().mean()),
    )


class _Given(nn.Identity):
    """Passes features on, in the place where torchmetrics expects a network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _frechet(x: Tensor) -> Callable[[Tensor, Tensor], float]:
    """The Fréchet distance of two sets of features like ``x``, as torchmetrics computes it."""
    # Imported where it is used: torchmetrics takes seconds to load.
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(x.shape[1])).to(x.device)

    def distance(x: Tensor, y: Tensor) -> float:
        metric.reset()
        metric.update(y, real=True)
        metric.update(x, real=False)
        return float(metric.compute())

    return distance


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The squared maximum mean discrepancy of features (n, F) each (Binkowski et al. 2018, eq. 4).

    The kernels of all pairs, n² numbers, are summed a few rows at a time: whole they would fill the memory.
    """
    # Imported where it is used: torchmetrics takes seconds to load.
    from torchmetrics.image.kid import poly_kernel

    n = len(x)

    def total(a: Tensor, b: Tensor) -> float:
        return sum(float(poly_kernel(rows, b).sum()) for rows in a.split(max(1, KERNELS // n)))

    def same(a: Tensor) -> float:  # k(a_i, a_i)
        return float(((a.square().sum(1) / a.shape[1] + 1) ** 3).sum())

    within = total(x, x) - same(x) + total(y, y) - same(y)
    return within / (n * (n - 1)) - 2 * total(x, y) / n**2


def _jackknife(
    statistic: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, groups: int, confidence: float
) -> Interval:
    """A statistic of two sets, with the interval of the delete-a-group jackknife (Shao & Tu 1995).

    Each group of samples is left out once; how the statistic reacts tells its standard error. A
    bootstrap would draw samples twice, which both distances here take for a difference.
    """
    n = min(len(x), len(y))
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(f"{x.shape[-1]} features against {y.shape[-1]}: they must be of one kind")
    if groups < 2 or n < 2 * groups:
        raise ValueError(f"{n} samples in {groups} groups: give at least 2 groups of 2 samples")
    value = statistic(x, y)
    of_x, of_y = (torch.arange(len(part), device=part.device) % groups for part in (x, y))
    without = torch.tensor([statistic(x[of_x != g], y[of_y != g]) for g in range(groups)])
    error = math.sqrt((groups - 1) * float(without.double().var(correction=0)))
    half = _student_quantile(confidence, groups - 1) * error
    return Interval(value, value - half, value + half, n)


def _pooled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distances between all samples, (n + m, n + m), and weights 1/n for x, -1/m for y.

    With them the energy distance is the quadratic form - w·D·w.
    """
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
        raise ValueError(f"x and y have shapes {shapes}: give two sets of at least 2 equal samples")
    both = torch.cat([x, y.to(x.device)]).detach().flatten(1).double()
    weights = both.new_full((len(both),), 1 / len(x))
    weights[len(x) :] = -1 / len(y)
    return torch.cdist(both, both), weights


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence:g} is outside (0, 1)")


def _student_quantile(confidence: float, freedom: int) -> float:
    """q such that Student's t lies in [-q, q] with this probability."""
    _check_confidence(confidence)
    return float(stats.t.ppf((1 + confidence) / 2, freedom))
