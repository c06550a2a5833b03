"""Duo: two critters in one picture; captions are true of both, and each score sees its own mistake."""

import random
import re
import sys
import warnings
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_critters import HAT, WHO, any_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import minidiff as md
from minidiff import cli, evaluation, recipes
from minidiff.data import AttributeReader, Batches, Duo, duo
from minidiff.data import reader as readers
from minidiff.data.critters import ANIMALS, BACKGROUNDS, HATS, HELD_OUT, Critter
from minidiff.data.duo import Scene
from minidiff.evaluation import evaluate_duo, judge

DRAWS = 20_000
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
    who, *hat = re.split(
        " in | wearing | with ", text.replace("black-and-white", "black and white")
    )
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
    orders = [said] if relation in duo.RELATIONS else [said, said[::-1]]
    return (
        relation in (None, scene.relation, f"?{scene.relation}")
        and background in (None, scene.first.background)
        and any(all(map(agrees, scene.critters, order)) for order in orders)
    )


def array(image) -> np.ndarray:
    return np.array(image).astype(int)


@pytest.fixture(scope="module")
def train() -> list[tuple[Scene, str]]:
    rng = random.Random(0)
    drawn = [duo.sample(rng) for _ in range(DRAWS)]
    return [(scene, duo.caption(scene, rng)) for scene in drawn]


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
    recipe = recipes.critters_duo_recipe(images=256, size=32)
    data = Duo(256, 32)
    assert torch.equal(recipe.images, data.images())
    assert not {pair for i in range(256) for pair in pairs(data.scene(i))} & set(HELD_OUT)
    stream = iter(Batches(recipe.images, recipe.caption, recipe.batch_size))
    for _ in range(6):
        for text in next(stream)[1]:
            for said in stated(text)[0]:
                assert (said.get("animal"), said.get("hat")) not in HELD_OUT, text


def test_held_out_scenes_show_one_in_either_place():
    data = Duo(1000, split="held_out")
    places = [tuple(pair in HELD_OUT for pair in pairs(data.scene(i))) for i in range(1000)]
    assert (False, False) not in places
    assert min(places.count((True, False)), places.count((False, True))) > 300
    every = {pair for i in range(1000) for pair in pairs(Duo(1000, split="all").scene(i))}
    assert every == set(product(ANIMALS, HATS))


def test_every_value_stays_common_and_the_two_can_be_told_apart(train):
    counts = {name: dict.fromkeys(values, 0) for name, values in duo.ATTRIBUTES.items()}
    for scene, _ in train:
        for name, value in duo.words(scene).items():
            counts[name][value] += 1
        for name in ("animal", "hat", "hat_color"):
            assert getattr(scene.first, name) != getattr(scene.second, name)
    for place in duo.PLACES:
        assert counts[f"{place}_animal"].pop(duo.NOBODY) == 0
    for name, count in counts.items():
        assert min(count.values()) > 0.08 * DRAWS, (name, count)


def test_labels_point_back_at_the_words(train):
    for scene, _ in train[:500]:
        found = {name: duo.ATTRIBUTES[name][label] for name, label in duo.labels(scene).items()}
        assert found == duo.words(scene)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: Scene(CAT, RABBIT, "right of"), "relation 'right of' is unknown: choose from left"),
        (lambda: Scene(CAT, replace(RABBIT, background="pink"), "above"), "'green' and 'pink' differ"),
        (lambda: Scene(CAT, replace(RABBIT, animal="cat"), "above"), "both .* have the animal 'cat'"),
        (lambda: Scene(CAT, replace(RABBIT, hat="top hat"), "above"), "have the hat 'top hat'"),
        (lambda: Scene(CAT, replace(RABBIT, hat_color="red"), "above"), "have the hat_color 'red'"),
        (lambda: duo.sample(random.Random(0), "test"), "split 'test' is unknown"),
        (lambda: duo.prompt(SCENE, ["colour"]), "attribute 'colour' is unknown"),
        (lambda: duo.draw(SCENE, 4), "size 4 is too small"),
        (lambda: duo.draw(SCENE, without="third"), "without 'third' is unknown"),
        (lambda: Duo(split="test"), "split 'test' is unknown"),
        (lambda: Duo(length=-1), "length -1 is negative"),
        (lambda: Duo(size=4), "size 4 is too small"),
        (lambda: Duo(4).render(workers=0), "workers 0 is too few"),
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
    text = duo.prompt(SCENE)
    assert true(text, SCENE)
    for wrong in (
        text.replace("left", "right"), text.replace("left of", "below"), text.replace("red", "blue"),
        text.replace("left of", "over"), text.replace("green", "pink"), text.replace("cat", "dog"),
    ):  # fmt: skip
        assert not true(wrong, SCENE), wrong


def test_wrong_captions_are_wrong_in_one_thing_and_never_name_a_held_out_pair():
    data, counted = Duo(4000), 0
    for i in range(4000):
        scene, right, wrong = data.scene(i), data.caption(i, 1), data.wrong_caption(i, 1)
        assert true(right, scene)
        if wrong:
            counted += 1
            assert not true(wrong, scene), f"{wrong!r} is true of {scene}"
            for said in stated(wrong)[0]:
                assert (said.get("animal"), said.get("hat")) not in HELD_OUT, wrong
    assert counted > 0.5 * 4000


def test_the_clip_of_two_critters_is_shown_wrong_captions():
    data, (_, batches) = Duo(128, 32), recipes.critters_duo_clip(128, 32, seed=4)
    x, captions = next(iter(batches))
    (right_x, right), (_, wrong) = (
        next(iter(Batches(data.images(), said, 128, seed=4)))
        for said in (data.caption, data.wrong_caption)
    )
    assert torch.equal(x, right_x)
    assert captions == right + [text for text in wrong if text]
    assert len(captions) > 128 + 40
    assert next(iter(batches))[1] == captions  # they can be gone through again


def test_one_thing_is_exchanged():
    cat, bear = replace(CAT, hat="crown"), Critter("bear", "white", "top hat", "blue", "green")
    frog = Critter("frog", "green", "cap", "blue", "green")
    assert duo.exchange(Scene(cat, bear, "above"), "place") == Scene(bear, cat, "above")
    for what in ("fur", "hat", "hat_color"):
        one = replace(cat, **{what: getattr(bear, what)})
        other = replace(bear, **{what: getattr(cat, what)})
        assert duo.exchange(Scene(cat, bear, "left of"), what) == Scene(one, other, "left of")
    assert duo.exchange(Scene(cat, frog, "left of"), "fur") is None  # no cat is green
    alike = Scene(cat, replace(bear, fur="black"), "left of")
    assert duo.exchange(alike, "fur") is None
    with pytest.raises(ValueError, match="cannot exchange 'animal': choose from place, fur, hat"):
        duo.exchange(alike, "animal")


def test_captions_are_mostly_full_and_sometimes_leave_things_out(train):
    parsed = [stated(text) for _, text in train]
    full = [all(len(one) == 4 for one in said) for said, _, _ in parsed]
    told = [relation in duo.RELATIONS for _, relation, _ in parsed]
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
    assert said == set(duo.vocabulary())


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        (
            duo.EVERYTHING,
            "a black cat in a red top hat left of a white rabbit in a blue crown on a green background",
        ),
        (("animal", "hat", "relation"), "a cat in a top hat left of a rabbit in a crown"),
        (("animal", "fur"), "a black cat and a white rabbit"),
        ((), "a critter and a critter"),
    ],
)
def test_prompts(attributes, text):
    assert duo.prompt(SCENE, attributes) == text
    assert true(text, SCENE)


def test_captions_vary_between_epochs_and_stay_true():
    data = Duo(200)
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
    return [Scene(*pair, r) for pair in ((fox, dog), (dog, fox)) for r in duo.RELATIONS] * 40


def test_critters_stay_in_the_frame_and_apart():
    rng = random.Random(0)
    for number, scene in enumerate(
        [*tallest_and_widest(), *(duo.sample(rng, "all") for _ in range(300))]
    ):
        whole, first, second = (
            array(duo.draw(scene, 64, Extreme(number), without=missing))
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
    small = array(duo.draw(SCENE, 32, random.Random(5)))
    large = array(duo.draw(SCENE, 128, random.Random(5)))
    shrunk = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 3
    assert np.abs(shrunk - array(duo.draw(SCENE, 32, random.Random(6)))).mean() > 6


# ------------------------------------------------------------------------------------ data set


def test_items_depend_on_seed_and_index_alone():
    data, again, longer, other = Duo(50), Duo(50), Duo(500), Duo(50, seed=1)
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
    data = Duo(13, size=32)
    one, three = data.render(workers=1), data.render(workers=3)
    assert one.images.dtype == torch.uint8
    assert torch.equal(one.images, three.images)
    assert one.captions == three.captions == data.captions()
    assert one.scenes == [data.scene(i) for i in range(13)]
    for i in range(13):
        assert torch.equal(one.images[i].float() / 127.5 - 1, data[i][0])


# ---------------------------------------------------------------------------- reader and scores


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader.from_pretrained(readers.SHIPPED_DUO_READER)


def renders(scenes: list[Scene], **left_out) -> torch.Tensor:
    """The scenes as images in [-1, 1]; "first" or "second" is who is missing in them all."""
    pictures = [array(duo.draw(s, 64, random.Random(i), **left_out)) for i, s in enumerate(scenes)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("scenes to score")
    return [duo.sample(rng, "all") for _ in range(128)]


def test_the_reader_reads_fresh_renders(reader):
    scores = evaluation.duo_reader_accuracy(reader, n=1024, seed=77)
    assert scores["full scene"].value >= 0.99
    assert set(scores) > {*duo.ATTRIBUTES, "binding"}


@pytest.mark.parametrize("missing", duo.PLACES)
def test_the_reader_sees_who_is_missing(reader, scenes, missing):
    seen = reader.read(renders(scenes, without=missing))
    left = [scene.critters[missing == "first"] for scene in scenes]
    right = [
        found["second_animal"] == duo.NOBODY
        and all(found[f"first_{name}"] == getattr(critter, name) for name in duo.OWN)
        for found, critter in zip(seen, left, strict=True)
    ]
    assert np.mean(right) > 0.98
    scores = judge(seen, scenes)
    assert scores["count"].value < 0.02
    assert scores["objects"].value == scores["binding"].value == scores["position"].value == 0


def test_the_reader_is_saved_with_what_it_reads(reader, tmp_path):
    reader.save_pretrained(tmp_path)
    again = AttributeReader.from_pretrained(tmp_path)
    assert again.attributes == duo.ATTRIBUTES
    assert again.num_features == reader.num_features
    x = renders([SCENE])
    assert torch.equal(again(x), reader(x))
    assert load_file(tmp_path / "reader.safetensors").keys() == reader.state_dict().keys()


def test_a_reader_learns_from_scenes_and_from_incomplete_ones():
    torch.manual_seed(0)
    learner = AttributeReader(8, duo.ATTRIBUTES, features=32)
    losses = list(readers.train_duo_reader(learner, 30, images=64, batch_size=32))
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


def swap_hats(scene: Scene) -> Scene:
    a, b = scene.critters
    return Scene(
        replace(a, hat=b.hat, hat_color=b.hat_color), replace(b, hat=a.hat, hat_color=a.hat_color),
        scene.relation,
    )  # fmt: skip


def swap_colors(scene: Scene) -> Scene:
    a, b = scene.critters
    return Scene(
        replace(a, hat_color=b.hat_color), replace(b, hat_color=a.hat_color), scene.relation
    )


def swap_places(scene: Scene) -> Scene:
    return Scene(scene.second, scene.first, scene.relation)


def turn(scene: Scene) -> Scene:
    return replace(scene, relation="above" if scene.relation == "left of" else "left of")


def paint_the_wall(scene: Scene) -> Scene:
    wall = "pink" if scene.first.background != "pink" else "blue"
    first, second = (replace(critter, background=wall) for critter in scene.critters)
    return Scene(first, second, scene.relation)


def another_hat(scene: Scene) -> Scene:
    hat = next(h for h in HATS if h not in (scene.first.hat, scene.second.hat))
    return replace(scene, second=replace(scene.second, hat=hat))


@pytest.mark.parametrize(
    ("change", "falls"),
    [
        (lambda scene: scene, ()),
        (swap_hats, ("binding",)),
        (swap_colors, ("binding",)),
        (swap_places, ("position",)),
        (turn, ("position",)),
        (paint_the_wall, ()),
        (another_hat, ("objects", "binding")),
    ],
)
def test_each_score_sees_its_own_mistake(reader, scenes, change, falls):
    """Renders of scenes that differ in one way from what was asked for."""
    changed = [change(scene) for scene in scenes]
    scores = judge(reader.read(renders(changed)), scenes)
    for name in ("objects", "count", "colours", "position", "binding"):
        if name in falls:
            assert scores[name].value < 0.03, name
        else:
            assert scores[name].value > 0.97, name
    assert (scores["full scene"].value > 0.97) == (changed == scenes)


def test_a_score_wants_as_many_scenes_as_images():
    with pytest.raises(ValueError, match="zip"):
        judge([duo.words(SCENE)], [SCENE, SCENE])


@pytest.fixture
def few_renders(monkeypatch):
    """The reader's own accuracy from fewer renders: it has its own test."""
    whole = evaluation.duo_reader_accuracy
    monkeypatch.setattr(
        evaluation, "duo_reader_accuracy", lambda reader, size: whole(reader, 64, size=size)
    )


def untrained(words) -> md.Diffusion:
    torch.manual_seed(0)
    text = md.TextEncoder.from_captions(words)
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), patch=4, condition_dim=text.dim)
    return md.Diffusion(net, md.Cosine(), "x0", text, shape=(3, 64, 64))


def test_an_encoder_that_reads_any_word_does_not_tell_what_the_model_draws(
    tmp_path, few_renders, capsys
):
    """Letter by letter, as sub-word tokenizers do with words they do not have."""
    letters = {c: i for i, c in enumerate(["[PAD]", *"abcdefghijklmnopqrstuvwxyz,"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    model = untrained(["a"])
    model.text = md.TextEncoder(model.text.model, fast, 32)
    model.text.model.resize_token_embeddings(len(fast))
    assert evaluation.unknown_words(model, duo.vocabulary()) == []
    assert evaluation.data_of(model) is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="say what it draws, critters or critters-duo"):
        cli.evaluate(str(tmp_path))
    with pytest.raises(ValueError, match="no scores for 'cats': use critters or critters-duo"):
        cli.evaluate(str(tmp_path), "cats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 32 letters are no caption
        cli.evaluate(str(tmp_path), "critters-duo", prompts=2, steps=1)
    assert "held-out: binding" in capsys.readouterr().out


def test_who_draws_what_is_asked_for_scores_full_marks(few_renders):
    """An oracle that reads its prompts by the rules of this file and answers with renders."""
    asked = []

    def oracle(texts, **settings):
        asked.extend(texts)
        wanted = []
        for text in texts:
            said, relation, background = stated(text)
            wanted.append(Scene(*(Critter(**s, background=background) for s in said), relation))
        return SimpleNamespace(tensors=renders(wanted))

    oracle.model = untrained(duo.vocabulary())
    scores = evaluate_duo(oracle, prompts=64)
    names = ("objects", "count", "colours", "position", "binding", "full scene")
    expected = [f"{split}: {name}" for split in ("seen", "held-out") for name in names]
    assert list(scores) == [*expected, "reader on renders: full scene"]
    for name in expected:
        assert scores[name].value >= 63 / 64, name
        assert scores[name].n == 64
    found = [[(s["animal"], s["hat"]) in HELD_OUT for s in stated(text)[0]] for text in asked]
    assert not any(map(any, found[:64]))
    assert all(map(any, found[64:]))


def test_the_command_chooses_by_the_words_a_model_knows(few_renders, monkeypatch, capsys, tmp_path):
    untrained([*duo.vocabulary(), ","]).save_pretrained(tmp_path / "run")
    cli.evaluate(str(tmp_path / "run"), prompts=2, steps=1)
    out = capsys.readouterr().out
    assert "held-out: binding" in out
    assert "animal and hat" not in out
    told = []
    monkeypatch.setattr(cli, "some_data", lambda name, *_: told.append(name) or (None, None))
    monkeypatch.setattr(
        sys.modules["minidiff.doctor"], "doctor", lambda *_, **__: SimpleNamespace(findings=[])
    )
    cli.doctor(str(tmp_path / "run"))
    assert told == ["critters-duo"]


class Hears:
    """A CLIP that gives a caption, and the drawing of what it says, the vector of its words."""

    def __init__(self, scenes: list[Scene], order_counts: bool):
        self.said, self.order_counts = [duo.prompt(scene) for scene in scenes], order_counts

    def embed_images(self, x: torch.Tensor) -> torch.Tensor:
        said, self.said = self.said[: len(x)], self.said[len(x) :]
        return self.embed_captions(said)

    def embed_captions(self, captions: list[str]) -> torch.Tensor:
        words = [text.split() if self.order_counts else sorted(text.split()) for text in captions]
        seeds = [random.Random(" ".join(w)).getrandbits(62) for w in words]
        drawn = [torch.randn(64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.nn.functional.normalize(torch.stack(drawn), dim=1)


@pytest.mark.parametrize("order_counts,share", [(True, 1.0), (False, 0.0)])
def test_only_who_heeds_the_order_of_words_tells_a_scene_from_its_exchanges(order_counts, share):
    scenes = Duo(40, split="all", seed=9).render().scenes
    scores = evaluation.duo_clip_accuracy(Hears(scenes, order_counts), n=40, seed=9)
    assert set(scores) == {"full scene", *duo.EXCHANGES}
    assert all(score.value == share for score in scores.values())
    assert scores["full scene"].n == scores["place"].n == 40
    assert 0 < scores["fur"].n < 40  # not every animal comes in every fur


def test_the_shipped_clip_knows_whose_hat_is_whose():
    """A bag of words would be right in half of the cases."""
    scores = evaluation.duo_clip_accuracy(md.CLIP.from_pretrained("critters-duo-clip"), 256, seed=7)
    assert scores["hat"].value > 0.9
    assert scores["hat_color"].value > 0.9


def test_evaluation_refuses_a_model_of_one_critter():
    pipe = md.TextToImage(untrained(md.data.critters.vocabulary()))
    with pytest.raises(
        ValueError, match="not a critters-duo model: it does not know the word 'above'"
    ):
        evaluate_duo(pipe, prompts=2)


def test_doctor_can_look_at_scenes():
    images, captions = cli.some_data("critters-duo", 32, 6, None, seed=3)
    data = Duo(6, 32, seed=3)
    assert torch.equal(images, torch.stack([data[i][0] for i in range(6)]))
    assert captions == data.captions()
