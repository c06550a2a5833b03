"""The command, as a stranger types it."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from PIL import Image

import minidiff as md
from minidiff import cli
from minidiff.files import SHIPPED


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``minidiff ARGUMENTS``."""
    monkeypatch.setattr(sys, "argv", ["minidiff", *arguments])
    with pytest.raises(SystemExit) as exit:  # typer ends every command so
        cli.main()
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


@pytest.fixture
def minidiff(monkeypatch, capsys):
    return lambda *arguments: run(monkeypatch, capsys, *(str(argument) for argument in arguments))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for color in ("red", "green"):
        Image.new("RGB", (20, 20), color).save(path / f"{color}.png")
    (path / "bad.png").write_bytes(b"")
    rows = "".join(f"{name}.png,a {name} square\n" for name in ("red", "green", "bad"))
    (path / "metadata.csv").write_text("file_name,text\n" + rows)
    return path


def test_sample_gives_the_same_file_every_time(minidiff, tmp_path):
    digests = []
    for name in ("one.png", "two.png"):
        code, out, err = minidiff(
            "sample", "a cat in a top hat", "--num-images", 2, "--steps", 4, "--seed", 0,
            "--output", tmp_path / "new" / name,
        )  # fmt: skip
        assert (code, err) == (0, ""), err
        assert "seed 0" in out
        digests.append(hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    with Image.open(tmp_path / "new" / "one.png") as picture:
        assert picture.width > 2 * 4 * 64 - 1
        assert picture.height == 4 * 64 or picture.height > 4 * 64


@pytest.mark.filterwarnings("always")
def test_sample_names_unknown_words(minidiff, tmp_path):
    code, _, err = minidiff("sample", "a zebra in a top hat", "--steps", 1, "-o", tmp_path / "z.png")
    assert code == 0
    assert "'zebra'" in err
    assert "Traceback" not in err


@pytest.mark.filterwarnings("always")
def test_sample_says_when_nothing_of_the_prompt_is_left(minidiff, tmp_path):
    for prompt in ("", "кот в шляпе", "🐱🎩"):
        code, _, err = minidiff("sample", prompt, "--steps", 1, "-o", tmp_path / "any.png")
        assert code == 0
        assert err.splitlines()[-1] == f"warning: nothing to follow in [{prompt!r}]: drawn without a prompt"


def test_sample_rescales_and_guides_in_an_interval(minidiff, tmp_path):
    pictures = []
    for i, options in enumerate([(), ("--rescale", 0.7), ("--interval", 0.2, 0.6)]):
        code, _, err = minidiff(
            "sample", "a cat in a top hat", "--steps", 4, "--seed", 0, "--guidance", 6, *options,
            "-o", tmp_path / f"{i}.png",
        )  # fmt: skip
        assert (code, err) == (0, "")
        pictures.append((tmp_path / f"{i}.png").read_bytes())
    assert len(set(pictures)) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "a cat", "--model", "nowhere", "-o", "x.png"], "no model 'nowhere'"),
        (["sample", "a cat", "-o", "x.docx"], ".docx is no image format"),
        (["sample", "a cat", "--sampler", "magic", "-o", "x.png"], "unknown sampler 'magic'"),
        (["sample", "a cat", "--steps", "0", "-o", "x.png"], "--steps"),
        (["sample", "a cat", "--rescale", "2", "-o", "x.png"], "minidiff: rescale = 2 is a share"),
        (["sample", "a cat", "--guidance", "nan", "-o", "x.png"], "minidiff: guidance = nan"),
        (["sample", "a cat", "--interval", "0.8", "0.2", "-o", "x.png"], "minidiff: interval = (0.8, 0.2)"),
        (["train", "nothing", "-o", "run"], "'nothing' is no recipe"),
        (["train", "fashion-mnist", "-o", "run", "--data-root", "here"], "no Fashion-MNIST in here"),
        (
            ["train", "critters", "-o", "run", "--text-encoder", "./nowhere"],
            "no text encoder './nowhere': there is no such folder",
        ),
        (["train", "critters", "-o", "run", "--width", "50"], "minidiff: width = 50 is not a multiple of 32"),
        (["evaluate", "nowhere"], "no model 'nowhere'"),
        (["doctor", "nowhere"], "no model 'nowhere'"),
        (
            ["doctor", "critters", "nothing"],
            "no recipe and no folder 'nothing': use critters, critters-duo, fashion-mnist, tones or a folder",
        ),
    ],
)
def test_errors_are_one_line_and_a_code(minidiff, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = minidiff(*arguments)
    assert code != 0
    assert says in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_train_a_folder_names_what_it_skips_then_resumes(minidiff, folder, tmp_path):
    out = tmp_path / "run"
    code, _, err = minidiff("train", folder, "-o", out, "--steps", 2, "--size", 16)
    assert code == 0, err
    assert "skipped bad.png" in err
    assert (out / "samples" / "step_000002.png").is_file()
    code, _, err = minidiff("train", folder, "-o", out, "--steps", 3, "--size", 16)
    assert code == 1
    assert "--resume" in err
    code, _, err = minidiff("train", folder, "-o", out, "--steps", 3, "--size", 16, "--resume")
    assert code == 0, err
    code, _, err = minidiff(
        "sample", "a red square", "--model", out, "--steps", 2, "-o", tmp_path / "red.png"
    )
    assert code == 0, err


def test_train_with_an_encoder_trained_before(minidiff, folder, tmp_path):
    """It goes into the model's folder as it was, and the model draws without the folder it came from."""
    clip, out = tmp_path / "clip", tmp_path / "run"
    shutil.copytree(SHIPPED / "critters-clip", clip)
    code, _, err = minidiff("train", folder, "-o", out, "--steps", 2, "--size", 16, "--text-encoder", clip)
    assert code == 0, err
    shutil.rmtree(clip)
    text = md.Diffusion.from_pretrained(out).encoder
    assert text.frozen
    shipped = md.TextEncoder.from_pretrained("critters-clip")
    for part, other in zip(*(e(e.ids(["a red cat"])) for e in (text, shipped)), strict=True):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-3)  # stored in float16


@pytest.mark.parametrize(
    "name,score,words", [("critters-clip", "animal and hat", 32), ("critters-duo-clip", "hat_color", 48)]
)
def test_train_a_clip(minidiff, tmp_path, name, score, words):
    code, out, err = minidiff("train", name, "-o", tmp_path, "--steps", 2, "--images", 128)
    assert code == 0, err
    assert re.search(rf"{score} +\d+\.\d % ", out)
    assert md.CLIP.from_pretrained(tmp_path).text.max_length == words
    code, _, err = minidiff("train", name, "-o", tmp_path / "b", "--conditioning", "pooled")
    assert (code, err) == (
        1,
        f"minidiff: {name} takes none of --resume, --from, --text-encoder, --conditioning, --width, "
        "--batch-size and --lr: it is trained whole\n",
    )


def test_the_text_enters_as_asked(minidiff, folder, tmp_path):
    call = ("train", folder, "-o", tmp_path / "run", "--steps", 1, "--size", 16, "--conditioning")
    code, _, err = minidiff(*call, "pooled")
    assert code == 0, err
    assert md.Diffusion.from_pretrained(tmp_path / "run").net.config["conditioning"] == "pooled"
    code, _, err = minidiff(*call, "words")
    assert code == 1
    assert err == "minidiff: --conditioning words: choose one of both, pooled, tokens\n"


def test_evaluate_writes_what_it_prints(minidiff, tmp_path):
    code, out, err = minidiff(
        "evaluate", "critters", "--prompts", 8, "--steps", 4, "-o", tmp_path / "scores.json"
    )
    assert code == 0, err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert "seen: animal and hat" in out
    assert scores["seen: animal and hat"]["n"] == 8


def test_doctor_is_silent_about_the_shipped_model(minidiff):
    code, out, err = minidiff("doctor", "critters", "--samples", 64)
    assert code == 0, out + err
    assert "of the way from trivial to floor" in out
    assert out.strip().endswith("nothing is wrong")


def test_doctor_names_what_is_wrong_with_a_run(minidiff, folder, tmp_path):
    """Two steps of training: it knows next to nothing, and says so on any data."""
    out = tmp_path / "run"
    assert minidiff("train", folder, "-o", out, "--steps", 2, "--size", 16)[0] == 0
    code, said, err = minidiff("doctor", out, folder)
    assert code == 2, said + err
    assert "- not learned: of what can be learned from these data it has learned" in said
    code, said, _ = minidiff("doctor", out)  # no data: the model alone
    assert code == 0
    assert said.strip() == "nothing is wrong"


def test_the_command_is_installed():
    """Where the library is installed; somebody may run the tests with the checkout on the path alone."""
    try:
        metadata.distribution("minidiff")
    except metadata.PackageNotFoundError:
        pytest.skip("minidiff is not installed, it is on the path")
    command = [str(Path(sys.executable).with_name("minidiff")), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("sample", "train", "evaluate"))


def test_the_version(minidiff):
    assert minidiff("--version") == (0, f"minidiff {md.__version__}\n", "")


def test_batch_size_rate_and_saves_are_as_asked(minidiff, folder, tmp_path, monkeypatch):
    asked = {}

    def fit(recipe, output, **options):
        asked.update(options, batch_size=recipe.batch_size, lr=recipe.lr, net=recipe.model.net.config)
        return iter(())

    monkeypatch.setattr("minidiff.fit.fit", fit)
    code, _, err = minidiff(
        "train", folder, "-o", tmp_path / "run", "--size", 16,
        "--batch-size", 1, "--lr", 0.002, "--save-every", 7, "--width", 32,
    )  # fmt: skip
    assert code == 0, err
    assert (asked["batch_size"], asked["lr"], asked["save_every"]) == (1, 0.002, 7)
    assert asked["net"]["width"] == 32


def test_a_batch_larger_than_the_data_is_refused(minidiff, folder, tmp_path):
    code, _, err = minidiff("train", folder, "-o", tmp_path / "run", "--size", 16, "--batch-size", 9)
    assert code == 1
    assert "batch size 9 does not fit 2 images" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "options", [("--batch-size", 4), ("--lr", 0.1), ("--width", 32), ("--resume",), ("--from", "critters")]
)
def test_what_a_helper_does_not_take_is_refused(minidiff, tmp_path, options):
    code, _, err = minidiff("train", "critters-clip", "-o", tmp_path / "run", *options)
    assert code == 1
    assert "critters-clip takes none of --resume" in err
    assert options[0] in err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("always")
def test_a_folder_is_evaluated_on_what_was_held_back(minidiff, tmp_path):
    for split, n in (("train", 8), ("test", 40)):
        for i in range(n):
            place = tmp_path / "data" / split / ("red" if i % 2 else "blue")
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (255 * (i % 2), i, 255 * (1 - i % 2))).save(place / f"{i}.png")
    out = tmp_path / "run"
    assert minidiff("train", tmp_path / "data", "-o", out, "--steps", 2, "--size", 16, "--width", 32)[0] == 0
    code, said, err = minidiff("evaluate", out, tmp_path / "data", "--steps", 2, "-o", tmp_path / "s.json")
    assert code == 0, err
    assert "squared error of x0, floor" in said
    assert err == "warning: a Fréchet distance of 40 samples in 128 dimensions\n"
    assert json.loads((tmp_path / "s.json").read_text())["squared error of x0, model"]["n"] == 40
    code, _, err = minidiff("evaluate", out)
    assert (code, err) == (
        1,
        "minidiff: its words do not tell what it draws: say so, with a recipe or a folder\n",
    )


@pytest.mark.filterwarnings("ignore:a Fréchet distance of 40 samples")
def test_pictures_that_are_no_squares_are_trained_drawn_and_scored(minidiff, tmp_path):
    """Height x width, all the way: from --size to the file."""
    for split, n in (("train", 2), ("test", 40)):
        (tmp_path / "data" / split / "red").mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (96, 48), (6 * i, 0, 0)).save(tmp_path / "data" / split / "red" / f"{i}.png")
    out, data = tmp_path / "run", tmp_path / "data"
    code, _, err = minidiff("train", data, "-o", out, "--steps", 1, "--width", 32, "--size", "48x96")
    assert code == 0, err
    assert md.Diffusion.from_pretrained(out).shape == (3, 48, 96)
    with Image.open(out / "samples" / "step_000001.png") as grid:  # of one prompt, eight samples
        assert grid.size == (8 * 98 - 2, 48)
    file = tmp_path / "red.png"
    assert minidiff("sample", "red", "--model", out, "--steps", 1, "--scale", 1, "-o", file)[0] == 0
    with Image.open(file) as picture:
        assert picture.size == (96, 48)
    code, said, err = minidiff("evaluate", out, data, "--steps", 1)
    assert code == 0, err
    assert "Fréchet distance" in said
