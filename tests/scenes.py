"""Scenes of two critters, and a reader of their captions, for the tests of the wing."""

import re

import numpy as np
from test_critters import HAT, WHO, any_of

from minidiff.critters import BACKGROUNDS, Critter, Scene
from minidiff.critters.scene import RELATIONS

CAT = Critter("cat", "black", "top hat", "red", "green")
RABBIT = Critter("rabbit", "white", "crown", "blue", "green")
SCENE = Scene(CAT, RABBIT, "left of")

JOINT = re.compile(
    " (?:to the )?(left|right) of (?=an? )| (above|over|below|under) | (next to|beside) | and |, "
)
# How the one that is mentioned first stands to the other.
RELATION = {
    "left": ("left of", False), "right": ("left of", True), "above": ("above", False),
    "over": ("above", False), "below": ("above", True), "under": ("above", True),
}  # fmt: skip


def portrait(text: str) -> dict[str, str]:
    """What a caption says of one critter."""
    who, *hat = re.split(" in | wearing | with ", text.replace("black-and-white", "black and white"))
    match = WHO.match(re.sub("^an? ", "", who))
    assert match, f"{who!r} in {text!r} is not understood"
    said = {"fur": match[1], "animal": match[2]}
    if hat:
        (words,) = hat
        match = HAT.match(re.sub("^an? ", "", words))
        assert match, f"{words!r} in {text!r} is not understood"
        said |= {"hat_color": match[1], "hat": match[2]}
    return {k: v for k, v in said.items() if v not in (None, "critter", "animal", "hat")}


def stated(text: str) -> tuple[list[dict[str, str]], str | None, str | None]:
    """What is said of the critters in order, how they stand and on what, by other rules than the writer's.

    If it is not said which is which, what is said of the place ("next to") begins with a "?".
    """
    text = re.sub("^a (picture|drawing|portrait) of ", "", text)
    background = None
    if match := re.search(f"(?: on a|,) {any_of(BACKGROUNDS)} background$", text):
        text, background = text[: match.start()], match[1]
    if text in ("two critters", "two animals"):
        return [{}, {}], None, background
    joints = list(JOINT.finditer(text := text.replace("black and white", "black-and-white")))
    assert len(joints) == 1, text
    (joint,) = joints
    said = [portrait(text[: joint.start()]), portrait(text[joint.end() :])]
    if word := joint[1] or joint[2]:
        relation, backward = RELATION[word]
        return said[::-1] if backward else said, relation, background
    return said, "?left of" if joint[3] else None, background


def agrees(critter: Critter, said: dict[str, str]) -> bool:
    return all(getattr(critter, name) == value for name, value in said.items())


def true(text: str, scene: Scene) -> bool:
    said, relation, background = stated(text)
    orders = [said] if relation in RELATIONS else [said, said[::-1]]
    return (
        relation in (None, scene.relation, f"?{scene.relation}")
        and background in (None, scene.first.background)
        and any(all(map(agrees, scene.critters, order)) for order in orders)
    )


def array(image) -> np.ndarray:
    return np.array(image).astype(int)
