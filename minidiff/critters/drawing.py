"""How critters are drawn: the outlines of :mod:`~minidiff.critters.outlines`, filled by Pillow.

One affine map puts them into the frame. They are drawn larger and averaged down, so edges are smooth. A
random generator moves, grows and tilts them a little.
"""

import random
from functools import cache
from math import cos, radians, sin
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from minidiff.critters.outlines import ANIMAL_SHAPES, BEFORE_THE_HAT, HAT_SHAPES, Outline, grow
from minidiff.critters.scene import POSITIONS, RELATIONS, Critter, Scene, Shown

RGB = tuple[int, int, int]

_INK: RGB = (38, 32, 44)
_WHITE: RGB = (255, 255, 255)
_FUR_RGB: dict[str, RGB] = {
    "orange": (242, 138, 34), "gray": (142, 148, 160), "black": (66, 62, 74), "white": (247, 242, 232),
    "brown": (144, 90, 52), "pink": (250, 150, 175), "green": (122, 196, 62),
    "black and white": (247, 242, 232),
}  # fmt: skip
_HAT_RGB: dict[str, RGB] = {
    "red": (222, 40, 48), "yellow": (252, 204, 28), "green": (18, 140, 76), "blue": (32, 98, 220),
    "purple": (138, 60, 190),
}  # fmt: skip
_BACKGROUND_RGB: dict[str, RGB] = {  # pale, so that fur and hat stand out
    "pink": (252, 200, 214), "white": (250, 250, 250), "blue": (166, 208, 248), "green": (172, 224, 182),
    "yellow": (255, 236, 156),
}  # fmt: skip


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    """``share`` of colour b in colour a."""
    red, green, blue = (round(x + share * (y - x)) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _shade(rgb: RGB) -> RGB:
    """A darker and richer tone: the power law takes most from the weakest of the three channels."""
    red, green, blue = (round(255 * (x / 255) ** 1.7) for x in rgb)
    return _mix((red, green, blue), _INK, 0.2)


@cache
def _palette(fur: str, hat_color: str) -> dict[str, RGB]:
    """What the colour words of the drawings mean for this critter."""
    coat, hat = _FUR_RGB[fur], _HAT_RGB[hat_color]
    paints = {
        "fur": coat,
        "dark fur": _shade(coat),
        "muzzle": (226, 208, 188) if fur == "white" else _mix(coat, _WHITE, 0.62),
        "hat": hat,
        "dark hat": _shade(hat),
        "light hat": _mix(hat, _WHITE, 0.78),
        "ink": _INK,
        "white": _WHITE,
        "pink": (255, 146, 166),
        "lime": (206, 232, 92),
        "whisker": (225, 222, 230) if fur == "black" else _INK,
    }
    return paints | {f"{name} edge": _mix(_shade(rgb), _INK, 0.5) for name, rgb in paints.items()}


# --- pictures -----------------------------------------------------------------------------------

OVERSAMPLING = 4
"""How many times larger than its picture a critter is drawn before it is averaged down."""


_RIM = 0.09  # width of the dark rim around a shape, in head radii


class _Drawing(NamedTuple):
    points: Outline  # all outlines one after another, (n, 2)
    shapes: list[tuple[int, int, str]]  # first row, row after the last, paint


@cache
def _drawing(animal: str, hat: str) -> _Drawing:
    shapes = [*ANIMAL_SHAPES[animal], *HAT_SHAPES[hat], *BEFORE_THE_HAT.get(animal, [])]
    layers = []
    for paint, outline, edge in shapes:
        if edge:
            layers.append((f"{paint} edge", grow(outline, _RIM)))
        layers.append((paint, outline))
    ends = np.cumsum([len(outline) for _, outline in layers]).tolist()
    paints = [paint for paint, _ in layers]
    return _Drawing(
        np.concatenate([outline for _, outline in layers]),
        list(zip([0, *ends[:-1]], ends, paints, strict=True)),
    )


def check_size(size: int) -> None:
    """Raise ValueError unless a picture of ``size`` pixels can be drawn."""
    if size < 8:
        raise ValueError(f"size {size} is too small for a portrait: use 8 or more")


def draw(
    shown: Shown,
    size: int = 64,
    rng: random.Random | None = None,
    *,
    without: Literal["first", "second"] | None = None,
) -> Image.Image:
    """The critter's portrait, or the scene with both critters a little more than half as large.

    Args:
        shown: what to draw.
        size: height and width in pixels, at least 8; meant for 32 to 128, for a scene 64 and more.
        rng: jitters a critter's position (± 3.5 % of the frame across, ± 2.5 % down; in a scene as much
            as there is room for), size (± 6 %) and tilt (± 9°). None draws it upright in the middle, the
            two of a scene as far from each other as from the frame.
        without: leave this critter of a scene out, for a reader that shall see when one is missing.

    Returns:
        An RGB picture of ``size`` by ``size`` pixels. Heads and hats are wholly inside the frame. Two
        critters do not overlap: of 64 pixels, at least one is free between them and to every side.

    Raises:
        ValueError: ``size`` is below 8, or ``without`` is no position.
    """
    check_size(size)
    if without is not None and without not in POSITIONS:
        raise ValueError(f"without {without!r} is unknown: choose from {', '.join(POSITIONS)}")
    canvas = size * OVERSAMPLING
    image = Image.new("RGB", (canvas, canvas), _BACKGROUND_RGB[shown.background])
    # Chance is drawn in units of the frame, so one rng gives one pose at every size.
    if isinstance(shown, Critter):
        across, down, growth, tilt = (_jitter(rng) for _ in range(4))
        center = (0.5 + 0.035 * across) * canvas, (0.635 + 0.025 * down) * canvas
        _paint(image, shown, _posed(shown, center, 0.285 * canvas * (1 + 0.06 * growth), 9 * tilt))
    else:
        for position, critter, points in zip(
            POSITIONS, shown.critters, _side_by_side(shown, canvas, rng), strict=True
        ):
            if position != without:
                _paint(image, critter, points)
    return image.reduce(OVERSAMPLING)


def _jitter(rng: random.Random | None) -> float:
    return 0.0 if rng is None else rng.uniform(-1, 1)


def _side_by_side(scene: Scene, canvas: int, rng: random.Random | None) -> list[Outline]:
    """The corners of both critters' outlines, beside or above each other."""
    figures = []
    for critter in scene.critters:
        radius = 0.155 * canvas * (1 + 0.06 * _jitter(rng))
        figures.append(_posed(critter, (0, 0), radius, 9 * _jitter(rng)))
    along = RELATIONS.index(scene.relation)  # 0: they share the width, 1: the height
    margin = canvas / 64
    extents = [np.ptp(points[:, along]) for points in figures]
    room = canvas - sum(extents) - 3 * margin
    # A third of the room before, between and after them, less or more by half of that.
    start, end = (room * (1 / 3 + _jitter(rng) / 6) + margin for _ in figures)
    placed = []
    for points, begin in zip(figures, (start, canvas - end - extents[1]), strict=True):
        shift, other = np.zeros(2), points[:, 1 - along]
        shift[along] = begin - points[:, along].min()
        shift[1 - along] = canvas * (0.5 + 0.05 * _jitter(rng)) - (other.min() + other.max()) / 2
        placed.append(points + shift)
    return placed


def _posed(critter: Critter, center: tuple[float, float], radius: float, tilt: float) -> Outline:
    """The corners of all outlines (n, 2): head of ``radius`` pixels at ``center``, tilted by degrees,
    clockwise."""
    c, s = radius * cos(radians(tilt)), radius * sin(radians(tilt))
    left, top = center
    x, y = _drawing(critter.animal, critter.hat).points.T
    return np.stack([left + c * x - s * y, top + s * x + c * y], axis=1)


def _paint(image: Image.Image, critter: Critter, points: Outline) -> None:
    """Fill the critter's outlines, whose corners are ``points`` (n, 2), with its colours."""
    xy = points.ravel().tolist()
    paints = _palette(critter.fur, critter.hat_color)
    pen = ImageDraw.Draw(image)
    for start, end, color in _drawing(critter.animal, critter.hat).shapes:
        pen.polygon(xy[2 * start : 2 * end], paints[color])
