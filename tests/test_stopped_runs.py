"""Runs that were stopped, and what goes on from them: the same run, or a line that says why not."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import full_disk
from PIL import Image
from runs import data, fresh, weights_of
from test_cli import run

import minidiff as md
from minidiff import fit
from minidiff.recipes import get_recipe
from minidiff.state import saved_steps

COLORS = ("red", "green", "blue")


def write_captions(folder: Path, *captions: str) -> None:
    lines = [json.dumps({"file_name": f"{c}.png", "text": t}) for c, t in zip(COLORS, captions, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Three pictures, and a run of one step on them."""
    place = tmp_path_factory.mktemp("begun")
    (place / "data").mkdir()
    for color in COLORS:
        Image.new("RGB", (16, 16), color).save(place / "data" / f"{color}.png")
    write_captions(place / "data", "a red square", "a green square", "a blue square")
    for _ in fit.fit(recipe(place / "data", 1), place / "run", sample_every=99):
        pass
    return place


def recipe(folder: Path, steps: int, **options: object):
    torch.manual_seed(0)
    made = get_recipe(folder, **{"size": 16, "width": 32, **options})
    made.steps, made.prompts = steps, ["a red square"]
    return made


@pytest.mark.parametrize(
    "change,options,says",
    [
        (
            lambda f: write_captions(f, "a red kite", "a green kite", "a blue kite"),
            {},
            r"other words \(kite, squ",
        ),
        (lambda f: write_captions(f, "a square", "a square", "a square"), {}, r"other words \(blue, green"),
        (lambda f: None, {"size": 32}, r"of shape \(3, 16, 16\), not \(3, 32, 32\)|patch = 1, not 2"),
        (lambda f: None, {"width": 64}, "width = 32, not 64: resume it with that"),
    ],
)
def test_another_run_is_not_the_same_run(change, options, says, begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=says):
        fit.fit(recipe(tmp_path / "data", 2, **options), tmp_path / "run", resume=True)
    assert saved_steps(tmp_path / "run") == 1


def test_another_seed_is_another_run(begun, tmp_path):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    again = fit.fit(recipe(tmp_path / "data", 2), tmp_path / "run", resume=True, seed=7)
    with pytest.raises(ValueError, match="holds a run with seed 0, not 7: resume it with that"):
        next(again)


def test_a_broken_step_is_neither_taken_nor_saved(tmp_path):
    """The file of the step before stays, and the weights are those it holds."""
    model, good = fresh("v"), data(8, 2).float()
    steps = md.train(model, [good, good, good * torch.nan], 9, precision="fp32")
    for _ in range(2):
        step = next(steps)
        step.save(tmp_path)
    file = (tmp_path / "training.safetensors").read_bytes()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match=r"step 3: the loss \(nan\) .* the batch holds such numbers"):
        next(steps)
    assert torch.equal(weights_of(model), before)
    with pytest.raises(RuntimeError, match="is no number: a smaller learning rate may help"):
        step.save(tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == file


def test_a_full_disk_is_named_and_the_save_before_stays(begun, tmp_path):
    steps = fit.fit(recipe(begun / "data", 2), tmp_path / "run", sample_every=99, save_every=1)
    next(steps)
    with full_disk(), pytest.raises(OSError, match="step 2 could not be saved .*: make room, then --resume"):
        next(steps)
    assert saved_steps(tmp_path / "run") == 1
    md.TextToImage.from_pretrained(tmp_path / "run")


def test_what_a_kill_left_is_swept_up(begun, tmp_path):
    """Folders of unfinished files, as large as a checkpoint."""
    shutil.copytree(begun / "run", tmp_path, dirs_exist_ok=True)
    for left in (tmp_path / ".saving-a", tmp_path / "samples" / ".saving-b"):
        left.mkdir()
        (left / "training.safetensors").write_bytes(b"half")
    next(fit.fit(recipe(begun / "data", 2), tmp_path, resume=True, sample_every=99))
    assert not list(tmp_path.rglob(".saving-*"))


def test_the_lock_falls_with_the_process(tmp_path):
    """However it ends."""
    script = """
        import fcntl, os, sys, time
        fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
        print(1, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "1\n"
    with pytest.raises(FileExistsError, match="another process trains into"), fit.held(tmp_path):
        pass
    other.kill()
    other.wait()
    with fit.held(tmp_path):
        pass


@pytest.fixture
def heard():
    """Under ``nohup`` a process ignores SIGHUP, and so does a run."""
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, inherited)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("heard")
def test_a_signal_saves_and_ends_with_its_code(number, begun, tmp_path):
    before = signal.getsignal(number)
    steps = fit.fit(recipe(begun / "data", 9), tmp_path, sample_every=99)
    next(steps)
    signal.raise_signal(number)
    with pytest.raises(SystemExit) as stopped:
        next(steps)
    assert stopped.value.code == 128 + number
    assert saved_steps(tmp_path) == 2
    assert signal.getsignal(number) is before


def test_a_finished_run_says_so(begun, tmp_path, monkeypatch, capsys):
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    call = ("train", "data", "-o", "run", "--size", "16", "--width", "32", "--steps", "1", "--resume")
    code, _, err = run(monkeypatch, capsys, *call)
    assert code == 0
    assert err.splitlines()[-1] == "run has made its 1 steps: give more --steps to go on"


def test_stopped_before_the_first_save_is_not_called_saved(begun, tmp_path, monkeypatch, capsys):
    """Two Ctrl-C in the first step: the second acts at once."""

    def stopped(*args: object, **options: object):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(fit, "_fit", stopped)
    call = ("train", str(begun / "data"), "-o", str(tmp_path / "run"), "--size", "16", "--width", "32")
    code, _, err = run(monkeypatch, capsys, *call)
    assert code == 130
    assert err.splitlines()[-1] == "stopped, nothing saved"


def test_the_page_quotes_what_soak_has_written():
    root = Path(__file__).parents[1]
    page = (root / "book" / "reliable.md").read_text()
    measured = json.loads((root / "tests" / "soak.json").read_text())
    for run_, found in measured.items():
        if run_.startswith("kills"):
            assert found["same log"]
            assert all(found["same"].values())
            names = ("processes", "SIGKILL", "SIGTERM", "in the middle of a save", "bytes left over")
            assert f"| {', '.join(f'{name}: {found[name]}' for name in names)} |" in page
    number = measured["pictures"]["pictures"]
    low, slope, high = measured["pictures"]["megabytes per 1,000 pictures"]
    assert low < 1
    assert f"{number:,} pictures in one process: {slope:.2f} [{low:.2f}, {high:.2f}] MB" in page
    assert f"{measured['workers']['workers']} spawned processes" in page
    assert measured["workers"]["same"]
    assert measured["disk"]["exit"] != 0
    assert f"A disk of {measured['disk']['megabytes']} MB" in page
