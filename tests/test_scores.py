"""The attribute reader and the scores: each score sees its own mistake."""

import random
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scenes import SCENE, array, stated
from test_critters import HATS, HELD_OUT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import minidiff as md
from minidiff import cli, critters, recipes
from minidiff.critters import AttributeReader, Critter, Critters, Scene
from minidiff.critters import scores as wing
from minidiff.critters.scene import NOBODY, OWN, POSITIONS


def shares(read, expected):
    return wing.shares_of_two(read, [critters.words(scene) for scene in expected])


# ---------------------------------------------------------------------------- reader and scores


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return AttributeReader.from_pretrained("critters-duo-reader")


def renders(scenes: list[Scene], **left_out) -> torch.Tensor:
    """The scenes as images in [-1, 1]; "first" or "second" is who is missing in them all."""
    pictures = [array(critters.draw(s, 64, random.Random(i), **left_out)) for i, s in enumerate(scenes)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = random.Random("scenes to score")
    return [critters.sample_scene(rng, "all") for _ in range(128)]


def test_the_reader_reads_fresh_renders(reader):
    scores = critters.reader_accuracy(reader, n=1024, seed=77)
    assert scores["full scene"].value >= 0.99
    assert set(scores) > {*critters.PAIR_ATTRIBUTES, "binding"}


@pytest.mark.parametrize("missing", POSITIONS)
def test_the_reader_sees_who_is_missing(reader, scenes, missing):
    seen = reader.read(renders(scenes, without=missing))
    left = [scene.critters[missing == "first"] for scene in scenes]
    right = [
        found["second_animal"] == NOBODY
        and all(found[f"first_{name}"] == getattr(critter, name) for name in OWN)
        for found, critter in zip(seen, left, strict=True)
    ]
    assert np.mean(right) > 0.98
    scores = shares(seen, scenes)
    assert scores["count"].value < 0.02
    assert scores["objects"].value == scores["binding"].value == scores["position"].value == 0


def test_the_reader_is_saved_with_what_it_reads(reader, tmp_path):
    reader.save_pretrained(tmp_path)
    again = AttributeReader.from_pretrained(tmp_path)
    assert again.attributes == critters.PAIR_ATTRIBUTES
    assert again.num_features == reader.num_features
    x = renders([SCENE])
    assert torch.equal(again(x), reader(x))
    assert load_file(tmp_path / "reader.safetensors").keys() == reader.state_dict().keys()


def test_a_reader_learns_from_scenes_and_from_incomplete_ones():
    torch.manual_seed(0)
    learner = AttributeReader(8, critters.PAIR_ATTRIBUTES, features=32)
    losses = list(critters.train_reader(learner, 30, images=64, batch_size=32))
    assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5])


def swap_hats(scene: Scene) -> Scene:
    a, b = scene.critters
    return Scene(
        replace(a, hat=b.hat, hat_color=b.hat_color), replace(b, hat=a.hat, hat_color=a.hat_color),
        scene.relation,
    )  # fmt: skip


def swap_colors(scene: Scene) -> Scene:
    a, b = scene.critters
    return Scene(replace(a, hat_color=b.hat_color), replace(b, hat_color=a.hat_color), scene.relation)


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
    scores = shares(reader.read(renders(changed)), scenes)
    for name in ("objects", "count", "colours", "position", "binding"):
        if name in falls:
            assert scores[name].value < 0.03, name
        else:
            assert scores[name].value > 0.97, name
    assert (scores["full scene"].value > 0.97) == (changed == scenes)


def test_a_score_wants_as_many_scenes_as_images():
    with pytest.raises(ValueError, match="zip"):
        shares([critters.words(SCENE)], [SCENE, SCENE])


@pytest.fixture
def few_renders(monkeypatch):
    """The reader's own accuracy from fewer renders: it has its own test."""
    whole = critters.reader_accuracy
    monkeypatch.setattr(wing, "reader_accuracy", lambda reader, size: whole(reader, 64, size=size))


def untrained(words) -> md.Diffusion:
    torch.manual_seed(0)
    text = md.TextEncoder.from_captions(words)
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), patch=4, condition_dim=text.dim)
    return md.Diffusion(net, md.Cosine(), "x0", text, shape=(3, 64, 64))


def test_an_encoder_that_reads_any_word_does_not_tell_what_the_model_draws(tmp_path, few_renders, capsys):
    """Letter by letter, as sub-word tokenizers do with words they do not have."""
    letters = {c: i for i, c in enumerate(["[PAD]", *"abcdefghijklmnopqrstuvwxyz,"])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
    model = untrained(["a"])
    model.encoder.model.resize_token_embeddings(len(fast))
    model.encoder = md.TextEncoder(model.encoder.model, fast, 32)
    assert wing.unknown_words(model, critters.vocabulary(2)) == []
    assert wing.count_of(model) is None
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its words do not tell what it draws: say so"):
        cli.evaluate(str(tmp_path))
    with pytest.raises(ValueError, match="no recipe and no folder 'cats': use critters, critters-duo"):
        cli.evaluate(str(tmp_path), "cats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 32 letters are no caption
        cli.evaluate(str(tmp_path), "critters-duo", prompts=2, steps=1)
    assert "held-out: binding" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:a Fréchet distance of 64 samples")
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

    oracle.model, oracle.progress, oracle.axes = untrained(critters.vocabulary(2)), None, 3
    scores = critters.evaluate(oracle, 2, prompts=64)
    names = ("objects", "count", "colours", "position", "binding", "full scene")
    expected = [f"{split}: {name}" for split in ("seen", "held-out") for name in names]
    distances = [f"{name} distance, reader features" for name in ("Fréchet", "kernel")]
    assert list(scores) == [*expected, "reader on renders: full scene", *distances]
    for name in expected:
        assert scores[name].value >= 63 / 64, name
        assert scores[name].n == 64
    found = [[(s["animal"], s["hat"]) in HELD_OUT for s in stated(text)[0]] for text in asked]
    assert not any(map(any, found[:64]))
    assert all(map(any, found[64:]))


def test_the_command_chooses_by_the_words_a_model_knows(few_renders, monkeypatch, capsys, tmp_path):
    untrained([*critters.vocabulary(2), ","]).save_pretrained(tmp_path / "run")
    cli.evaluate(str(tmp_path / "run"), prompts=2, steps=1)
    out = capsys.readouterr().out
    assert "held-out: binding" in out
    assert "animal and hat" not in out
    asked = []

    def get_recipe(name, **options):
        asked.append(name)
        return SimpleNamespace(source=recipes.Source(torch.zeros(2, 3, 64, 64).byte(), ["", ""]))

    monkeypatch.setattr(recipes, "get_recipe", get_recipe)
    examine = sys.modules["minidiff.doctor"]
    monkeypatch.setattr(examine, "doctor", lambda *_, **__: SimpleNamespace(findings=[]))
    cli.doctor(str(tmp_path / "run"))
    assert asked == ["critters-duo"]


class Hears:
    """A CLIP that gives a caption, and the drawing of what it says, the vector of its words."""

    def __init__(self, scenes: list[Scene], order_counts: bool):
        self.said, self.order_counts = [critters.prompt(scene) for scene in scenes], order_counts

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
    scenes = Critters(40, split="all", seed=9, count=2).render().scenes
    scores = critters.binding_accuracy(Hears(scenes, order_counts), n=40, seed=9)
    assert set(scores) == {"full scene", *critters.EXCHANGES}
    assert all(score.value == share for score in scores.values())
    assert scores["full scene"].n == scores["place"].n == 40
    assert 0 < scores["fur"].n < 40  # not every animal comes in every fur


def test_the_shipped_clip_knows_whose_hat_is_whose():
    """A bag of words would be right in half of the cases."""
    scores = critters.binding_accuracy(md.CLIP.from_pretrained("critters-duo-clip"), 256, seed=7)
    assert scores["hat"].value > 0.9
    assert scores["hat_color"].value > 0.9


def test_evaluation_refuses_a_model_of_one_critter():
    pipe = md.TextToImage(untrained(critters.vocabulary()))
    with pytest.raises(ValueError, match="not a critters-duo model: it does not know the word 'above'"):
        critters.evaluate(pipe, 2, prompts=2)


def test_doctor_can_look_at_scenes():
    source = recipes.get_recipe("critters-duo", size=32, images=6, seed=3).source
    data = Critters(6, 32, seed=3, count=2)
    assert torch.equal(source.images, data.images())
    assert source.captions(6) == data.captions()
