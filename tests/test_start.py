"""Training that starts from a trained model."""

from pathlib import Path

import pytest
from networks import perturbed
from PIL import Image
from runs import weights_of
from test_cli import run
from texts import small

import minidiff as md
from minidiff import fit
from minidiff.recipes import get_recipe
from minidiff.state import saved_steps

KNOWN, NEW = "a cat in a top hat", "a kite, two dogs and a zebra"  # "dogs" is known


def write(folder: Path, *captions: str) -> Path:
    """Pictures of 20x20 pixels with these captions."""
    folder.mkdir()
    for i, caption in enumerate(captions):
        Image.new("RGB", (20, 20), (90 * i, 0, 255)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def trained(**encoder: bool) -> md.Diffusion:
    """A model as after some training. Its network is of a form that no recipe builds, its target another."""
    text = small()
    text.frozen = encoder.get("frozen", False)
    net = md.UNet(
        width=32, multipliers=(1,), attention=(0,), patch=2, condition_dim=32, conditioning="tokens"
    )
    return md.Diffusion(perturbed(net).float(), md.Flow(), "flow", text, shape=(3, 16, 16))


@pytest.fixture
def start(tmp_path) -> Path:
    trained().save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def minidiff(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *(str(argument) for argument in arguments))


def distance(a: md.Diffusion, b: md.Diffusion) -> float:
    """Between the weights of networks of the same form."""
    return (weights_of(a) - weights_of(b)).abs().max().item()


def test_a_folder_is_trained_from_a_model(minidiff, start, tmp_path):
    """Without a rate that moves it, the model is the one it began with: weights, form, schedule and words."""
    data, out = write(tmp_path / "data", KNOWN, NEW), tmp_path / "run"
    call = ("train", data, "--from", start, "-o", out, "--steps", 1, "--lr", 1e-12)
    code, _, err = minidiff(*call)
    assert code == 0, err
    note = "words of the captions that the model does not know, and will not learn: 'kite', 'and', 'zebra'"
    assert err.splitlines()[0] == note
    assert "vocabulary" not in err  # not once more for each batch
    before, after = md.Diffusion.from_pretrained(start), md.Diffusion.from_pretrained(out)
    assert distance(before, after) < 1e-3  # stored in float16
    assert after.net.config == before.net.config
    assert (after.target, after.schedule.config(), after.shape) == ("flow", md.Flow().config(), (3, 16, 16))
    assert after.encoder.tokenizer.get_vocab() == before.encoder.tokenizer.get_vocab()


@pytest.mark.parametrize("frozen", [False, True])
def test_it_learns_but_a_frozen_encoder_does_not(frozen, tmp_path):
    model = trained(frozen=frozen)
    model.save_pretrained(tmp_path / "start")
    start = md.Diffusion.from_pretrained(tmp_path / "start")  # which fixes all weights
    recipe = get_recipe(write(tmp_path / "data", KNOWN), start=start)
    recipe.steps = 2
    steps = list(fit.fit(recipe, tmp_path / "run", sample_every=9))
    assert not recipe.source.notes
    assert [step.index for step in steps] == [0, 1]
    assert distance(recipe.model, model) > 1e-6
    moved = weights_of(recipe.model.encoder) - weights_of(model.encoder)
    assert bool(moved.any()) != frozen


def test_a_stopped_run_goes_on_by_the_same_line(minidiff, start, tmp_path):
    """With its own weights, not once more with those it began with."""
    data, out = write(tmp_path / "data", KNOWN, NEW), tmp_path / "run"
    call = ("train", data, "-o", out, "--steps")
    assert minidiff(*call, 1, "--from", start, "--lr", 0.01)[0] == 0
    first = md.Diffusion.from_pretrained(out)
    assert distance(first, md.Diffusion.from_pretrained(start)) > 5e-3
    code, _, err = minidiff(*call, 2, "--resume")
    assert code == 1
    assert "holds a run" in err
    code, _, err = minidiff(*call, 2, "--resume", "--from", start, "--lr", 1e-12)
    assert code == 0, err
    assert saved_steps(out) == 2
    assert distance(first, md.Diffusion.from_pretrained(out)) < 2e-3
    code, _, err = minidiff(*call, 1, "--from", start)
    assert (code, "holds a training run: add --resume" in err) == (1, True)


def test_a_named_recipe_is_trained_from_a_model():
    model = md.Diffusion.from_pretrained("critters")
    recipe = get_recipe("critters", images=128, start=model)
    assert recipe.model is model
    assert all(p.requires_grad for p in model.net.parameters())
    assert recipe.source.images.shape == (128, 3, 64, 64)
    assert not recipe.source.notes
    (note,) = get_recipe("critters-duo", images=128, start=model).source.notes
    assert "'left'" in note
    assert "'cat'" not in note
    assert note.endswith(" in all)")  # the first five are named
    assert note.count("'") == 10


def test_what_agrees_may_be_said(tmp_path, start):
    data = write(tmp_path / "data", KNOWN)
    model = md.Diffusion.from_pretrained(start)
    same = {"size": (16, 16), "width": 32, "conditioning": "tokens"}
    assert get_recipe(data, start=model, **same).model is model
    for name, other in (("size", 32), ("width", 64), ("conditioning", "both")):
        with pytest.raises(ValueError, match=f"^{name} = .*: the model to start from has"):
            get_recipe(data, start=model, **same | {name: other})


def test_a_model_that_reads_no_text_is_no_start(tmp_path):
    labels = md.Diffusion(md.MLP(2, 32, 1, condition_dim=8), md.Cosine(), "v", md.LabelEncoder(3, 8))
    with pytest.raises(
        ValueError, match="the model to start from reads no text: start from one with a TextE"
    ):
        get_recipe(write(tmp_path / "data", KNOWN), start=labels)


def test_words_that_are_not_known():
    text = small()
    assert text.unknown([]) == text.unknown(["", KNOWN]) == []
    assert text.unknown(["A zebra; a Kite", "a kite, a zebra"]) == ["zebra", ";", "Kite", "kite"]
    assert md.TextEncoder.from_pretrained("critters-clip").unknown(["a cat", "a zebra"]) == ["zebra"]
