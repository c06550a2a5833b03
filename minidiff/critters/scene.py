"""What a picture of critters shows, in words: one animal in a hat, or two.

A :class:`Critter` is five words: an animal, its fur, a hat, the colour of the hat and the background. A
:class:`Scene` is two critters on one background, the first left of or above the second. Their animals,
hats and hat colours differ, so a picture that gives one the other's hat is wrong and can be told to be
wrong: that is the *binding* of attributes.

Some animal-hat pairs (:data:`HELD_OUT`, a cat in a top hat first of all) never occur in the training
split. A model that draws one has put together two things it only ever saw apart.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal, get_args

__all__ = [
    "ANIMALS", "ATTRIBUTES", "BACKGROUNDS", "EXCHANGES", "FURS", "HATS", "HAT_COLORS", "HELD_OUT", "OWN_FUR",
    "PAIR_ATTRIBUTES", "Critter", "Scene", "exchange", "furs", "labels", "sample_critter", "sample_scene",
    "words",
]  # fmt: skip

Split = Literal["train", "held_out", "all"]

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
"""What a critter is, with all values; a value's number in the tuple is its label (:func:`labels`)."""
OWN = tuple(name for name in ATTRIBUTES if name != "background")
"""The attributes that each critter has for itself."""
RELATIONS = ("left of", "above")
"""Where the first critter is, seen from the second."""
POSITIONS = ("first", "second")
"""Left and right, or above and below."""
NOBODY = "nobody"
"""What a reader says of a position where it sees no animal."""
EXCHANGES = ("place", "fur", "hat", "hat_color")
"""What two critters can exchange and stay critters; see :func:`exchange`."""
PAIR_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "relation": RELATIONS,
    "background": BACKGROUNDS,
    **{
        f"{position}_{name}": (*ANIMALS, NOBODY) if name == "animal" else ATTRIBUTES[name]
        for position in POSITIONS
        for name in OWN
    },
}
"""What a scene of two is, in the same way."""

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


@dataclass(frozen=True)
class Scene:
    """Two critters and where the first is, seen from the second.

    Raises:
        ValueError: the relation is not one of :data:`RELATIONS`, the backgrounds differ, or the
            critters share an animal, a hat or the colour of a hat.
    """

    first: Critter
    second: Critter
    relation: str

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise ValueError(f"relation {self.relation!r} is unknown: choose from {', '.join(RELATIONS)}")
        if self.first.background != self.second.background:
            raise ValueError(
                f"backgrounds {self.first.background!r} and {self.second.background!r} differ: "
                "a scene has one"
            )
        for name in ("animal", "hat", "hat_color"):
            if (value := getattr(self.first, name)) == getattr(self.second, name):
                raise ValueError(f"both critters have the {name} {value!r}: they must differ")

    @property
    def critters(self) -> tuple[Critter, Critter]:
        """The first and the second."""
        return self.first, self.second

    @property
    def background(self) -> str:
        """The background of both."""
        return self.first.background


Shown = Critter | Scene
"""What one picture shows."""


def furs(animal: str) -> tuple[str, ...]:
    """The furs that ``animal`` comes in."""
    return (OWN_FUR[animal],) if animal in OWN_FUR else FURS


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is "train", "held_out" or "all"."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose from {', '.join(get_args(Split))}")


def sample_critter(rng: random.Random, split: Split = "train") -> Critter:
    """A random critter: the pair of animal and hat uniform over the split, the rest uniform too.

    Args:
        rng: where the chance comes from.
        split: "train" never gives a pair of :data:`HELD_OUT`, "held_out" only those, "all" any.

    Raises:
        ValueError: ``split`` is none of the three.
    """
    check_split(split)
    animal, hat = rng.choice(_PAIRS[split])
    return Critter(animal, rng.choice(furs(animal)), hat, rng.choice(HAT_COLORS), rng.choice(BACKGROUNDS))


def sample_scene(rng: random.Random, split: Split = "train") -> Scene:
    """A random scene of two.

    Args:
        rng: where the chance comes from.
        split: "train" never gives a critter a pair of :data:`HELD_OUT`, "held_out" gives one to at least
            one of the two, at a random position; "all" gives any.

    Raises:
        ValueError: ``split`` is none of the three.
    """
    one = sample_critter(rng, split)
    while True:
        other = sample_critter(rng, "train" if split == "train" else "all")
        if all(getattr(one, name) != getattr(other, name) for name in ("animal", "hat")):
            break
    colors = [color for color in HAT_COLORS if color != one.hat_color]
    other = replace(other, hat_color=rng.choice(colors), background=one.background)
    pair = [one, other]
    rng.shuffle(pair)
    return Scene(pair[0], pair[1], rng.choice(RELATIONS))


def exchange(scene: Scene, what: str) -> Scene | None:
    """The scene with one thing exchanged between its critters.

    Args:
        scene: what is changed.
        what: "place", "fur", "hat" or "hat_color".

    Returns:
        None where that changes nothing or gives an animal a fur that it does not come in.

    Raises:
        ValueError: ``what`` is none of the four.
    """
    if what not in EXCHANGES:
        raise ValueError(f"cannot exchange {what!r}: choose from {', '.join(EXCHANGES)}")
    first, second = scene.critters
    if what == "place":
        return Scene(second, first, scene.relation)
    theirs, ours = getattr(first, what), getattr(second, what)
    fits = what != "fur" or (ours in furs(first.animal) and theirs in furs(second.animal))
    if ours == theirs or not fits:
        return None
    one, other = replace(first, **{what: ours}), replace(second, **{what: theirs})
    return Scene(one, other, scene.relation)


def words(shown: Shown) -> dict[str, str]:
    """The value of each of :data:`ATTRIBUTES`, or of :data:`PAIR_ATTRIBUTES` for a scene of two."""
    if isinstance(shown, Critter):
        return {name: getattr(shown, name) for name in ATTRIBUTES}
    own = {
        f"{position}_{name}": getattr(critter, name)
        for position, critter in zip(POSITIONS, shown.critters, strict=True)
        for name in OWN
    }
    return {"relation": shown.relation, "background": shown.background, **own}


def labels(shown: Shown) -> dict[str, int]:
    """Each attribute's class number, for a classifier with one head per attribute.

    Every label can be told from the picture alone.
    """
    attributes = ATTRIBUTES if isinstance(shown, Critter) else PAIR_ATTRIBUTES
    return {name: attributes[name].index(value) for name, value in words(shown).items()}
