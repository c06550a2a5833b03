"""Critters: what is drawn is what is said, and held-out pairs stay out."""

import hashlib
import random
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from minidiff import critters
from minidiff.critters import (
    ANIMALS,
    ATTRIBUTES,
    BACKGROUNDS,
    FURS,
    HAT_COLORS,
    HATS,
    HELD_OUT,
    OWN_FUR,
    Critter,
    Critters,
)

DRAWS = 20_000


def any_of(words) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


WHO = re.compile(f"(?:{any_of(ATTRIBUTES['fur'])} )?{any_of((*ANIMALS, 'critter', 'animal'))}$")
HAT = re.compile(f"(?:{any_of(HAT_COLORS)} )?{any_of((*HATS, 'hat'))}$")
BACKGROUND = re.compile(f"{any_of(BACKGROUNDS)} background$")


def stated(text: str) -> dict[str, str]:
    """What a caption says, read by other rules than those that wrote it.

    Cut at the joining words; each piece must then be a whole noun phrase, or the test fails.
    """
    text = re.sub("^a (picture|drawing|portrait) of ", "", text)
    said: dict[str, str] = {}
    for piece in re.split(" in | wearing | with | on |, ", text):
        phrase = re.sub("^an? ", "", piece)
        if match := WHO.match(phrase):
            found = {"fur": match[1], "animal": match[2]}
        elif match := HAT.match(phrase):
            found = {"hat_color": match[1], "hat": match[2]}
        else:
            match = BACKGROUND.match(phrase)
            assert match, f"{piece!r} in {text!r} is not understood"
            found = {"background": match[1]}
        found = {k: v for k, v in found.items() if v not in (None, "critter", "animal", "hat")}
        assert not said.keys() & found.keys(), f"{text!r} states something twice"
        said |= found
    return said


@pytest.fixture(scope="module")
def train() -> list[tuple[Critter, str]]:
    rng = random.Random(0)
    drawn = [critters.sample_critter(rng) for _ in range(DRAWS)]
    return [(critter, critters.caption(critter, rng)) for critter in drawn]


def array(critter: Critter, size: int = 64, seed: int | None = 0) -> np.ndarray:
    rng = None if seed is None else random.Random(seed)
    return np.array(critters.draw(critter, size, rng))


# ------------------------------------------------------------------------------- what is drawn


def test_training_shows_every_pair_but_the_held_out_ones(train):
    pairs = {(critter.animal, critter.hat) for critter, _ in train}
    assert pairs == set(product(ANIMALS, HATS)) - set(HELD_OUT)
    assert HELD_OUT[0] == ("cat", "top hat")


def test_captions_that_state_both_never_state_a_held_out_pair(train):
    said = [stated(text) for _, text in train]
    pairs = [(s["animal"], s["hat"]) for s in said if "animal" in s and "hat" in s]
    assert len(pairs) > 0.8 * DRAWS
    assert not set(pairs) & set(HELD_OUT)


def test_the_data_set_streams_its_split():
    pairs = {
        split: {(c.animal, c.hat) for c in map(data.scene, range(3000))}
        for split in ("train", "held_out", "all")
        for data in [Critters(3000, split=split)]
    }
    assert not pairs["train"] & set(HELD_OUT)
    assert pairs["held_out"] == set(HELD_OUT)
    assert pairs["all"] == set(product(ANIMALS, HATS))


def test_every_value_occurs_and_stays_common(train):
    for name, values in ATTRIBUTES.items():
        counts = dict.fromkeys(values, 0)
        for critter, _ in train:
            counts[getattr(critter, name)] += 1
        assert min(counts.values()) > 0.09 * DRAWS, (name, counts)


def test_each_held_out_hat_and_animal_has_many_other_partners():
    for position, values in enumerate((ANIMALS, HATS)):
        missing = [pair[position] for pair in HELD_OUT]
        assert all(missing.count(value) <= 1 for value in values)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (("cow", "gray", "cap", "red", "pink"), "animal 'cow' is unknown"),
        (("cat", "gray", "fez", "red", "pink"), "hat 'fez' is unknown"),
        (("cat", "green", "cap", "red", "pink"), "a cat has no 'green' fur"),
        (("pig", "gray", "cap", "red", "pink"), "a pig has no 'gray' fur: choose pink"),
    ],
)
def test_impossible_critters_are_refused(words, complaint):
    with pytest.raises(ValueError, match=complaint):
        Critter(*words)


@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda: critters.sample_critter(random.Random(0), "test"), "split 'test' is unknown"),
        (lambda: Critters(split="test"), "split 'test' is unknown"),
        (lambda: Critters(length=-1), "length -1 is negative"),
        (lambda: Critters(size=4), "size 4 is too small"),
        (lambda: Critters(4).render(workers=0), "workers 0 is too few"),
        (lambda: critters.prompt(CAT, ["colour"]), "attribute 'colour' is unknown"),
    ],
)
def test_bad_arguments_are_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()


def test_labels_point_back_at_the_words(train):
    for critter, _ in train[:500]:
        found = {name: ATTRIBUTES[name][label] for name, label in critters.labels(critter).items()}
        assert Critter(**found) == critter


# ------------------------------------------------------------------------------------ captions


def test_captions_are_true(train):
    for critter, text in train:
        for name, value in stated(text).items():
            assert getattr(critter, name) == value, (text, critter)


def test_captions_leave_things_out(train):
    counts = dict.fromkeys(ATTRIBUTES, 0)
    everything = nothing = 0
    for _, text in train:
        said = stated(text)
        everything += len(said) == 5
        nothing += not said
        for name in said:
            counts[name] += 1
    share = {name: count / DRAWS for name, count in counts.items()}
    assert share["animal"] > 0.9
    assert share["hat"] > 0.9
    assert all(0.45 < share[name] < 0.55 for name in ("fur", "hat_color", "background"))
    assert 0.15 < everything / DRAWS < 0.25
    assert 0.01 < nothing / DRAWS < 0.05


def test_captions_are_plain_words_of_the_vocabulary(train):
    said = set()
    for _, text in train:
        assert re.fullmatch("[a-z]+(,? [a-z]+)*", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        said |= set(text.replace(",", "").split())
    assert said == set(critters.vocabulary())
    assert any("an orange" in text for _, text in train)


CAT = Critter("cat", "orange", "top hat", "blue", "green")


@pytest.mark.parametrize(
    "attributes, text",
    [
        (("animal", "hat"), "a cat in a top hat"),
        (tuple(ATTRIBUTES), "an orange cat in a blue top hat on a green background"),
        (("animal",), "a cat"),
        (("hat",), "a critter in a top hat"),
        (("animal", "hat_color"), "a cat in a blue hat"),
        (("background", "fur"), "an orange critter on a green background"),
        ((), "a critter"),
    ],
)
def test_prompts(attributes, text):
    assert critters.prompt(CAT, attributes) == text
    assert stated(text) == {name: getattr(CAT, name) for name in attributes}


def test_captions_vary_between_epochs_and_stay_true():
    data = Critters(200)
    first, second = data.captions(0), data.captions(1)
    assert first == data.captions(0)
    assert sum(a != b for a, b in zip(first, second, strict=True)) > 150
    for index, text in enumerate(second):
        critter = data.scene(index)
        assert all(getattr(critter, name) == value for name, value in stated(text).items())


# ------------------------------------------------------------------------------------ pictures


def neighbours(critter: Critter, name: str) -> list[Critter]:
    """All critters that differ from this one in one attribute."""
    values = critters.furs(critter.animal) if name == "fur" else ATTRIBUTES[name]
    return [replace(critter, **{name: v}) for v in values if v != getattr(critter, name)]


@pytest.mark.parametrize("name", ["fur", "hat", "hat_color", "background"])
def test_the_picture_shows_each_attribute(name):
    for animal in ANIMALS:
        if name == "fur" and animal in OWN_FUR:
            continue
        critter = Critter(animal, critters.furs(animal)[0], "beanie", "red", "blue")
        for other in neighbours(critter, name):
            change = np.abs(array(critter).astype(int) - array(other)).max(axis=2)
            # A difference too small to see would do for a hash, not for a reader.
            assert (change > 24).mean() > 0.04, (critter, other)


def test_the_picture_shows_the_animal():
    for fur, hat in product(FURS, HATS):
        pictures = [
            array(Critter(animal, OWN_FUR.get(animal, fur), hat, "red", "blue")) for animal in ANIMALS
        ]
        for i, a in enumerate(pictures):
            for b in pictures[:i]:
                assert (np.abs(a.astype(int) - b).max(axis=2) > 24).mean() > 0.06


def test_the_same_seed_draws_the_same_pose_at_every_size():
    small, large = array(CAT, 32, seed=5), array(CAT, 128, seed=5)
    shrunk = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 3
    assert np.abs(shrunk - array(CAT, 32, seed=6)).mean() > 9


class Extreme(random.Random):
    """Jitter at its limits: each of the four draws is -1 or 1."""

    def __init__(self, corner: tuple[float, ...]) -> None:
        super().__init__(0)
        self.corner = iter(corner)

    def uniform(self, a: float, b: float) -> float:
        return a if next(self.corner) < 0 else b


@pytest.mark.parametrize("size", [32, 64])
def test_everything_stays_in_the_frame(size):
    background = array(CAT, size, seed=None)[0, 0]
    for animal, hat in product(ANIMALS, HATS):
        critter = Critter(animal, critters.furs(animal)[0], hat, "red", "green")
        for corner in product((-1, 1), repeat=4):
            picture = np.array(critters.draw(critter, size, Extreme(corner)))
            edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
            assert all((edge == background).all() for edge in edges), (critter, corner)


def test_critters_fill_the_frame():
    for animal, hat in product(ANIMALS, HATS):
        critter = Critter(animal, critters.furs(animal)[0], hat, "red", "green")
        picture = array(critter, seed=None)
        covered = (picture != picture[0, 0]).any(axis=2)
        assert covered.mean() > 0.35, critter
        assert covered.any(axis=1).sum() > 42, critter
        assert covered.any(axis=0).sum() > 34, critter


def test_every_colour_stands_out_from_every_background():
    for fur, hat_color, background in product(FURS, HAT_COLORS, BACKGROUNDS):
        critter = Critter("cat", fur, "top hat", hat_color, background)
        picture = array(critter, 128, seed=None).astype(int)
        backdrop = picture[0, 0]
        assert np.abs(picture[28, 64] - backdrop).max() > 60, critter  # the hat's crown
        # White fur on white is told by its rim: walk from the cheek outwards.
        row = np.abs(picture[88, :64] - backdrop).max(axis=1)
        assert row.max() > 60, critter


# ------------------------------------------------------------------------------------ data set


@pytest.mark.parametrize("size", [32, 64, 128])
def test_items_are_images_in_range(size):
    data = Critters(8, size=size)
    for image, text in (data[i] for i in range(8)):
        assert image.shape == (3, size, size)
        assert image.dtype == torch.float32
        assert -1 <= image.min() < -0.5
        assert 0.5 < image.max() <= 1
        assert text


def test_items_are_the_drawn_pictures():
    data = Critters(4, size=32)
    for i in range(4):
        picture = data.image(i)
        for x, y in ((16, 4), (3, 20), (20, 9)):  # Pillow counts across first, tensors down first
            pixel = [round((channel.item() + 1) * 127.5) for channel in data[i][0][:, y, x]]
            assert tuple(pixel) == picture.getpixel((x, y))


def test_items_depend_on_seed_and_index_alone():
    data, again, longer, other = Critters(50), Critters(50), Critters(500), Critters(50, seed=1)
    image, text = data[7]
    for same in (again, longer):
        assert torch.equal(same[7][0], image)
        assert same[7][1] == text
    assert not torch.equal(other[7][0], image)
    assert [other.scene(i) for i in range(50)] != [data.scene(i) for i in range(50)]
    assert torch.equal(data[-43][0], image)


def test_iteration_ends():
    data = Critters(5, size=32)
    assert len(data) == 5
    assert len(list(data)) == 5
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"item {index} is outside"):
            data[index]


@pytest.mark.parametrize("length", [0, 1, 137, 200])  # processes take a hundred at a time
def test_rendering_agrees_with_items_for_any_number_of_workers(length):
    data = Critters(length, size=32)
    one, three = data.render(workers=1), data.render(workers=3)
    assert one.images.shape == (length, 3, 32, 32)
    assert one.images.dtype == torch.uint8
    assert torch.equal(one.images, three.images)
    assert one.captions == three.captions == data.captions()
    assert one.scenes == [data.scene(i) for i in range(length)]
    for i in range(length):
        assert torch.equal(one.images[i].float() / 127.5 - 1, data[i][0])


@pytest.mark.parametrize("rows", [range(0), range(3, 4), range(20, 150), range(137)])
def test_some_rows_are_those_of_all(rows):
    data = Critters(150, size=32)
    assert torch.equal(data.images(2, rows), data.images()[rows.start : rows.stop])
    with pytest.raises(IndexError, match="item 150 is outside"):
        data.images(1, range(149, 151))


def test_rendering_works_in_a_script_without_a_main_guard():
    script = (
        "from minidiff.critters import Critters\n"
        "print(Critters(6, size=32).render(workers=2).images.shape[0])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["6"], done.stderr


# ------------------------------------------------------------------- the stream, as it has always been

STREAMS = [
    (1, "train", "96dfec87cfe6dc35", "c049801972d198bf"),
    (1, "held_out", "d31a6b9c8511cf7a", "930332d1f74aab55"),
    (2, "train", "2cdfe4fb12df63af", "8f88254fb525b7d1"),
    (2, "held_out", "1a033fb9eeb1999e", "3f2425198366c690"),
]


def digest(parts: list[str] | bytes) -> str:
    content = parts if isinstance(parts, bytes) else "".join(f"{part}\n" for part in parts).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("count,split,captions,pictures", STREAMS)
def test_a_thousand_items_are_what_they_were(count, split, captions, pictures):
    """The shipped models and the results of the studies belong to this stream: what changes it is another
    data set. The hashes are those of the first version."""
    data = Critters(1000, 32, split, count=count)
    assert digest(data.captions(0) + data.captions(1)) == captions
    assert digest(data.images().numpy().tobytes()) == pictures


@pytest.mark.parametrize("split,captions", [("train", "dfdd123a4d9c3402"), ("held_out", "8847676f3264346d")])
def test_a_thousand_negative_captions_are_what_they_were(split, captions):
    data = Critters(1000, 32, split, count=2)
    said = [data.negative_caption(i, epoch) for epoch in (0, 1) for i in range(1000)]
    assert digest(said) == captions
