"""Duo: two critters in one picture, to see whether a model keeps apart what belongs to whom.

A scene (:class:`Scene`) is two critters on one background, the first left of or above the second.
Their animals, hats and hat colours differ, so a picture that gives one the other's hat is wrong and
can be told to be wrong: that is the *binding* of attributes. Critters come from
:mod:`minidiff.data.critters`, half as large; captions are as true as there, and what they leave out
is free. In the training split neither critter wears a pair of
:data:`~minidiff.data.critters.HELD_OUT`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from minidiff.data import critters
from minidiff.data.critters import ANIMALS, BACKGROUNDS, HELD_OUT, Critter, furs
from minidiff.data.drawn import Drawn, Split, check_split

# ------------------------------------------------------------------------------- what there is

RELATIONS = ("left of", "above")
"""Where the first critter is, seen from the second."""
PLACES = ("first", "second")
"""Left and right, or above and below."""
NOBODY = "nobody"
"""What a reader says of a place where it sees no animal."""
OWN = tuple(name for name in critters.ATTRIBUTES if name != "background")
"""The attributes that each critter has for itself."""
EVERYTHING = (*critters.ATTRIBUTES, "relation")
"""What a sentence can state of a scene."""
EXCHANGES = ("place", "fur", "hat", "hat_color")
"""What two critters can exchange and stay critters; see :func:`exchange`."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "relation": RELATIONS,
    "background": BACKGROUNDS,
    **{
        f"{place}_{name}": (*ANIMALS, NOBODY) if name == "animal" else critters.ATTRIBUTES[name]
        for place in PLACES
        for name in OWN
    },
}
"""Everything a picture says, with its values; a value's place in the tuple is its label."""


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
            raise ValueError(
                f"relation {self.relation!r} is unknown: choose from {', '.join(RELATIONS)}"
            )
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


def sample(rng: random.Random, split: Split = "train") -> Scene:
    """A random scene.

    Args:
        rng: where the chance comes from.
        split: "train" never gives a critter a pair of :data:`~minidiff.data.critters.HELD_OUT`,
            "held_out" gives one to at least one of the two, at a random place; "all" gives any.

    Raises:
        ValueError: ``split`` is none of the three.
    """
    check_split(split)
    one = critters.sample(rng, split)
    while True:
        other = critters.sample(rng, "train" if split == "train" else "all")
        if all(getattr(one, name) != getattr(other, name) for name in ("animal", "hat")):
            break
    colors = [color for color in critters.HAT_COLORS if color != one.hat_color]
    other = Critter(other.animal, other.fur, other.hat, rng.choice(colors), one.background)
    pair = [one, other]
    rng.shuffle(pair)
    first, second = pair
    return Scene(first, second, rng.choice(RELATIONS))


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


def words(scene: Scene) -> dict[str, str]:
    """The scene's value of each of :data:`ATTRIBUTES`."""
    own = {
        f"{place}_{name}": getattr(critter, name)
        for place, critter in zip(PLACES, scene.critters, strict=True)
        for name in OWN
    }
    return {"relation": scene.relation, "background": scene.first.background, **own}


def labels(scene: Scene) -> dict[str, int]:
    """Each attribute's class number, for a classifier with one head per attribute."""
    said = words(scene)
    return {name: values.index(said[name]) for name, values in ATTRIBUTES.items()}


# ------------------------------------------------------------------------------------ captions

_FORWARD = {"left of": ("left of", "to the left of"), "above": ("above", "over")}
_BACKWARD = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
_STANDING = [phrase for said in (_FORWARD, _BACKWARD) for two in said.values() for phrase in two]
TURNED = 0.2
"""Share of the captions that begin with the second critter, as "a rabbit right of a cat" does."""
_UNSAID = {"left of": (" and ", ", ", " next to ", " beside "), "above": (" and ", ", ")}


def prompt(scene: Scene, attributes: Sequence[str] = EVERYTHING) -> str:
    """The plain sentence that states the given attributes, of both critters, and no others.

    ``prompt(scene)`` may be "a black cat in a red top hat left of a white rabbit in a blue crown on a
    green background".

    Raises:
        ValueError: an attribute's name is not one of :data:`EVERYTHING`.
    """
    for name in attributes:
        if name not in EVERYTHING:
            raise ValueError(f"attribute {name!r} is unknown: choose from {', '.join(EVERYTHING)}")
    first, second = (critters.portrait(critter, attributes) for critter in scene.critters)
    text = f"{first} {scene.relation if 'relation' in attributes else 'and'} {second}"
    if "background" in attributes:
        text += f" on a {scene.first.background} background"
    return text


def caption(scene: Scene, rng: random.Random) -> str:
    """A random true description: lower-case words, spaces and commas.

    Half of the captions describe both critters fully, and most of these say how they stand. The
    others leave things out as :func:`critters.caption <minidiff.data.critters.caption>` does. Two
    captions of a hundred say nothing but "two critters".

    Four of five captions begin where reading begins, with the critter on the left or above. Were it a
    half, the order of the words would say nothing to somebody who does not understand "left of" yet, and
    "left of" nothing to somebody who does not heed the order: a model would find it hard to begin.
    """
    noun = rng.choice(("critter", "animal"))
    if rng.random() < 0.02:
        return f"two {noun}s"
    full = rng.random() < 0.5
    texts = []
    for critter in scene.critters:
        said = [name for name in ("animal", "hat") if full or rng.random() < 0.94]
        said += rng.sample(("fur", "hat_color"), 2 if full else rng.randrange(3))
        texts.append(critters.portrait(critter, said, noun, rng.choice(critters.WEARS)))
    relation = scene.relation
    said_relation, turned = rng.random() < (0.9 if full else 0.7), rng.random() < TURNED
    if said_relation:
        joint = f" {rng.choice((_BACKWARD if turned else _FORWARD)[relation])} "
    else:
        joint = rng.choice(_UNSAID[relation])
    text = joint.join(reversed(texts) if turned else texts)
    if rng.random() < (0.75 if full else 0.5):
        background = scene.first.background
        text += rng.choice((f" on a {background} background", f", {background} background"))
    return rng.choice(critters.OPENINGS) + text


def vocabulary() -> tuple[str, ...]:
    """Every word that :func:`caption` and :func:`prompt` can say, sorted; all critters' words too."""
    joints = [*_FORWARD.values(), *_BACKWARD.values(), *_UNSAID.values()]
    said = " ".join(joint for choices in joints for joint in choices).replace(",", "")
    return tuple(sorted({*critters.vocabulary(), *said.split(), "two", "critters", "animals"}))


# ------------------------------------------------------------------------------------ pictures


def draw(
    scene: Scene,
    size: int = 64,
    rng: random.Random | None = None,
    *,
    without: Literal["first", "second"] | None = None,
) -> Image.Image:
    """The scene, each critter a little more than half as large as in a portrait.

    Args:
        scene: what to draw.
        size: height and width in pixels, at least 8; meant for 64 and more.
        rng: jitters each critter's place, size (± 6 %) and tilt (± 9°). None draws both upright, as
            far from each other as from the frame.
        without: leave this critter out, for a reader that shall see when one is missing.

    Returns:
        An RGB picture of ``size`` by ``size`` pixels. The critters are wholly inside the frame and
        do not overlap: of 64 pixels, at least one is free between them and to every side.

    Raises:
        ValueError: ``size`` is below 8, or ``without`` is no place.
    """
    if without is not None and without not in PLACES:
        raise ValueError(f"without {without!r} is unknown: choose from {', '.join(PLACES)}")

    def jitter() -> float:
        return 0.0 if rng is None else rng.uniform(-1, 1)

    image = critters.backdrop(scene.first.background, size)
    canvas = image.width
    figures = [
        critters.posed(critter, (0, 0), 0.155 * canvas * (1 + 0.06 * jitter()), 9 * jitter())
        for critter in scene.critters
    ]
    along = RELATIONS.index(scene.relation)  # 0: they share the width, 1: the height
    margin = canvas / 64
    extents = [np.ptp(points[:, along]) for points in figures]
    room = canvas - sum(extents) - 3 * margin
    # A third of the room before, between and after them, less or more by half of that.
    start, end = (room * (1 / 3 + jitter() / 6) + margin for _ in figures)
    low = (start, canvas - end - extents[1])
    for place, critter, points, begin in zip(PLACES, scene.critters, figures, low, strict=True):
        shift = np.zeros(2)
        shift[along] = begin - points[:, along].min()
        other = points[:, 1 - along]
        middle = canvas * (0.5 + 0.05 * jitter())
        shift[1 - along] = middle - (other.min() + other.max()) / 2
        if place != without:
            critters.paint(image, critter, points + shift)
    return image.reduce(critters.OVERSAMPLING)


# ------------------------------------------------------------------------------------- data set


class Rendering(NamedTuple):
    """A rendered data set: entry i of each belongs to image i."""

    images: Tensor  # (N, 3, S, S) uint8
    captions: list[str]  # of epoch 0
    scenes: list[Scene]


class Duo(Drawn):
    """Captioned pictures of two critters; item i depends on ``split``, ``seed`` and i.

    ``data[i]`` is the picture, (3, size, size) float in [-1, 1], with its caption of epoch 0.
    ``data.scene(i)`` says what it shows, ``data.caption(i, epoch)`` words it anew in each epoch,
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

    def scene(self, index: int) -> Scene:
        """What picture ``index`` shows."""
        return sample(self.chance(index, "scene"), self.split)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A true caption of picture ``index``, worded anew in each epoch."""
        return caption(self.scene(index), self.chance(index, f"caption {epoch}"))

    def wrong_caption(self, index: int, epoch: int = 0) -> str:
        """What ``caption(index, epoch)`` says of the scene with one thing, by chance, exchanged between its
        critters (:func:`exchange`).

        Returns:
            "" where nothing wrong comes of it, because the caption leaves out what was exchanged or who
            has it, or where it would name a pair of :data:`~minidiff.data.critters.HELD_OUT`. In scenes
            of the split "held_out" that is nearly always so.
        """
        scene = self.scene(index)
        what = self.chance(index, f"mix-up {epoch}").choice(EXCHANGES)
        mixed = exchange(scene, what)
        if mixed is None or any((c.animal, c.hat) in HELD_OUT for c in mixed.critters):
            return ""
        right = self.caption(index, epoch)
        wrong = caption(mixed, self.chance(index, f"caption {epoch}"))
        said = set(right.replace(",", "").split())
        stands = any(f" {phrase} " in right for phrase in _STANDING)
        # Known by their animals, the critters can be told apart; that they changed places shows only
        # where the caption says how they stand.
        sure = len(said & set(ANIMALS)) == 2 and (what != "place" or stands)
        return wrong if sure and wrong != right else ""

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` as a PIL image."""
        return draw(self.scene(index), self.size, self.chance(index, "picture"))

    def render(self, workers: int | None = None) -> Rendering:
        """Draw all pictures, as :meth:`~minidiff.data.drawn.Drawn.images` does.

        Args:
            workers: number of processes; None means one per usable core.

        Returns:
            The pictures as bytes, (N, 3, size, size), with captions and scenes.

        Raises:
            ValueError: ``workers`` is below 1.
            RuntimeError: a process died.
        """
        scenes = [self.scene(index) for index in range(self.length)]
        return Rendering(self.images(workers), self.captions(), scenes)
