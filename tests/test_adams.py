"""Adams' method: its arithmetic word by word, and where it is exact."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import lagrange
from torch import Tensor

from minidiff.denoiser import Denoiser
from minidiff.exact import GaussianMixture
from minidiff.forward import NoiseLevel, Prediction
from minidiff.sampling import adams
from minidiff.schedule import Cosine, Flow, Karras, Linear, Schedule, Sigmoid

F64 = torch.float64
TWO = GaussianMixture(torch.tensor([[-0.6, 0.5], [1.6, 0.9]]), torch.tensor([0.3, 0.5]))
SCHEDULES = [Linear(), Cosine(), Sigmoid(), Karras(), Flow()]


def by_quadrature(denoise: Denoiser, x: Tensor, levels: Sequence[NoiseLevel], order: int) -> Iterator[Tensor]:
    """Adams' method word by word: polynomials and integrals by scipy, in polar coordinates.

    At alpha = cos(a) and sigma = sin(a), x/sigma grows by the integral of x0 over cot(a).
    """
    angles = [math.atan2(level.sigma, level.alpha) for level in levels]

    def advance(x: Tensor, i: int, known: list[tuple[float, Tensor]]) -> Tensor:
        t, s = angles[i], angles[i + 1]
        scale_t, scale_s = ((levels[k].alpha ** 2 + levels[k].sigma ** 2).sqrt() for k in (i, i + 1))
        after = torch.empty_like(x)
        for place in np.ndindex(x.shape):
            curve = lagrange([math.cos(a) for a, _ in known], [x0[place].item() for _, x0 in known])
            if s == 0:  # nothing of x_t is left, and all of the integral lies where alpha = 1
                after[place] = curve(1.0)
                continue
            slope = partial(lambda curve, a: curve(math.cos(a)) / math.sin(a) ** 2, curve)
            grown, _ = quad(slope, s, t, epsabs=1e-10, epsrel=1e-10)
            after[place] = math.sin(s) * (x[place] / scale_t / math.sin(t) + grown)
        return scale_s * after

    known: list[tuple[float, Tensor]] = []
    start = x
    for i, level in enumerate(levels[:-1]):
        known = [(angles[i], denoise(x, level).x0), *known][:order]
        if i > 0:
            x = advance(start, i - 1, known)
        start, x = x, advance(x, i, known)
        yield x


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_adams_integrates_the_polynomial(schedule: Schedule, order: int) -> None:
    """On uneven steps, from pure noise to clean data."""
    levels = [schedule(t) for t in (1.0, 0.8, 0.71, 0.4, 0.15)] + schedule.levels(1)[1:]
    x = levels[0].sigma * torch.randn(2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = by_quadrature(TWO.denoise, x, levels, order)
    for state, after in zip(adams(TWO.denoise, x, levels, order=order), expected, strict=True):
        torch.testing.assert_close(state.x, after, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [2, 3, 9])
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), Linear(zero_terminal_snr=True)], ids=str)
def test_adams_is_exact_where_x0_is_a_line_in_alpha(schedule: Schedule, steps: int, order: int) -> None:
    """As on the paths of normal data N(m, I), where x_s = alpha m + z and x0 = m + alpha z with the same z
    all along. From alpha = 0 the first step does not know the slope; the corrector makes up for it."""
    m, z = torch.tensor([[0.3, -1.0]], dtype=F64), torch.tensor([[1.2, 0.4]], dtype=F64)

    def denoise(x_t: Tensor, level: NoiseLevel) -> Prediction:
        x0 = m + level.alpha / (level.alpha**2 + level.sigma**2).sqrt() * z
        return Prediction(x0, (x_t - level.alpha * x0) / level.sigma)

    levels = schedule.levels(steps)
    *_, last = adams(denoise, levels[0].sigma * z, levels, order=order)
    torch.testing.assert_close(last.x, m + z, rtol=1e-8, atol=1e-8)


def test_adams_at_levels_that_differ_by_rounding() -> None:
    """Where sigma is tiny the alphas are all 1: their polynomial would be one of rounding errors."""
    ratios = [100.0, 1.0, 1e-3, 1e-9, 2e-10, 1e-14, 0.0]
    levels = [NoiseLevel(*torch.tensor([0.5, 1.0, ratio], dtype=F64)) for ratio in ratios]
    x = 100 * torch.randn(5, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    states = list(adams(TWO.denoise, x, levels))
    for state in states[2:]:
        torch.testing.assert_close(state.x, states[2].x, rtol=0, atol=1e-2)
