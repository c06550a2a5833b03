"""Folders that are larger than the memory: pictures are read as they are needed, and the run is the same."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import weights_of
from safetensors.torch import load_file
from test_cli import run

import minidiff as md
from minidiff import device, fit
from minidiff.data import Batches, captioned_folder
from minidiff.data import folder as folders
from minidiff.data.on_disk import OnDisk, part
from minidiff.recipes import get_recipe, score_held_back


def write(folder: Path, count: int) -> Path:
    """Pictures of all kinds, each another, with a caption each; the second cannot be read."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for i in range(count):
        form = (20 + i % 3, 24, 3) if i % 2 else (24, 20 + i % 5)
        pixels = torch.randint(256, form, generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"number {i % 4}")
    (folder / "001.png").write_bytes(b"none")
    return folder


@pytest.fixture
def twelve(tmp_path) -> Path:
    return write(tmp_path / "data", 12)


def no_memory(monkeypatch) -> None:
    monkeypatch.setattr(folders, "memory", lambda: 0)


def count_reads(monkeypatch) -> list[Path]:
    """The pictures that are read from now on."""
    read, before = [], folders.read_picture

    def spy(path):
        read.append(path)
        return before(path)

    monkeypatch.setattr(folders, "read_picture", spy)
    return read


@pytest.mark.parametrize("size", [16, (8, 24)])
def test_they_are_what_a_tensor_of_all_would_hold(twelve, size):
    whole, found = captioned_folder(twelve, size), captioned_folder(twelve, size, most_bytes=100)
    assert isinstance(whole.images, torch.Tensor)
    assert isinstance(found.images, OnDisk)
    assert found[1:] == whole[1:]
    assert (found.images.shape, found.images.nbytes) == (whole.images.shape, whole.images.nbytes)
    odd = torch.arange(11) % 2 == 1
    for rows in (slice(None), slice(3), slice(9, 99), slice(0, 0), 4, -1, torch.tensor([7, 0, 7]), odd):
        assert torch.equal(found.images[rows], whole.images[rows])
    assert torch.equal(part(found.images, odd)[:], part(whole.images, odd))
    with pytest.raises(IndexError):
        found.images[11]
    assert found.notes[-1] == "in memory the pictures would take 0.0 GB: they are read as they are needed"
    assert not any("in memory" in note for note in whole.notes)


def test_what_fits_stays_in_memory(twelve):
    """12 pictures of 3 x 16 x 16 bytes, the broken one counted: it takes its place until it is found out."""
    assert isinstance(captioned_folder(twelve, 16, most_bytes=12 * 768).images, torch.Tensor)
    assert isinstance(captioned_folder(twelve, 16, most_bytes=12 * 768 - 1).images, OnDisk)


def test_a_quarter_of_the_memory_is_theirs_shared_by_all_processes(twelve, monkeypatch):
    monkeypatch.setattr(folders, "memory", lambda: 4 * 12 * 768)
    assert isinstance(captioned_folder(twelve, 16).images, torch.Tensor)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(captioned_folder(twelve, 16).images, OnDisk)


def test_the_memory_is_that_of_the_machine_or_of_its_container(tmp_path, monkeypatch):
    whole = device.memory()
    assert 2**28 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(
        device, "ALLOWED", (str(tmp_path / "none"), str(tmp_path / "max"), str(tmp_path / "most"))
    )
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "most").write_text("123456\n")
    assert device.memory() == 123456
    monkeypatch.delattr(os, "sysconf")
    (tmp_path / "most").unlink()
    assert device.memory() == device.UNTOLD


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_batch_reads_its_own_pictures_and_no_others(twelve, monkeypatch, workers):
    whole, found = (captioned_folder(twelve, 16, most_bytes=most) for most in (10**6, 0))
    read = count_reads(monkeypatch)

    def batches(images: torch.Tensor | OnDisk) -> list[tuple[torch.Tensor, list[str]]]:
        made = Batches(images, whole.captions, 3, seed=5)
        endless = iter(made) if workers is None else made.ahead(list, itertools.count(), workers)
        return list(itertools.islice(endless, 5))

    for (x, said), (other, says) in zip(batches(whole.images), batches(found.images), strict=True):
        assert torch.equal(x, other)
        assert said == says
    if workers != 2:  # else another process has read them, and some more
        assert len(read) in (15, 18)  # a loader may be a batch ahead


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_a_picture_that_is_gone_is_named(twelve, workers):
    found = captioned_folder(twelve, 16, most_bytes=0)
    batches = Batches(found.images, found.captions, 11)
    (twelve / "004.png").unlink()
    with pytest.raises(OSError, match=r"^\S*004.png could be read before, and cannot now .*: bring it back"):
        next(iter(batches) if workers is None else batches.ahead(list, itertools.count(), workers))


# --- runs ------------------------------------------------------------------------------------------


def steps_of(folder: Path, output: Path, stop: int = 4, resume: bool = False) -> md.Diffusion:
    """A run of 4 steps, or as many of it as are asked for."""
    torch.manual_seed(0)
    recipe = get_recipe(folder, size=16, width=32)
    recipe.steps, recipe.batch_size, recipe.prompts = 4, 5, ["number 1"]
    for step in fit.fit(recipe, output, seed=1, resume=resume, sample_every=99, save_every=2):
        if step.index + 1 == stop:
            break
    return recipe.model


def test_a_run_is_the_same_from_memory_and_from_the_disk_and_goes_on_from_either(
    twelve, tmp_path, monkeypatch
):
    whole = weights_of(steps_of(twelve, tmp_path / "memory"))
    steps_of(twelve, tmp_path / "begun in memory", stop=2)
    with monkeypatch.context() as patch:
        no_memory(patch)
        assert torch.equal(weights_of(steps_of(twelve, tmp_path / "disk")), whole)
        assert torch.equal(weights_of(steps_of(twelve, tmp_path / "begun in memory", resume=True)), whole)
        steps_of(twelve, tmp_path / "begun on disk", stop=2)
    assert torch.equal(weights_of(steps_of(twelve, tmp_path / "begun on disk", resume=True)), whole)
    saved = [
        load_file(tmp_path / name / "training.safetensors") for name in ("memory", "disk", "begun on disk")
    ]
    for other in saved[1:]:
        assert other.keys() == saved[0].keys()
        assert all(torch.equal(value, saved[0][key]) for key, value in other.items())


def test_what_is_held_back_stays_on_the_disk_until_it_is_scored(tmp_path, monkeypatch):
    data = write(tmp_path / "data", 401)  # of which 400 can be read
    whole = get_recipe(data, size=16, width=32)
    images, captions = whole.source.held_back()
    no_memory(monkeypatch)
    recipe = get_recipe(data, size=16, width=32)
    held, said = recipe.source.held_back()
    assert isinstance(recipe.source.images, OnDisk)
    assert isinstance(held, OnDisk)
    assert said == captions
    assert torch.equal(held[:], images)
    assert torch.equal(recipe.source.images[:], whole.source.images)
    read = count_reads(monkeypatch)
    torch.manual_seed(0)
    pipe = md.TextToImage(whole.model.eval())
    with pytest.warns(UserWarning, match="a Fréchet distance of 40 samples"):
        scores = score_held_back(pipe, recipe, steps=1)
    assert all(score.n == 40 for score in scores.values())
    assert len(read) == 80  # for the errors, and for the distances


def test_the_command_says_so_and_names_a_picture_that_is_gone(twelve, tmp_path, monkeypatch, capsys):
    no_memory(monkeypatch)
    call = (
        "train",
        str(twelve),
        "-o",
        str(tmp_path / "run"),
        "--size",
        "16",
        "--width",
        "32",
        "--steps",
        "2",
    )
    code, _, err = run(monkeypatch, capsys, *call, "--batch-size", "4")
    assert code == 0, err
    assert "in memory the pictures would take 0.0 GB: they are read as they are needed\n" in err
    before = fit.Batches.number

    def gone(self, k):
        (twelve / "005.png").unlink(missing_ok=True)
        return before(self, k)

    monkeypatch.setattr(fit.Batches, "number", gone)
    code, _, err = run(
        monkeypatch, capsys, *call[:3], str(tmp_path / "other"), *call[4:], "--batch-size", "11"
    )
    assert code == 1
    assert "005.png could be read before, and cannot now" in err.splitlines()[-1]
