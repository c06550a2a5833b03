"""Critters: an endless data set of animals in hats, drawn by the code on this page.

A critter is five words (:class:`Critter`): an animal, its fur, a hat, the colour of the hat and the
background. :func:`draw` turns them into a picture, :func:`caption` into a sentence. Both take a
random generator: the picture moves, grows and tilts a little, the sentence chooses its words and
leaves some attributes out. What a caption says is exactly true, so prompt accuracy can be measured.

Some animal-hat pairs (:data:`HELD_OUT`, a cat in a top hat first of all) never occur in the
training split. A model that draws one has put together two things it only ever saw apart.

The drawings are lists of filled outlines in the head's own coordinates: the head is about a circle
of radius 1 around (0, 0), x to the right, y down, and the highest hat ends at y = -1.9. One
affine map puts them into the frame. They are drawn larger and averaged down, so edges are smooth.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from minidiff.data.drawn import Drawn, Split, check_size, check_split

# ------------------------------------------------------------------------------- what there is

ANIMALS = ("cat", "dog", "rabbit", "bear", "pig", "frog", "panda", "fox")
FURS = ("orange", "gray", "black", "white", "brown")
OWN_FUR = {"pig": "pink", "frog": "green", "panda": "black and white"}
"""Animals that come in one fur only; all others come in each of :data:`FURS`."""
HATS = ("top hat", "party hat", "crown", "beanie", "cap", "wizard hat")
HAT_COLORS = ("red", "yellow", "green", "blue", "purple")
BACKGROUNDS = ("pink", "white", "blue", "green", "yellow")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "animal": ANIMALS,
    "fur": (*FURS, *OWN_FUR.values()),
    "hat": HATS,
    "hat_color": HAT_COLORS,
    "background": BACKGROUNDS,
}
"""Every attribute with its values; a value's place in the tuple is its label (:func:`labels`)."""

HELD_OUT = (
    ("cat", "top hat"),
    ("rabbit", "crown"),
    ("dog", "wizard hat"),
    ("fox", "party hat"),
    ("panda", "beanie"),
    ("bear", "cap"),
)
"""Animal-hat pairs that the training split never shows: each hat misses one animal."""

_ALL_PAIRS = tuple((animal, hat) for animal in ANIMALS for hat in HATS)
_PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": tuple(pair for pair in _ALL_PAIRS if pair not in HELD_OUT),
    "held_out": HELD_OUT,
    "all": _ALL_PAIRS,
}


@dataclass(frozen=True)
class Critter:
    """The five words that say what a picture shows.

    Raises:
        ValueError: a word is not one of :data:`ATTRIBUTES`, or the animal has no such fur.
    """

    animal: str
    fur: str
    hat: str
    hat_color: str
    background: str

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(values)}")
        if self.fur not in furs(self.animal):
            has = " or ".join(furs(self.animal))
            raise ValueError(f"a {self.animal} has no {self.fur!r} fur: choose {has}")


def furs(animal: str) -> tuple[str, ...]:
    """The furs that ``animal`` comes in."""
    return (OWN_FUR[animal],) if animal in OWN_FUR else FURS


def sample(rng: random.Random, split: Split = "train") -> Critter:
    """A random critter: the pair of animal and hat uniform over the split, the rest uniform too.

    Args:
        rng: where the chance comes from.
        split: "train" never gives a pair of :data:`HELD_OUT`, "held_out" only those, "all" any.

    Raises:
        ValueError: ``split`` is none of the three.
    """
    check_split(split)
    animal, hat = rng.choice(_PAIRS[split])
    return Critter(
        animal, rng.choice(furs(animal)), hat, rng.choice(HAT_COLORS), rng.choice(BACKGROUNDS)
    )


def labels(critter: Critter) -> dict[str, int]:
    """Each attribute's class number, for a classifier with one head per attribute.

    Every label can be told from the picture alone. There are ``len(ATTRIBUTES[name])`` classes.
    """
    return {name: values.index(getattr(critter, name)) for name, values in ATTRIBUTES.items()}


# ------------------------------------------------------------------------------------ captions

OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "a portrait of ")
"""How a caption may begin; one that stands here twice is twice as likely."""
WEARS = ("in", "in", "wearing", "with")
"""What a caption may say between animal and hat."""


def prompt(critter: Critter, attributes: Sequence[str] = ("animal", "hat")) -> str:
    """The plain sentence that states the given attributes and no others.

    ``prompt(critter)`` may be "a cat in a top hat", and ``prompt(critter, tuple(ATTRIBUTES))``
    "an orange cat in a blue top hat on a green background".

    Raises:
        ValueError: an attribute's name is not one of :data:`ATTRIBUTES`.
    """
    for name in attributes:
        if name not in ATTRIBUTES:
            raise ValueError(f"attribute {name!r} is unknown: choose from {', '.join(ATTRIBUTES)}")
    text = portrait(critter, attributes)
    if "background" in attributes:
        text += f" on a {critter.background} background"
    return text


def portrait(
    critter: Critter, said: Sequence[str], noun: str = "critter", wears: str = "in"
) -> str:
    """The critter alone, without its background: "an orange cat in a top hat".

    Args:
        critter: who.
        said: names of the attributes to state; one that is left out does not show in the text.
        noun: what to call an animal that is not stated.
        wears: the word between animal and hat.
    """
    text = _a(_who(critter, said, noun))
    if "hat" in said or "hat_color" in said:
        text += f" {wears} {_a(_hat(critter, said))}"
    return text


def caption(critter: Critter, rng: random.Random) -> str:
    """A random true description: lower-case words, spaces and commas.

    Animal and hat are nearly always stated, of the other three attributes none to all. Two captions
    of a hundred say nothing but "a critter".
    """
    if rng.random() < 0.02:
        return "a critter"
    said = [name for name in ("animal", "hat") if rng.random() < 0.94]
    said += rng.sample(("fur", "hat_color", "background"), rng.randrange(4))

    noun = rng.choice(("critter", "animal"))
    who, hat, background = _who(critter, said, noun), _hat(critter, said), critter.background
    # A hat of which nothing is stated may still be mentioned: "a cat in a hat".
    hat_said = "hat" in said or "hat_color" in said or rng.random() < 0.5

    if rng.random() < 0.2:  # a list: "top hat, cat"
        items = [who] if "animal" in said or "fur" in said else []
        items += [hat] if hat_said else []
        items += [f"{background} background"] if "background" in said else []
        rng.shuffle(items)
        return ", ".join(items or [noun])

    if hat_said and rng.random() < 0.1:
        text = f"{_a(hat)} on {_a(who)}"
    elif hat_said:
        text = f"{_a(who)} {rng.choice(WEARS)} {_a(hat)}"
    else:
        text = _a(who)
    if "background" in said:
        text += rng.choice((f" on a {background} background", f", {background} background"))
    return rng.choice(OPENINGS) + text


def vocabulary() -> tuple[str, ...]:
    """Every word that :func:`caption` and :func:`prompt` can say, sorted."""
    grammar = "a an picture drawing portrait of in wearing with on critter animal hat background"
    values = " ".join(value for values in ATTRIBUTES.values() for value in values)
    return tuple(sorted({*grammar.split(), *values.split()}))


def _who(critter: Critter, said: Sequence[str], noun: str = "critter") -> str:
    noun = critter.animal if "animal" in said else noun
    return f"{critter.fur} {noun}" if "fur" in said else noun


def _hat(critter: Critter, said: Sequence[str]) -> str:
    noun = critter.hat if "hat" in said else "hat"
    return f"{critter.hat_color} {noun}" if "hat_color" in said else noun


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# -------------------------------------------------------------------------------------- colours

RGB = tuple[int, int, int]

_INK: RGB = (38, 32, 44)
_WHITE: RGB = (255, 255, 255)
_FUR_RGB: dict[str, RGB] = {
    "orange": (242, 138, 34),
    "gray": (142, 148, 160),
    "black": (66, 62, 74),
    "white": (247, 242, 232),
    "brown": (144, 90, 52),
    "pink": (250, 150, 175),
    "green": (122, 196, 62),
    "black and white": (247, 242, 232),
}
_HAT_RGB: dict[str, RGB] = {
    "red": (222, 40, 48),
    "yellow": (252, 204, 28),
    "green": (18, 140, 76),
    "blue": (32, 98, 220),
    "purple": (138, 60, 190),
}
_BACKGROUND_RGB: dict[str, RGB] = {  # pale, so that fur and hat stand out
    "pink": (252, 200, 214),
    "white": (250, 250, 250),
    "blue": (166, 208, 248),
    "green": (172, 224, 182),
    "yellow": (255, 236, 156),
}


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


# --------------------------------------------------------------------------------- the outlines

Outline = NDArray[np.float64]  # (n, 2): corners of a closed curve, in head coordinates


_RIM = 0.09  # width of the dark rim around a shape, in head radii


class Shape(NamedTuple):
    """One filled outline; ``edge`` puts a darker, wider copy behind it."""

    paint: str
    outline: Outline
    edge: bool = False


def _grow(outline: Outline, width: float) -> Outline:
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
    for before, corner, after in zip(
        np.roll(points, 1, 0), points, np.roll(points, -1, 0), strict=True
    ):
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


def _eyes(
    x: float = 0.42, y: float = -0.1, white: str = "white", slit: bool = False
) -> list[Shape]:
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
    return [
        *_pair("fur", _ellipse(0.84, -0.36, 0.34, 0.34), edge=True),
        *_eyes(x=0.83, y=-0.37),
    ]


def _panda() -> list[Shape]:
    return [
        *_pair("ink", _ellipse(0.82, -0.62, 0.36, 0.36)),
        Shape("fur", _ellipse(0, 0, 1.06, 0.88), edge=True),
        *_pair("ink", _ellipse(0.46, -0.04, 0.32, 0.4, 28)),
        *_eyes(x=0.43, y=-0.08),
        Shape("ink", _ellipse(0, 0.4, 0.19, 0.13)),
    ]


def _fox() -> list[Shape]:
    head = (
        (-0.7, -0.8),
        (0.7, -0.8),
        (1.22, 0.18),
        (0.4, 0.7),
        (0, 0.97),
        (-0.4, 0.7),
        (-1.22, 0.18),
    )
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


_ANIMAL_SHAPES = {
    "cat": _cat(),
    "dog": _dog(),
    "rabbit": _rabbit(),
    "bear": _bear(),
    "pig": _pig(),
    "frog": _frog(),
    "panda": _panda(),
    "fox": _fox(),
}
_HAT_SHAPES = {
    "top hat": _top_hat(),
    "party hat": _party_hat(),
    "crown": _crown(),
    "beanie": _beanie(),
    "cap": _cap(),
    "wizard hat": _wizard_hat(),
}
_BEFORE_THE_HAT = {"frog": _frog_eyes()}

# ------------------------------------------------------------------------------------- pictures

OVERSAMPLING = 4
"""How many times larger than its picture a critter is drawn before it is averaged down."""


class _Drawing(NamedTuple):
    points: Outline  # all outlines one after another, (n, 2)
    shapes: list[tuple[int, int, str]]  # first row, row after the last, paint


@cache
def _drawing(animal: str, hat: str) -> _Drawing:
    shapes = [*_ANIMAL_SHAPES[animal], *_HAT_SHAPES[hat], *_BEFORE_THE_HAT.get(animal, [])]
    layers = []
    for paint, outline, edge in shapes:
        if edge:
            layers.append((f"{paint} edge", _grow(outline, _RIM)))
        layers.append((paint, outline))
    ends = np.cumsum([len(outline) for _, outline in layers]).tolist()
    paints = [paint for paint, _ in layers]
    return _Drawing(
        np.concatenate([outline for _, outline in layers]),
        list(zip([0, *ends[:-1]], ends, paints, strict=True)),
    )


def draw(critter: Critter, size: int = 64, rng: random.Random | None = None) -> Image.Image:
    """The critter's portrait.

    Args:
        critter: what to draw.
        size: height and width in pixels, at least 8; meant for 32 to 128.
        rng: jitters place (± 3.5 % of the frame across, ± 2.5 % down), size (± 6 %), tilt (± 9°).
            None draws the critter upright in the middle.

    Returns:
        An RGB picture of ``size`` by ``size`` pixels. Head and hat are wholly inside the frame.

    Raises:
        ValueError: ``size`` is below 8.
    """
    # Chance is drawn in units of the frame, so one rng gives one pose at every size.
    across, down, growth, tilt = (0.0 if rng is None else rng.uniform(-1, 1) for _ in range(4))
    image = backdrop(critter.background, size)
    canvas = image.width
    center = (0.5 + 0.035 * across) * canvas, (0.635 + 0.025 * down) * canvas
    paint(image, critter, posed(critter, center, 0.285 * canvas * (1 + 0.06 * growth), 9 * tilt))
    return image.reduce(OVERSAMPLING)


def backdrop(background: str, size: int) -> Image.Image:
    """An empty canvas for a picture of ``size`` pixels, :data:`OVERSAMPLING` times as large.

    Raises:
        ValueError: ``size`` is below 8.
    """
    check_size(size)
    canvas = size * OVERSAMPLING
    return Image.new("RGB", (canvas, canvas), _BACKGROUND_RGB[background])


def posed(
    critter: Critter, center: tuple[float, float], radius: float, tilt: float
) -> NDArray[np.float64]:
    """The corners of all the critter's outlines, (n, 2), as :func:`paint` takes them.

    Args:
        critter: who.
        center: where the middle of the head goes, from the left and from the top, in pixels.
        radius: of the head, in pixels.
        tilt: degrees, clockwise.
    """
    c, s = radius * cos(radians(tilt)), radius * sin(radians(tilt))
    left, top = center
    x, y = _drawing(critter.animal, critter.hat).points.T
    return np.stack([left + c * x - s * y, top + s * x + c * y], axis=1)


def paint(image: Image.Image, critter: Critter, points: NDArray[np.float64]) -> None:
    """Fill the critter's outlines, whose corners are ``points`` (n, 2), with its colours."""
    xy = points.ravel().tolist()
    paints = _palette(critter.fur, critter.hat_color)
    pen = ImageDraw.Draw(image)
    for start, end, color in _drawing(critter.animal, critter.hat).shapes:
        pen.polygon(xy[2 * start : 2 * end], paints[color])


# ------------------------------------------------------------------------------------- data set


class Rendering(NamedTuple):
    """A rendered data set: entry i of each belongs to image i."""

    images: Tensor  # (N, 3, S, S) uint8
    captions: list[str]  # of epoch 0
    critters: list[Critter]


class Critters(Drawn):
    """Captioned pictures of random critters; item i depends on ``split``, ``seed`` and i.

    ``data[i]`` is the picture, (3, size, size) float in [-1, 1], with its caption of epoch 0.
    ``data.critter(i)`` says what it shows, ``data.caption(i, epoch)`` words it anew in each epoch,
    and ``data.render()`` draws all pictures at once.

    Args:
        length: number of pictures.
        size: height and width in pixels.
        split: "train", "held_out" or "all", as in :func:`sample`.
        seed: another seed gives another data set.

    Raises:
        ValueError: a negative length, a size below 8 or an unknown split.
        IndexError: an item outside the data set.
    """

    def critter(self, index: int) -> Critter:
        """What picture ``index`` shows."""
        return sample(self.chance(index, "critter"), self.split)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A true caption of picture ``index``, worded anew in each epoch."""
        return caption(self.critter(index), self.chance(index, f"caption {epoch}"))

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` as a PIL image."""
        return draw(self.critter(index), self.size, self.chance(index, "picture"))

    def render(self, workers: int | None = None) -> Rendering:
        """Draw all pictures, with several processes where the system can fork (not on macOS).

        Args:
            workers: number of processes; None means one per usable core. The result does not depend
                on it.

        Returns:
            The pictures as bytes, (N, 3, size, size), with captions and critters. Indexing gives
            ``images / 127.5 - 1``.

        Raises:
            ValueError: ``workers`` is below 1.
            RuntimeError: a process died.
        """
        critters = [self.critter(index) for index in range(self.length)]
        return Rendering(self.images(workers), self.captions(), critters)
