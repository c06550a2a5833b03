"""The point sets: where they lie, and that they are what they are called."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minidiff.data import points

SETS = [points.two_moons, points.spiral, points.checkerboard, points.cat_in_a_hat]


@pytest.mark.parametrize("draw", [*SETS, points.ring_of_gaussians().sample])
def test_scale_and_seed(draw: Callable[..., Tensor]) -> None:
    x = draw(50_000, torch.Generator().manual_seed(0))
    assert x.shape == (50_000, 2)
    assert x.dtype == torch.float32
    assert x.mean(0).norm() < 0.05
    assert x.var(0).mean().item() == pytest.approx(1, abs=0.03)
    again = draw(50_000, torch.Generator().manual_seed(0))
    assert (again == x).all()
    assert (draw(5, torch.Generator().manual_seed(1)) != x[:5]).any()


def test_checkerboard_has_black_squares_only() -> None:
    x = points.checkerboard(20_000) / (3**0.5 / 2)  # squares of side 1
    column, row = (x.floor() + 2).long().T
    assert column.min() == row.min() == 0
    assert column.max() == row.max() == 3
    assert ((column + row) % 2 == 0).all()
    share = torch.bincount(4 * row + column, minlength=16)[[0, 2, 5, 7, 8, 10, 13, 15]] / 20_000
    torch.testing.assert_close(share, torch.full((8,), 0.125), atol=0.01, rtol=0)


def test_ring_has_unit_variance_and_the_asked_modes() -> None:
    ring = points.ring_of_gaussians(modes=5, std=0.3)
    torch.testing.assert_close(ring.covariance, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert len(ring.means) == 5
    with pytest.raises(ValueError, match="modes = 0"):
        points.ring_of_gaussians(0)
    with pytest.raises(ValueError, match="std = 1"):
        points.ring_of_gaussians(std=1.0)


def test_the_cat_wears_a_hat() -> None:
    """Two ears beside a hat that is higher, a band of no points across it, eyes with slits."""
    x = points.cat_in_a_hat(100_000)

    def share(left: float, right: float, low: float, high: float) -> float:
        inside = (x[:, 0] > left) & (x[:, 0] < right) & (x[:, 1] > low) & (x[:, 1] < high)
        return inside.double().mean().item() / ((right - left) * (high - low))

    full = share(-0.4, 0.4, 1.5, 2.2)  # the crown of the hat
    assert full > 0.1
    assert share(-0.4, 0.4, 0.95, 1.08) == 0, "the band"
    assert share(-0.5, 0.5, 0.7, 0.8) == pytest.approx(full, rel=0.1), "the brim"
    for side in (-1, 1):
        tip = sorted((side * 1.3, side * 1.5))
        assert share(*tip, 0.4, 0.8) > 0.3 * full, "an ear"
        beside = sorted((side * 0.9, side * 1.1))
        assert share(*beside, 1.3, 2.3) == 0, "nothing beside the hat"
