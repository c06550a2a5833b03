"""Recipes: data from files, training runs that can be stopped and gone on with."""

import csv
import gzip
import json
import signal
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minidiff as md
from minidiff import recipes
from minidiff.data import Batches, fashion
from minidiff.state import LossLog, saved_steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned pictures, one broken, one missing."""
    path = tmp_path / "pictures"
    path.mkdir()
    lines = []
    for i, color in enumerate(["red", "green", "blue", "red", "green", "blue"]):
        Image.new("RGB", (40 + i, 30), color).save(path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"a {color} square"})
    (path / "broken.png").write_bytes(b"not a picture")
    lines += [{"file_name": n, "text": "nothing"} for n in ("broken.png", "missing.png")]
    (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny_recipe(folder: Path) -> recipes.Recipe:
    torch.manual_seed(0)
    recipe = recipes.folder_recipe(folder, size=16)
    text = recipe.model.text
    recipe.model = md.Diffusion(
        md.UNet(width=32, multipliers=(1,), attention=(0,), patch=2, condition_dim=text.dim),
        md.Cosine(), "x0", text, shape=(3, 16, 16),
    )  # fmt: skip
    recipe.steps = 6
    recipe.prompts = ["a red square"]
    return recipe


def test_folder_names_what_it_skips_and_keeps_the_rest(folder):
    data = md.data.captioned_folder(folder, size=16)
    assert data.images.shape == (6, 3, 16, 16)
    assert data.captions[0] == "a red square"
    assert data.images[0].float().mean((1, 2)).tolist() == [255, 0, 0]
    assert [name for name, _ in data.skipped] == ["broken.png", "missing.png"]
    assert recipes.folder_recipe(folder, 16).notes[0].startswith("skipped broken.png: ")


def test_folder_reads_csv_like_jsonl(folder):
    jsonl = md.data.captioned_folder(folder, 16)
    (folder / "metadata.jsonl").unlink()
    rows = "".join(f'{i}.png,"{text}"\n' for i, text in enumerate(jsonl.captions))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    from_csv = md.data.captioned_folder(folder, 16)
    assert from_csv.captions == jsonl.captions
    assert torch.equal(from_csv.images, jsonl.images)


def test_folder_errors_say_what_to_do(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no folder"):
        md.data.captioned_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl or metadata\.csv"):
        md.data.captioned_folder(tmp_path / "empty")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match="line 1: needs file_name and text"):
        md.data.captioned_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "broken.png", "text": "x"}\n')
    with pytest.raises(ValueError, match="not one of 1 pictures"):
        md.data.captioned_folder(folder)
    with pytest.raises(ValueError, match="size = 50: use a multiple of 16"):
        recipes.folder_recipe(folder, 50)


def write_idx(path: Path, shape: tuple[int, ...], values: bytes, zipped: bool) -> None:
    content = b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values
    if zipped:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_a_local_copy(tmp_path, zipped, below):
    place = tmp_path / below
    place.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (10, 28, 28), dtype=torch.uint8)
    write_idx(place / "train-images-idx3-ubyte", (10, 28, 28), pixels.numpy().tobytes(), zipped)
    write_idx(place / "train-labels-idx1-ubyte", (10,), bytes(range(10)), zipped)
    data = md.data.fashion_mnist(tmp_path)
    assert data.captions == list(fashion.CAPTIONS)
    assert torch.equal(data.images[:, 0, 2:30, 2:30], pixels)
    assert data.images.shape == (10, 1, 32, 32)
    assert data.images.sum() == pixels.sum()  # the margin is black


def test_fashion_mnist_without_a_copy_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no Fashion-MNIST in"):
        md.data.fashion_mnist(tmp_path)

    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fashion, "DEBIAN", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fashion, "FashionMNIST", offline)
    with pytest.raises(FileNotFoundError, match="--data-root") as error:
        md.data.fashion_mnist()
    assert "\n" not in str(error.value)


def test_fashion_mnist_damaged_file_is_named(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", (10, 28, 28), b"short", False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", (10,), bytes(10), False)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        md.data.fashion_mnist(tmp_path)


@pytest.mark.skipif(
    not fashion.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not here"
)
def test_fashion_mnist_of_debian_holds_all_pictures():
    data = md.data.fashion_mnist()
    assert data.images.shape == (60_000, 1, 32, 32)
    assert {data.captions.count(caption) for caption in fashion.CAPTIONS} == {6000}


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
    steps = list(recipes.fit(tiny_recipe(folder), out, sample_every=3, save_every=2))
    assert [step.index for step in steps] == list(range(6))
    assert saved_steps(out) == 6
    assert sorted(p.name for p in (out / "samples").iterdir()) == [
        "step_000003.png",
        "step_000006.png",
    ]
    pipe = md.TextToImage.from_pretrained(out)
    assert pipe("a red square", steps=2).images[0].size == (16, 16)
    assert not list(out.rglob(".*"))  # nothing half-written is left
    with pytest.raises(FileExistsError, match="--resume"):
        next(recipes.fit(tiny_recipe(folder), out))


def test_interrupted_and_resumed_equals_uninterrupted(folder, tmp_path):
    for _ in recipes.fit(tiny_recipe(folder), tmp_path / "whole"):
        pass
    done: list[int] = []
    fitting = recipes.fit(tiny_recipe(folder), tmp_path / "parts")

    def follow() -> None:
        for step in fitting:
            done.append(step.index)
            if step.index == 2:
                signal.raise_signal(signal.SIGINT)  # what Ctrl-C does

    with pytest.raises(KeyboardInterrupt):
        follow()
    assert done == [0, 1, 2]
    assert saved_steps(tmp_path / "parts") == 4  # the step in progress was finished and saved
    for step in recipes.fit(tiny_recipe(folder), tmp_path / "parts", resume=True):
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
            for step in recipes.fit(recipe, tmp_path, resume=start > 0, save_every=4)
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
        next(recipes.fit(tiny_recipe(folder), tmp_path / "new", resume=True))


def test_another_network_does_not_resume_a_run(folder, tmp_path):
    for _ in recipes.fit(tiny_recipe(folder), tmp_path):
        pass
    other = tiny_recipe(folder)
    other.steps, net = 8, other.model.net
    other.model.net = type(net)(
        **net.config | {"places": True}
    )  # the same weights, another network
    with pytest.raises(
        ValueError, match="a run with places = False, not True: resume it with that"
    ):
        next(recipes.fit(other, tmp_path, resume=True))
    other.model.net = md.DiT(3, 64, 1, condition_dim=other.model.text.dim)
    with pytest.raises(ValueError, match="another kind of network, not of a DiT"):
        next(recipes.fit(other, tmp_path, resume=True))


def test_critters_recipe_never_shows_a_held_out_pair():
    """Captions and pictures of the training stream itself, as the recipe feeds it."""
    recipe = recipes.critters_recipe(images=512, size=32)
    stream = iter(Batches(recipe.images, recipe.caption, recipe.batch_size))
    data = md.data.Critters(512, 32)
    assert recipe.images.shape == (512, 3, 32, 32)
    for index in range(512):
        critter = data.critter(index)
        assert (critter.animal, critter.hat) not in md.data.critters.HELD_OUT
    for _ in range(8):
        for text in next(stream)[1]:
            for animal, hat in md.data.critters.HELD_OUT:
                assert not (animal in text.split() and hat in text), text
