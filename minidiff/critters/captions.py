"""Captions of critters: sentences that are exactly true, from a small grammar.

:func:`caption` chooses its words by chance and leaves some attributes out; what is left out is free.
:func:`prompt` says what it is told to say. Since what a caption says is exactly true, prompt accuracy
can be measured.
"""

import random
from collections.abc import Sequence

from minidiff.critters.scene import ANIMALS, ATTRIBUTES, HELD_OUT, Critter, Scene, Shown, exchange

OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "a portrait of ")
"""How a caption may begin; one that stands here twice is twice as likely."""
WEARS = ("in", "in", "wearing", "with")
"""What a caption may say between animal and hat."""
_FORWARD = {"left of": ("left of", "to the left of"), "above": ("above", "over")}
_BACKWARD = {"left of": ("right of", "to the right of"), "above": ("below", "under")}
_STANDING = [phrase for said in (_FORWARD, _BACKWARD) for two in said.values() for phrase in two]
TURNED = 0.2
"""Share of the captions that begin with the second critter, as "a rabbit right of a cat" does."""
_UNSAID = {"left of": (" and ", ", ", " next to ", " beside "), "above": (" and ", ", ")}


def prompt(shown: Shown, attributes: Sequence[str] | None = None) -> str:
    """The plain sentence that states the given attributes and no others.

    ``prompt(critter)`` may be "a cat in a top hat", ``prompt(critter, tuple(ATTRIBUTES))`` "an orange cat in
    a blue top hat on a green background", and ``prompt(scene)`` "a black cat in a red top hat left of a
    white rabbit in a blue crown on a green background".

    Args:
        shown: a critter, or a scene of two.
        attributes: names out of :data:`~minidiff.critters.scene.ATTRIBUTES`, for a scene also "relation";
            None for animal and hat of a critter, and for everything of a scene.

    Raises:
        ValueError: an attribute's name is unknown.
    """
    one = isinstance(shown, Critter)
    known = tuple(ATTRIBUTES) if one else (*ATTRIBUTES, "relation")
    attributes = (("animal", "hat") if one else known) if attributes is None else attributes
    for name in attributes:
        if name not in known:
            raise ValueError(f"attribute {name!r} is unknown: choose from {', '.join(known)}")
    if isinstance(shown, Critter):
        text = _portrait(shown, attributes)
    else:
        first, second = (_portrait(critter, attributes) for critter in shown.critters)
        text = f"{first} {shown.relation if 'relation' in attributes else 'and'} {second}"
    if "background" in attributes:
        text += f" on a {shown.background} background"
    return text


def caption(shown: Shown, rng: random.Random) -> str:
    """A random true description: lower-case words, spaces and commas.

    Of a critter, animal and hat are nearly always stated, of the other three attributes none to all. Two
    captions of a hundred say nothing but "a critter".

    Half of the captions of a scene describe both critters fully, and most of these say how they stand.
    Four of five begin where reading begins, with the critter on the left or above. Were it a half, the
    order of the words would say nothing to somebody who does not understand "left of" yet, and "left of"
    nothing to somebody who does not heed the order: a model would find it hard to begin.
    """
    return _of_one(shown, rng) if isinstance(shown, Critter) else _of_two(shown, rng)


def negative_caption(scene: Scene, what: str, rng: random.Random, true_caption: str) -> str:
    """What :func:`caption` says of the scene with one thing exchanged between its critters.

    Args:
        scene: what the picture shows.
        what: one of :data:`~minidiff.critters.scene.EXCHANGES`.
        rng: in the state in which it wrote ``true_caption``.
        true_caption: what is said of the scene itself.

    Returns:
        "" where nothing wrong comes of it, because the caption leaves out what was exchanged or who has
        it, or where it would name a pair of :data:`~minidiff.critters.scene.HELD_OUT`.
    """
    mixed = exchange(scene, what)
    if mixed is None or any((c.animal, c.hat) in HELD_OUT for c in mixed.critters):
        return ""
    wrong = caption(mixed, rng)
    said = set(true_caption.replace(",", "").split())
    stands = any(f" {phrase} " in true_caption for phrase in _STANDING)
    # Known by their animals, the critters can be told apart; that they changed places shows only
    # where the caption says how they stand.
    sure = len(said & set(ANIMALS)) == 2 and (what != "place" or stands)
    return wrong if sure and wrong != true_caption else ""


def vocabulary(count: int = 1) -> tuple[str, ...]:
    """Every word that captions and prompts of ``count`` critters, 1 or 2, can say, sorted."""
    grammar = "a an picture drawing portrait of in wearing with on critter animal hat background"
    values = " ".join(value for values in ATTRIBUTES.values() for value in values)
    said = f"{grammar} {values}"
    if count == 2:
        joints = [*_FORWARD.values(), *_BACKWARD.values(), *_UNSAID.values()]
        phrases = [phrase.replace(",", "") for choices in joints for phrase in choices]
        said = " ".join([said, "two critters animals", *phrases])
    return tuple(sorted(set(said.split())))


def _of_one(critter: Critter, rng: random.Random) -> str:
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


def _of_two(scene: Scene, rng: random.Random) -> str:
    noun = rng.choice(("critter", "animal"))
    if rng.random() < 0.02:
        return f"two {noun}s"
    full = rng.random() < 0.5
    texts = []
    for critter in scene.critters:
        said = [name for name in ("animal", "hat") if full or rng.random() < 0.94]
        said += rng.sample(("fur", "hat_color"), 2 if full else rng.randrange(3))
        texts.append(_portrait(critter, said, noun, rng.choice(WEARS)))
    relation = scene.relation
    said_relation, turned = rng.random() < (0.9 if full else 0.7), rng.random() < TURNED
    if said_relation:
        joint = f" {rng.choice((_BACKWARD if turned else _FORWARD)[relation])} "
    else:
        joint = rng.choice(_UNSAID[relation])
    text = joint.join(reversed(texts) if turned else texts)
    if rng.random() < (0.75 if full else 0.5):
        background = scene.background
        text += rng.choice((f" on a {background} background", f", {background} background"))
    return rng.choice(OPENINGS) + text


def _portrait(critter: Critter, said: Sequence[str], noun: str = "critter", wears: str = "in") -> str:
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


def _who(critter: Critter, said: Sequence[str], noun: str = "critter") -> str:
    noun = critter.animal if "animal" in said else noun
    return f"{critter.fur} {noun}" if "fur" in said else noun


def _hat(critter: Critter, said: Sequence[str]) -> str:
    noun = critter.hat if "hat" in said else "hat"
    return f"{critter.hat_color} {noun}" if "hat_color" in said else noun


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
