"""Two critters in one picture: captions are true of both, and the picture keeps them apart."""

import random
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scenes import CAT, RABBIT, SCENE, array, stated, true
from test_critters import ANIMALS, HATS, HELD_OUT

from minidiff import critters
from minidiff.critters import Critter, Critters, Scene
from minidiff.critters.scene import NOBODY, POSITIONS, RELATIONS
from minidiff.data import Batches
from minidiff.recipes import Options, clip_batches, get_recipe

DRAWS = 20_000


@pytest.fixture(scope="module")
def train() -> list[tuple[Scene, str]]:
    rng = random.Random(0)
    drawn = [critters.sample_scene(rng) for _ in range(DRAWS)]
    return [(scene, critters.caption(scene, rng)) for scene in drawn]


# ------------------------------------------------------------------------------- what is drawn


def pairs(scene: Scene) -> list[tuple[str, str]]:
    return [(critter.animal, critter.hat) for critter in scene.critters]


def test_training_shows_every_pair_in_every_place_but_the_held_out_ones(train):
    for place in (0, 1):
        seen = {pairs(scene)[place] for scene, _ in train}
        assert seen == set(product(ANIMALS, HATS)) - set(HELD_OUT)


def test_captions_never_state_a_held_out_pair(train):
    said = [one for _, text in train for one in stated(text)[0]]
    both = [(one["animal"], one["hat"]) for one in said if {"animal", "hat"} <= one.keys()]
    assert len(both) > 0.9 * 2 * DRAWS
    assert not set(both) & set(HELD_OUT)


def test_the_recipe_never_shows_a_held_out_pair():
    """Captions and scenes of the training stream itself, as the recipe feeds it."""
    recipe = get_recipe("critters-duo", images=256, size=32)
    source = recipe.source
    data = Critters(256, 32, count=2)
    assert torch.equal(source.images, data.images())
    assert not {pair for i in range(256) for pair in pairs(data.scene(i))} & set(HELD_OUT)
    stream = iter(Batches(source.images, source.caption, 64))
    for _ in range(6):
        for text in next(stream)[1]:
            for said in stated(text)[0]:
                assert (said.get("animal"), said.get("hat")) not in HELD_OUT, text


def test_held_out_scenes_show_one_in_either_place():
    data = Critters(1000, split="held_out", count=2)
    places = [tuple(pair in HELD_OUT for pair in pairs(data.scene(i))) for i in range(1000)]
    assert (False, False) not in places
    assert min(places.count((True, False)), places.count((False, True))) > 300
    every = {pair for i in range(1000) for pair in pairs(Critters(1000, split="all", count=2).scene(i))}
    assert every == set(product(ANIMALS, HATS))


def test_every_value_stays_common_and_the_two_can_be_told_apart(train):
    counts = {name: dict.fromkeys(values, 0) for name, values in critters.PAIR_ATTRIBUTES.items()}
    for scene, _ in train:
        for name, value in critters.words(scene).items():
            counts[name][value] += 1
        for name in ("animal", "hat", "hat_color"):
            assert getattr(scene.first, name) != getattr(scene.second, name)
    for place in POSITIONS:
        assert counts[f"{place}_animal"].pop(NOBODY) == 0
    for name, count in counts.items():
        assert min(count.values()) > 0.08 * DRAWS, (name, count)


def test_labels_point_back_at_the_words(train):
    for scene, _ in train[:500]:
        found = {
            name: critters.PAIR_ATTRIBUTES[name][label] for name, label in critters.labels(scene).items()
        }
        assert found == critters.words(scene)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: Scene(CAT, RABBIT, "right of"), "relation 'right of' is unknown: choose from left"),
        (lambda: Scene(CAT, replace(RABBIT, background="pink"), "above"), "'green' and 'pink' differ"),
        (lambda: Scene(CAT, replace(RABBIT, animal="cat"), "above"), "both .* have the animal 'cat'"),
        (lambda: Scene(CAT, replace(RABBIT, hat="top hat"), "above"), "have the hat 'top hat'"),
        (lambda: Scene(CAT, replace(RABBIT, hat_color="red"), "above"), "have the hat_color 'red'"),
        (lambda: critters.sample_scene(random.Random(0), "test"), "split 'test' is unknown"),
        (lambda: critters.prompt(SCENE, ["colour"]), "attribute 'colour' is unknown"),
        (lambda: critters.draw(SCENE, 4), "size 4 is too small"),
        (lambda: critters.draw(SCENE, without="third"), "without 'third' is unknown"),
        (lambda: Critters(split="test", count=2), "split 'test' is unknown"),
        (lambda: Critters(length=-1, count=2), "length -1 is negative"),
        (lambda: Critters(size=4, count=2), "size 4 is too small"),
        (lambda: Critters(4, count=2).render(workers=0), "workers 0 is too few"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


# ------------------------------------------------------------------------------------ captions


def test_captions_are_true(train):
    for scene, text in train:
        assert true(text, scene), (text, scene)


def test_the_parser_would_notice():
    text = critters.prompt(SCENE)
    assert true(text, SCENE)
    for wrong in (
        text.replace("left", "right"), text.replace("left of", "below"), text.replace("red", "blue"),
        text.replace("left of", "over"), text.replace("green", "pink"), text.replace("cat", "dog"),
    ):  # fmt: skip
        assert not true(wrong, SCENE), wrong


def test_negative_captions_are_wrong_in_one_thing_and_never_name_a_held_out_pair():
    data, counted = Critters(4000, count=2), 0
    for i in range(4000):
        scene, right, wrong = data.scene(i), data.caption(i, 1), data.negative_caption(i, 1)
        assert true(right, scene)
        if wrong:
            counted += 1
            assert not true(wrong, scene), f"{wrong!r} is true of {scene}"
            for said in stated(wrong)[0]:
                assert (said.get("animal"), said.get("hat")) not in HELD_OUT, wrong
    assert counted > 0.5 * 4000


def test_the_clip_of_two_critters_is_shown_negative_captions():
    data, batches = Critters(128, 32, count=2), clip_batches(Options(32, 128), 2, seed=4)
    x, captions = next(iter(batches))
    (right_x, right), (_, wrong) = (
        next(iter(Batches(data.images(), said, 128, seed=4)))
        for said in (data.caption, data.negative_caption)
    )
    assert torch.equal(x, right_x)
    assert captions == right + [text for text in wrong if text]
    assert len(captions) > 128 + 40
    assert next(iter(batches))[1] == captions  # they can be gone through again


def test_one_thing_is_exchanged():
    cat, bear = replace(CAT, hat="crown"), Critter("bear", "white", "top hat", "blue", "green")
    frog = Critter("frog", "green", "cap", "blue", "green")
    assert critters.exchange(Scene(cat, bear, "above"), "place") == Scene(bear, cat, "above")
    for what in ("fur", "hat", "hat_color"):
        one = replace(cat, **{what: getattr(bear, what)})
        other = replace(bear, **{what: getattr(cat, what)})
        assert critters.exchange(Scene(cat, bear, "left of"), what) == Scene(one, other, "left of")
    assert critters.exchange(Scene(cat, frog, "left of"), "fur") is None  # no cat is green
    alike = Scene(cat, replace(bear, fur="black"), "left of")
    assert critters.exchange(alike, "fur") is None
    with pytest.raises(ValueError, match="cannot exchange 'animal': choose from place, fur, hat"):
        critters.exchange(alike, "animal")


def test_captions_are_mostly_full_and_sometimes_leave_things_out(train):
    parsed = [stated(text) for _, text in train]
    full = [all(len(one) == 4 for one in said) for said, _, _ in parsed]
    told = [relation in RELATIONS for _, relation, _ in parsed]
    everything = [a and b and c[2] is not None for a, b, c in zip(full, told, parsed, strict=True)]
    assert 0.5 < np.mean(full) < 0.65
    assert 0.7 < np.mean(told) < 0.85
    assert 0.3 < np.mean(everything) < 0.45
    assert 0.01 < np.mean([not any(said) for said, _, _ in parsed]) < 0.04
    # Four of five begin with the first critter, whether or not they say how the two stand.
    for says in (True, False):
        named = [
            (scene, [word for word in re.findall(r"\w+", text) if word in ANIMALS])
            for (scene, text), tells in zip(train, told, strict=True)
            if tells is says
        ]
        begins = [animals[0] == scene.first.animal for scene, animals in named if len(animals) == 2]
        assert 0.77 < np.mean(begins) < 0.83


def test_captions_are_plain_words_of_the_vocabulary(train):
    said = set()
    for _, text in train:
        assert re.fullmatch("[a-z]+(,? [a-z]+)*", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        said |= set(text.replace(",", "").split())
        assert len(text.replace(",", " ,").split()) < 32, text  # with the end sign: what is kept
    assert said == set(critters.vocabulary(2))


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (None, "a black cat in a red top hat left of a white rabbit in a blue crown on a green background"),
        (("animal", "hat", "relation"), "a cat in a top hat left of a rabbit in a crown"),
        (("animal", "fur"), "a black cat and a white rabbit"),
        ((), "a critter and a critter"),
    ],
)
def test_prompts(attributes, text):
    assert critters.prompt(SCENE, attributes) == text
    assert true(text, SCENE)


def test_captions_vary_between_epochs_and_stay_true():
    data = Critters(200, count=2)
    first, second = data.captions(0), data.captions(1)
    assert first == data.captions(0)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 180
    assert all(true(text, data.scene(i)) for i, text in enumerate(second))


# ------------------------------------------------------------------------------------ pictures


class Extreme(random.Random):
    """Jitter at its limits."""

    def uniform(self, a: float, b: float) -> float:
        return self.choice((a, b))


def tallest_and_widest() -> list[Scene]:
    fox, dog = (
        Critter("fox", "gray", "party hat", "red", "blue"),
        Critter("dog", "gray", "wizard hat", "green", "blue"),
    )
    return [Scene(*pair, r) for pair in ((fox, dog), (dog, fox)) for r in RELATIONS] * 40


def test_critters_stay_in_the_frame_and_apart():
    rng = random.Random(0)
    for number, scene in enumerate(
        [*tallest_and_widest(), *(critters.sample_scene(rng, "all") for _ in range(300))]
    ):
        whole, first, second = (
            array(critters.draw(scene, 64, Extreme(number), without=missing))
            for missing in (None, "second", "first")
        )
        nothing = whole[0, 0]  # a corner is always free
        masks = [(picture != nothing).any(axis=2) for picture in (first, second)]
        assert not (masks[0] & masks[1]).any(), scene
        assert ((whole != nothing).any(axis=2) == masks[0] | masks[1]).all(), scene
        for mask in masks:
            edges = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
            assert mask.mean() > 0.08, scene
            assert not edges.any(), (scene, number)
        axis = 0 if scene.relation == "left of" else 1  # what is left after summing over the other
        ends = [np.flatnonzero(mask.any(axis=axis)) for mask in masks]
        assert ends[0].max() < ends[1].min(), scene


def test_pictures_differ_in_pose_and_not_in_size():
    small = array(critters.draw(SCENE, 32, random.Random(5)))
    large = array(critters.draw(SCENE, 128, random.Random(5)))
    shrunk = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 3
    assert np.abs(shrunk - array(critters.draw(SCENE, 32, random.Random(6)))).mean() > 6


# ------------------------------------------------------------------------------------ data set


def test_items_depend_on_seed_and_index_alone():
    data, again, longer, other = (
        Critters(50, count=2),
        Critters(50, count=2),
        Critters(500, count=2),
        Critters(50, seed=1, count=2),
    )
    image, text = data[7]
    assert image.shape == (3, 64, 64)
    assert -1 <= image.min() < -0.5
    assert 0.5 < image.max() <= 1
    for same in (again, longer):
        assert torch.equal(same[7][0], image)
        assert same[7][1] == text
    assert not torch.equal(other[7][0], image)
    assert [other.scene(i) for i in range(50)] != [data.scene(i) for i in range(50)]
    with pytest.raises(IndexError, match="item 50 is outside"):
        data[50]


def test_rendering_agrees_with_items_for_any_number_of_workers():
    data = Critters(13, size=32, count=2)
    one, three = data.render(workers=1), data.render(workers=3)
    assert one.images.dtype == torch.uint8
    assert torch.equal(one.images, three.images)
    assert one.captions == three.captions == data.captions()
    assert one.scenes == [data.scene(i) for i in range(13)]
    for i in range(13):
        assert torch.equal(one.images[i].float() / 127.5 - 1, data[i][0])
