"""Captioned pictures as people have them, and Fashion-MNIST as it may lie about."""

import gzip
import json
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff as md
from minidiff import recipes
from minidiff.data import fashion
from minidiff.data.folder import captioned_folder, folder_splits


def picture(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), color).save(path)


def test_folder_names_what_it_skips_and_keeps_the_rest(folder):
    data = md.data.captioned_folder(folder, size=16)
    assert data.images.shape == (6, 3, 16, 16)
    assert data.captions[0] == "a red square"
    assert data.images[0].float().mean((1, 2)).tolist() == [255, 0, 0]
    assert [name for name, _ in data.skipped] == ["broken.png", "missing.png"]
    assert recipes.get_recipe(folder, size=16).source.notes[0].startswith("skipped broken.png: ")


def test_a_rectangle_is_cut_from_the_middle(tmp_path):
    """(height, width), in this order; what is too much falls off on both sides, and nothing is squeezed."""
    tall = Image.new("RGB", (20, 60), "red")
    tall.paste("blue", (0, 25, 20, 35))  # a band of 20x10 in the middle
    (tmp_path / "cut").mkdir()
    tall.save(tmp_path / "cut" / "1.png")
    found = captioned_folder(tmp_path, (10, 20))
    assert found.images.shape == (1, 3, 10, 20)
    assert (found.images[0, 2] == 255).all()
    wide = captioned_folder(tmp_path, (20, 10)).images
    assert wide.shape == (1, 3, 20, 10)
    assert torch.equal(captioned_folder(tmp_path, 20).images, captioned_folder(tmp_path, (20, 20)).images)


def test_grey_pictures_have_three_equal_channels(tmp_path):
    (tmp_path / "grey").mkdir()
    grey = Image.linear_gradient("L").resize((16, 16))
    grey.save(tmp_path / "grey" / "1.png")
    picture(tmp_path / "red" / "2.png")
    found = captioned_folder(tmp_path, 16)
    assert found.images.shape == (2, 3, 16, 16)
    assert (found.images[0] == found.images[0, :1]).all()
    assert torch.equal(found.images[0, 0], torch.tensor(list(grey.getdata())).reshape(16, 16).byte())
    assert found.images[1, 0, 0, 0] != found.images[1, 1, 0, 0]


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
    with pytest.raises(
        FileNotFoundError, match=r"no metadata\.jsonl or metadata\.csv, no text files, no class folders"
    ):
        md.data.captioned_folder(tmp_path / "empty")
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png"}\n')
    with pytest.raises(ValueError, match=r"line 1: needs file_name and text or caption, has"):
        md.data.captioned_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "broken.png", "text": "x"}\n')
    with pytest.raises(ValueError, match="not one of 1 pictures"):
        md.data.captioned_folder(folder)
    with pytest.raises(ValueError, match="size = 50: use a multiple of 16 for each side, such as 64"):
        recipes.get_recipe(folder, size=50)
    with pytest.raises(ValueError, match="size = 48x50: use a multiple of 16 for each side, such as 48x64"):
        recipes.get_recipe(folder, size=(48, 50))


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
    assert data.labels.tolist() == list(range(10))
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
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", offline)
    with pytest.raises(FileNotFoundError, match="--data-root") as error:
        md.data.fashion_mnist()
    assert "\n" not in str(error.value)


def test_fashion_mnist_damaged_file_is_named(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", (10, 28, 28), b"short", False)
    write_idx(tmp_path / "train-labels-idx1-ubyte", (10,), bytes(10), False)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        md.data.fashion_mnist(tmp_path)


@pytest.mark.skipif(not fashion.DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not here")
def test_fashion_mnist_of_debian_holds_all_pictures():
    data = md.data.fashion_mnist()
    assert data.images.shape == (60_000, 1, 32, 32)
    assert {data.captions.count(caption) for caption in fashion.CAPTIONS} == {6000}


# --- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("above", [False, True])
def test_splits_with_a_file_each_or_one_above_them(tmp_path, name, above):
    for split, color in (("train", "red"), ("test", "blue")):
        picture(tmp_path / split / "a.png", color)
    rows = [(f"{split}/a.png" if above else "a.png", f"a {split} square") for split in ("train", "test")]

    def write(file: Path, rows: list[tuple[str, str]]) -> None:
        lines = [json.dumps({"file_name": f, "text": t}) for f, t in rows]
        if name.endswith("csv"):
            lines = ["file_name,text", *(",".join(row) for row in rows)]
        file.write_text("\n".join(lines) + "\n")

    if above:
        write(tmp_path / name, rows)
    else:
        for split, row in zip(("train", "test"), rows, strict=True):
            write(tmp_path / split / name, [row])
    assert folder_splits(tmp_path) == ("train", "test")
    train, test = captioned_folder(tmp_path, 16), captioned_folder(tmp_path, 16, split="test")
    assert (train.captions, test.captions) == (["a train square"], ["a test square"])
    assert train.images[0, :, 0, 0].tolist() == [255, 0, 0]
    assert test.images[0, :, 0, 0].tolist() == [0, 0, 255]
    with pytest.raises(FileNotFoundError, match=r"has no split 'validation': it has \('train', 'test'\)"):
        captioned_folder(tmp_path, 16, split="validation")


@pytest.mark.parametrize("root", [".", "train"])
def test_the_name_of_a_class_folder_is_the_caption(tmp_path, root):
    picture(tmp_path / root / "tabby_cat" / "1.png")
    picture(tmp_path / root / "snow-owl" / "deep" / "2.JPG")
    picture(tmp_path / root / "tabby_cat" / "3.png")
    found = captioned_folder(tmp_path, 16)
    assert found.captions == ["deep", "tabby cat", "tabby cat"]
    assert found.uncaptioned == []


def test_text_files_beside_the_pictures(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("\ufeffa red square\n", encoding="utf-8")
    found = captioned_folder(tmp_path, 16)
    assert found.captions == ["a red square"]
    assert found.uncaptioned == ["b.png"]
    assert found.notes == ["left out 1 pictures without a caption: b.png"]


def test_metadata_go_before_text_files_and_these_before_class_folders(tmp_path):
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "cat" / "b.png")
    assert captioned_folder(tmp_path, 16).captions == ["cat", "cat"]
    (tmp_path / "cat" / "a.txt").write_text("from a file")
    assert captioned_folder(tmp_path, 16).captions == ["from a file"]
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/b.png,from the metadata\n")
    found = captioned_folder(tmp_path, 16)
    assert found.captions == ["from the metadata"]
    assert found.uncaptioned == ["cat/a.png"]


@pytest.mark.parametrize(
    "row,column,caption",
    [
        ({"text": "one", "caption": "two"}, None, "one"),
        ({"caption": "two"}, None, "two"),
        ({"text": "one", "about": "three"}, "about", "three"),
        ({"text": None}, None, ""),
        ({"text": 7}, None, "7"),
    ],
)
def test_which_column_says_what(tmp_path, row, column, caption):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png"} | row))
    assert captioned_folder(tmp_path, 16, caption_column=column).captions == [caption]


def test_an_empty_cell_is_no_caption(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,\n")
    assert captioned_folder(tmp_path, 16).captions == [""]
    with pytest.raises(ValueError, match="line 2: needs file_name and about, has"):
        captioned_folder(tmp_path, 16, caption_column="about")


def test_metadata_of_other_pictures_are_named(tmp_path):
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "test" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.png,a square\n")
    with pytest.raises(ValueError, match="lists no pictures of .*test"):
        captioned_folder(tmp_path, 16, split="test")
