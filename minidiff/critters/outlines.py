"""The outlines that critters are made of.

A drawing is a list of filled outlines in the head's own coordinates: the head is about a circle of
radius 1 around (0, 0), x to the right, y down, and the highest hat ends at y = -1.9.
"""

from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Outline = NDArray[np.float64]  # (n, 2): corners of a closed curve, in head coordinates


class Shape(NamedTuple):
    """One filled outline; ``edge`` puts a darker, wider copy behind it."""

    paint: str
    outline: Outline
    edge: bool = False


def grow(outline: Outline, width: float) -> Outline:
    """The outline moved outwards by ``width``; its corners must be rounded."""
    along = np.roll(outline, -1, 0) - np.roll(outline, 1, 0)
    normal = along[:, ::-1] * np.array([1.0, -1.0]) / np.hypot(*along.T)[:, None]
    x, y = outline.T
    clockwise = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() > 0  # as seen: y points down
    grown = outline + (width if clockwise else -width) * normal
    # In a notch the moved sides cross; what lies beyond the crossing is too near the old outline.
    gap = np.hypot(*(grown[:, None] - outline[None]).transpose(2, 0, 1)).min(axis=1)
    kept: Outline = grown[gap > 0.99 * width]
    return kept


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> Outline:
    """An ellipse around (x, y), turned clockwise by ``tilt`` degrees."""
    angle = np.arange(36) * (2 * pi / 36)
    c, s = cos(radians(tilt)), sin(radians(tilt))
    a, b = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack([x + c * a - s * b, y + s * a + c * b], axis=1)


def _polygon(*corners: tuple[float, float], bend: float = 0.1) -> Outline:
    """A polygon whose corners are rounded off: a parabola starts ``bend`` before each corner."""
    points = np.array(corners)
    turns = []
    for before, corner, after in zip(np.roll(points, 1, 0), points, np.roll(points, -1, 0), strict=True):
        start, end = (
            corner + (other - corner) * min(0.48, bend / np.hypot(*(other - corner)))
            for other in (before, after)
        )
        u = np.linspace(0, 1, 7)[:, None]
        turns.append((1 - u) ** 2 * start + 2 * u * (1 - u) * corner + u**2 * end)
    sides = [
        np.linspace(turn[-1], following[0], 7)[1:-1]
        for turn, following in zip(turns, [*turns[1:], turns[0]], strict=True)
    ]
    return np.concatenate([part for both in zip(turns, sides, strict=True) for part in both])


def _slab(top: float, above: float, bottom: float, below: float, bend: float = 0.1) -> Outline:
    """A trapezoid from ``top`` down to ``bottom`` that reaches ``above`` and ``below``
    to either side there."""
    return _polygon((-below, bottom), (-above, top), (above, top), (below, bottom), bend=bend)


def _star(x: float, y: float, r: float) -> Outline:
    """A five-pointed star around (x, y)."""
    angles = [radians(36 * k - 90) for k in range(10)]
    radii = [r, 0.5 * r] * 5
    return np.array([(x + d * cos(a), y + d * sin(a)) for d, a in zip(radii, angles, strict=True)])


def _mirror(outline: Outline) -> Outline:
    return np.stack([-outline[:, 0], outline[:, 1]], axis=1)


def _pair(paint: str, outline: Outline, edge: bool = False) -> list[Shape]:
    """The outline on the right and its mirror image on the left."""
    return [Shape(paint, outline, edge), Shape(paint, _mirror(outline), edge)]


def _eyes(x: float = 0.42, y: float = -0.1, white: str = "white", slit: bool = False) -> list[Shape]:
    """Two round eyes that look at the reader, with a glint."""
    return [
        *_pair(white, _ellipse(x, y, 0.23, 0.26)),
        *_pair("ink", _ellipse(x, y, 0.11 if slit else 0.165, 0.2)),
        Shape("white", _ellipse(x - 0.05, y - 0.09, 0.06, 0.06)),
        Shape("white", _ellipse(-x - 0.05, y - 0.09, 0.06, 0.06)),
    ]


def _cat() -> list[Shape]:
    whiskers = [
        _polygon((0.5, 0.34), (1.25, 0.2), (1.25, 0.27), (0.5, 0.42), bend=0.02),
        _polygon((0.5, 0.5), (1.2, 0.56), (1.2, 0.63), (0.5, 0.58), bend=0.02),
    ]
    return [
        *_pair("fur", _polygon((0.2, -0.62), (1.12, -1.34), (1.04, 0.1), bend=0.16), edge=True),
        *_pair("pink", _polygon((0.56, -0.66), (0.99, -1.07), (0.93, -0.34), bend=0.1)),
        Shape("fur", _ellipse(0, 0.02, 1.04, 0.86), edge=True),
        *_eyes(white="lime", slit=True),
        *[shape for whisker in whiskers for shape in _pair("whisker", whisker)],
        *_pair("muzzle", _ellipse(0.17, 0.46, 0.22, 0.18)),
        Shape("pink", _polygon((-0.17, 0.22), (0.17, 0.22), (0, 0.44), bend=0.07)),
    ]


def _dog() -> list[Shape]:
    ear = _polygon((0.55, -0.72), (1.0, -0.72), (1.3, 0.3), (1.16, 0.62), (0.86, 0.5), bend=0.24)
    return [
        Shape("fur", _ellipse(0, 0, 0.96, 0.88), edge=True),
        Shape("muzzle", _ellipse(0, 0.44, 0.54, 0.4)),
        Shape("dark fur", _ellipse(0.42, -0.1, 0.34, 0.38)),
        *_pair("dark fur", ear, edge=True),
        *_eyes(y=-0.12),
        Shape("pink", _polygon((-0.15, 0.5), (0.15, 0.5), (0.15, 0.84), (-0.15, 0.84), bend=0.14)),
        Shape("ink", _ellipse(0, 0.3, 0.22, 0.16)),
    ]


def _rabbit() -> list[Shape]:
    return [
        *_pair("fur", _ellipse(0.74, -0.91, 0.28, 0.77, 19), edge=True),
        *_pair("pink", _ellipse(0.76, -0.93, 0.14, 0.55, 19)),
        Shape("fur", _ellipse(0, 0.06, 0.9, 0.82), edge=True),
        *_eyes(x=0.4, y=-0.06),
        *_pair("muzzle", _ellipse(0.19, 0.46, 0.25, 0.2)),
        Shape("white", _polygon((-0.15, 0.5), (0.15, 0.5), (0.14, 0.84), (-0.14, 0.84), bend=0.06)),
        Shape("pink", _ellipse(0, 0.32, 0.15, 0.11)),
    ]


def _bear() -> list[Shape]:
    return [
        *_pair("fur", _ellipse(0.8, -0.62, 0.36, 0.36), edge=True),
        *_pair("muzzle", _ellipse(0.82, -0.62, 0.19, 0.19)),
        Shape("fur", _ellipse(0, 0, 1.04, 0.88), edge=True),
        Shape("muzzle", _ellipse(0, 0.42, 0.44, 0.34)),
        *_eyes(x=0.46),
        Shape("ink", _ellipse(0, 0.3, 0.2, 0.14)),
    ]


def _pig() -> list[Shape]:
    return [
        Shape("fur", _ellipse(0, 0.02, 1.04, 0.86), edge=True),
        *_pair("dark fur", _polygon((0.4, -0.8), (1.1, -1.0), (1.02, -0.22), bend=0.16), edge=True),
        *_eyes(x=0.5, y=-0.14),
        Shape("dark fur", _ellipse(0, 0.34, 0.46, 0.34)),
        *_pair("ink", _ellipse(0.17, 0.34, 0.09, 0.15)),
    ]


def _frog() -> list[Shape]:
    smile = ((-0.84, 0.22), (-0.4, 0.43), (0.4, 0.43), (0.84, 0.22), (0.45, 0.6), (-0.45, 0.6))
    return [
        Shape("fur", _ellipse(0, 0.1, 1.14, 0.78), edge=True),
        Shape("muzzle", _ellipse(0, 0.5, 0.8, 0.34)),
        Shape("ink", _polygon(*smile, bend=0.1)),
        *_pair("pink", _ellipse(0.87, 0.19, 0.16, 0.12)),
    ]


def _frog_eyes() -> list[Shape]:
    return [*_pair("fur", _ellipse(0.84, -0.36, 0.34, 0.34), edge=True), *_eyes(x=0.83, y=-0.37)]


def _panda() -> list[Shape]:
    return [
        *_pair("ink", _ellipse(0.82, -0.62, 0.36, 0.36)),
        Shape("fur", _ellipse(0, 0, 1.06, 0.88), edge=True),
        *_pair("ink", _ellipse(0.46, -0.04, 0.32, 0.4, 28)),
        *_eyes(x=0.43, y=-0.08),
        Shape("ink", _ellipse(0, 0.4, 0.19, 0.13)),
    ]


def _fox() -> list[Shape]:
    head = ((-0.7, -0.8), (0.7, -0.8), (1.22, 0.18), (0.4, 0.7), (0, 0.97), (-0.4, 0.7), (-1.22, 0.18))
    cheek = ((0, 0.92), (0.02, 0.5), (0.3, 0.18), (1.14, 0.18), (0.4, 0.66))
    return [
        *_pair("fur", _polygon((0.2, -0.6), (1.1, -1.46), (1.06, 0.1), bend=0.12), edge=True),
        *_pair("ink", _polygon((0.64, -1.03), (1.1, -1.46), (1.09, -0.74), bend=0.12)),
        Shape("fur", _polygon(*head, bend=0.24), edge=True),
        *_pair("white", _polygon(*cheek, bend=0.1)),
        *_eyes(x=0.42, y=-0.1),
        Shape("ink", _ellipse(0, 0.74, 0.19, 0.15)),
    ]


def _top_hat() -> list[Shape]:
    return [
        Shape("hat", _slab(-1.72, 0.62, -0.6, 0.56), edge=True),
        Shape("dark hat", _slab(-1.04, 0.59, -0.76, 0.58, bend=0.01)),
        Shape("hat", _slab(-0.76, 0.98, -0.5, 0.98, bend=0.12), edge=True),
    ]


def _party_hat() -> list[Shape]:
    stripes = (
        _polygon((-0.5, -0.76), (0.34, -1.1), (0.25, -1.3), (-0.4, -1.0), bend=0.01),
        _polygon((-0.26, -0.56), (0.48, -0.82), (0.56, -0.62), (0.3, -0.54), bend=0.01),
    )
    return [
        Shape("hat", _polygon((-0.62, -0.52), (0, -1.76), (0.62, -0.52), bend=0.08), edge=True),
        *[Shape("white", stripe) for stripe in stripes],
        Shape("white", _ellipse(0, -1.6, 0.2, 0.2), edge=True),
    ]


def _crown() -> list[Shape]:
    left = ((-0.68, -0.5), (-0.84, -1.4), (-0.38, -1.0))
    right = ((0.38, -1.0), (0.84, -1.4), (0.68, -0.5))
    return [
        Shape("hat", _polygon(*left, (0, -1.52), *right, bend=0.05), edge=True),
        Shape("dark hat", _slab(-0.76, 0.73, -0.5, 0.68, bend=0.03)),
        *[Shape("light hat", _ellipse(x, -0.63, 0.1, 0.1)) for x in (-0.4, 0, 0.4)],
    ]


def _beanie() -> list[Shape]:
    return [
        Shape("white", _ellipse(0, -1.48, 0.27, 0.27), edge=True),
        Shape("hat", _slab(-1.4, 0.74, -0.5, 0.78, bend=0.5), edge=True),
        Shape("dark hat", _slab(-0.82, 0.88, -0.46, 0.88, bend=0.14), edge=True),
    ]


def _cap() -> list[Shape]:
    peak = ((-0.2, -0.78), (0.7, -0.8), (1.22, -0.62), (1.22, -0.46), (-0.2, -0.46))
    return [
        Shape("hat", _slab(-1.36, 0.72, -0.5, 0.77, bend=0.45), edge=True),
        Shape("dark hat", _polygon(*peak, bend=0.12), edge=True),
    ]


def _wizard_hat() -> list[Shape]:
    cone = ((-0.62, -0.6), (-0.14, -1.5), (0.6, -1.76), (0.34, -1.27), (0.62, -0.6))
    return [
        Shape("hat", _polygon(*cone, bend=0.08), edge=True),
        Shape("light hat", _star(0.04, -1.08, 0.27)),
        Shape("dark hat", _ellipse(0, -0.6, 1.2, 0.2), edge=True),
    ]


ANIMAL_SHAPES = {
    "cat": _cat(), "dog": _dog(), "rabbit": _rabbit(), "bear": _bear(),
    "pig": _pig(), "frog": _frog(), "panda": _panda(), "fox": _fox(),
}  # fmt: skip
HAT_SHAPES = {
    "top hat": _top_hat(), "party hat": _party_hat(), "crown": _crown(),
    "beanie": _beanie(), "cap": _cap(), "wizard hat": _wizard_hat(),
}  # fmt: skip
BEFORE_THE_HAT = {"frog": _frog_eyes()}
