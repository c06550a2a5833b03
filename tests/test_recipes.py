"""Recipes: data from files, training runs that can be stopped and gone on with."""

import csv
import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minidiff as md
from minidiff import fit as fitting
from minidiff import recipes
from minidiff.checks import sides
from minidiff.data import Batches
from minidiff.evaluation import evaluate_images
from minidiff.state import LossLog, saved_steps


def tiny_recipe(folder: Path) -> recipes.Recipe:
    torch.manual_seed(0)
    recipe = recipes.get_recipe(folder, size=16)
    text = recipe.model.encoder
    recipe.model = md.Diffusion(
        md.UNet(width=32, multipliers=(1,), attention=(0,), patch=2, condition_dim=text.dim),
        md.Cosine(), "x0", text, shape=(3, 16, 16),
    )  # fmt: skip
    recipe.steps = 6
    recipe.prompts = ["a red square"]
    return recipe


def test_batches_show_every_image_once_an_epoch_and_can_start_anywhere():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    captions = [str(i) for i in range(10)]
    stream = iter(Batches(images, captions, 5, seed=1))
    seen = [next(stream) for _ in range(4)]
    for x0, said in seen:
        assert ((x0.flatten() + 1) * 127.5).round().int().tolist() == [int(text) for text in said]
    first_epoch = [int(text) for _, said in seen[:2] for text in said]
    second_epoch = [int(text) for _, said in seen[2:] for text in said]
    assert sorted(first_epoch) == sorted(second_epoch) == list(range(10))
    assert first_epoch != second_epoch
    later = next(iter(Batches(images, captions, 5, seed=1, start=3)))
    assert later[1] == seen[3][1]
    with pytest.raises(ValueError, match="batch size 11"):
        Batches(images, captions, 11)


def test_fit_writes_a_model_samples_and_a_state(folder, tmp_path):
    out = tmp_path / "run"
    steps = list(fitting.fit(tiny_recipe(folder), out, sample_every=3, save_every=2))
    assert [step.index for step in steps] == list(range(6))
    assert saved_steps(out) == 6
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_000003.png", "step_000006.png"]
    pipe = md.TextToImage.from_pretrained(out)
    assert pipe("a red square", steps=2).images[0].size == (16, 16)
    assert not list(out.rglob(".*"))  # nothing half-written is left
    with pytest.raises(FileExistsError, match="--resume"):
        next(fitting.fit(tiny_recipe(folder), out))


def test_interrupted_and_resumed_equals_uninterrupted(folder, tmp_path):
    for _ in fitting.fit(tiny_recipe(folder), tmp_path / "whole"):
        pass
    done: list[int] = []
    steps = fitting.fit(tiny_recipe(folder), tmp_path / "parts")

    def follow() -> None:
        for step in steps:
            done.append(step.index)
            if step.index == 2:
                signal.raise_signal(signal.SIGINT)  # what Ctrl-C does

    with pytest.raises(KeyboardInterrupt):
        follow()
    assert done == [0, 1, 2]
    assert saved_steps(tmp_path / "parts") == 4  # the step in progress was finished and saved
    for step in fitting.fit(tiny_recipe(folder), tmp_path / "parts", resume=True):
        done.append(step.index)
    assert done == [0, 1, 2, 4, 5]
    whole, parts = (load_file(tmp_path / n / "training.safetensors") for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for key, value in whole.items():  # weights, their averages and the optimizer's moments
        assert torch.allclose(value, parts[key], atol=1e-6), key


def test_the_log_has_every_tenth_step_once_however_often_the_run_stopped(folder, tmp_path):
    def lines(start: int = 0, steps: int = 6) -> list[dict[str, str]]:
        recipe = tiny_recipe(folder)
        recipe.steps = steps
        seen = {
            step.index + 1: (step.loss, step.lr)
            for step in fitting.fit(recipe, tmp_path, resume=start > 0, save_every=4)
        }
        with (tmp_path / "loss.csv").open(newline="") as file:
            log = list(csv.DictReader(file))
        for line in log:
            assert (number := int(line["step"])) <= start or (
                float(line["loss"]), float(line["lr"]),
            ) == pytest.approx(seen[number], rel=1e-5)  # fmt: skip
        return log

    first = lines(steps=12)
    assert [line["step"] for line in first] == ["10", "12"]
    assert first[0]["images_per_s"] == ""
    assert float(first[1]["images_per_s"]) > 0
    # As after a kill, with the state of step 11 on the disk: step 12 is made again.
    with (tmp_path / "loss.csv").open("a") as file:
        file.write("1")  # and the next line was torn apart
    LossLog(tmp_path / "loss.csv", 6, start=11)._begin()
    with (tmp_path / "loss.csv").open(newline="") as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["10"]
    assert [line["step"] for line in lines(12, 25)] == ["10", "20", "25"]


def test_resume_without_a_state_says_so(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        next(fitting.fit(tiny_recipe(folder), tmp_path / "new", resume=True))


def test_another_network_does_not_resume_a_run(folder, tmp_path):
    for _ in fitting.fit(tiny_recipe(folder), tmp_path):
        pass
    other = tiny_recipe(folder)
    other.steps, net = 8, other.model.net
    other.model.net = type(net)(**net.config | {"positions": True})  # the same weights, another network
    with pytest.raises(ValueError, match="a run with positions = False, not True: resume it with that"):
        next(fitting.fit(other, tmp_path, resume=True))
    # A run of the first format says "places".
    config = json.loads((tmp_path / "config.json").read_text())
    config["net"]["places"] = config["net"].pop("positions")
    (tmp_path / "config.json").write_text(json.dumps(config))
    other.model.net = net
    next(fitting.fit(other, tmp_path, resume=True))
    other.model.net = md.DiT(3, 64, 1, condition_dim=other.model.encoder.dim)
    with pytest.raises(ValueError, match="another kind of network, not of a DiT"):
        next(fitting.fit(other, tmp_path, resume=True))


def test_critters_recipe_never_shows_a_held_out_pair():
    """Captions and pictures of the training stream itself, as the recipe feeds it."""
    source = recipes.get_recipe("critters", images=512, size=32).source
    stream = iter(Batches(source.images, source.caption, 128))
    data = md.critters.Critters(512, 32)
    assert source.images.shape == (512, 3, 32, 32)
    for index in range(512):
        critter = data.scene(index)
        assert (critter.animal, critter.hat) not in md.critters.HELD_OUT
    for _ in range(8):
        for text in next(stream)[1]:
            for animal, hat in md.critters.HELD_OUT:
                assert not (animal in text.split() and hat in text), text


def test_nothing_is_drawn_or_built_before_it_is_asked_for(monkeypatch, tmp_path):
    def never(*args, **options):
        raise AssertionError("drawn")

    for name in ("Critters", "captioned_folder", "fashion_mnist", "UNet", "WaveUNet"):
        monkeypatch.setattr(recipes, name, never)
    monkeypatch.setattr(recipes.tones, "Tones", never)
    for name in (*recipes.RECIPES, tmp_path):
        recipe = recipes.get_recipe(name)
        with pytest.raises(AssertionError, match="drawn"):
            recipe.source  # noqa: B018


@pytest.mark.parametrize("name", ["critters", "critters-duo", "fashion-mnist"])
def test_a_model_that_needs_no_data_is_built_without(monkeypatch, name):
    """So an option that does not fit the network is refused before 40,000 pictures are drawn."""
    for data in ("Critters", "fashion_mnist"):
        monkeypatch.setattr(recipes, data, lambda *args, **options: pytest.fail("drawn"))
    assert recipes.get_recipe(name, width=32).model.net.config["width"] == 32
    with pytest.raises(ValueError, match="width = 50 is not a multiple of 32"):
        recipes.get_recipe(name, width=50).model  # noqa: B018


def test_what_is_held_back_is_read_for_evaluation_only(monkeypatch):
    read = []

    def part(root, *, train=True):
        read.append(train)
        return SimpleNamespace(images=torch.full((2, 1, 32, 32), int(train)), captions=["a dress", "a bag"])

    monkeypatch.setattr(recipes, "fashion_mnist", part)
    source = recipes.get_recipe("fashion-mnist").source
    assert (read, source.images.unique().item()) == ([True], 1)
    assert source.held_back()[0].unique().item() == 0
    assert read == [True, False]


def test_a_run_that_cannot_begin_is_refused_at_once(monkeypatch, tmp_path):
    """Without a step, so without data."""
    monkeypatch.setattr(recipes, "Critters", lambda *args, **options: pytest.fail("drawn"))
    recipe = recipes.get_recipe("critters")
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        fitting.fit(recipe, tmp_path, resume=True)
    (tmp_path / "training.safetensors").touch()
    with pytest.raises(FileExistsError, match="--resume"):
        fitting.fit(recipe, tmp_path)


def test_a_recipe_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no recipe and no folder 'cats': use critters, .* or a folder"):
        recipes.get_recipe("cats")
    for name in ("critters", "critters-duo"):
        with pytest.raises(ValueError, match="size = 50: use a multiple of 16"):
            recipes.get_recipe(name, size=50)


@pytest.mark.parametrize(
    "size,patch", [(16, 1), (32, 2), (48, 2), (64, 4), (80, 4), (128, 4), ((48, 96), 2), ((128, 16), 1)]
)
def test_the_width_of_the_network_and_its_patches(size, patch):
    text = md.TextEncoder.from_captions(["a cat"], dim=32, layers=1)
    options = recipes.Options(size=size, width=32)
    model = recipes.text_to_image(text, (3, *sides(size)), options)
    assert (model.net.config["width"], model.net.patch) == (32, patch)


# --- evaluation ------------------------------------------------------------------------------------


def test_every_tenth_picture_of_a_large_folder_is_held_back(tmp_path):
    for i in range(400):
        Image.new("RGB", (16, 16), (i % 256, i // 256, 0)).save(tmp_path / f"{i:03}.png")
        (tmp_path / f"{i:03}.txt").write_text(f"number {i}")
    source = recipes.get_recipe(tmp_path, size=16).source
    images, captions = source.held_back()
    assert captions == [f"number {i}" for i in range(9, 400, 10)]
    assert not set(captions) & set(source.caption)
    assert len(source.images) == len(source.caption) == 360
    for image, caption in zip(images, captions, strict=True):
        number = int(caption.split()[1])
        assert image[:, 8, 8].tolist() == [number % 256, number // 256, 0]
    assert source.notes[-1] == "40 of 400 pictures are held back, for evaluation"


def test_a_test_split_is_held_back_and_a_small_folder_is_not(folder, tmp_path):
    assert recipes.get_recipe(folder, size=16).source.held_back is None
    pipe = md.TextToImage(tiny_recipe(folder).model)
    with pytest.raises(ValueError, match="nothing is held back of 6 pictures: put some into test/"):
        recipes.score_held_back(pipe, recipes.get_recipe(folder, size=16))
    for split in ("train", "test"):
        (tmp_path / "split" / split).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "split" / split / "a.png")
        (tmp_path / "split" / split / "a.txt").write_text(split)
    source = recipes.get_recipe(tmp_path / "split", size=16).source
    assert source.caption == ["train"]
    assert source.held_back()[1] == ["test"]


@pytest.mark.filterwarnings("ignore:a Fréchet distance of 44 samples")
def test_scores_of_any_pictures_have_their_floor_and_their_n(folder):
    """A model that knows nothing is far from the floor, in error and in distance."""
    torch.manual_seed(0)
    images = torch.randint(64, (48, 3, 16, 16), dtype=torch.uint8)
    captions = ["a red square", "a green square"] * 24
    model = tiny_recipe(folder).model
    scores = evaluate_images(md.TextToImage(model), images, captions, prompts=44, steps=2)
    error = {name: scores[f"squared error of x0, {name}"] for name in ("model", "trivial", "floor")}
    assert error["floor"].value < error["trivial"].value < error["model"].value
    assert all(score.n == 44 for score in scores.values())
    assert scores["Fréchet distance, critters-clip features"].value > 0
    # The model's error by hand, at one of the times; its guess of x0 is 0 before any training.
    x0 = images[:44].float() / 127.5 - 1
    if not model.net.last.weight.any():
        torch.testing.assert_close(error["model"].value, float((x0**2).mean()), rtol=0.2, atol=0)
    with pytest.raises(ValueError, match="39 pictures are too few"):
        evaluate_images(md.TextToImage(model), images[:39], captions)
