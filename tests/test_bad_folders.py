"""Folders that are damaged, hostile or careless, at the doors of the command.

Each fault stands for its kind. A command that meets one ends within seconds, without a gigabyte of memory,
with an exit code and a line that names the culprit. It runs nothing of the folder and leaves nothing behind.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import run

import minidiff as md

SECONDS, KILOBYTES = 15, 1_000_000
Damage = Callable[[Path], object]


class Trap:
    """Unpickled, it leaves a file named "ran" in the working folder."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small model with its training state, and three pictures to train on."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("good")
    data = place / "data"
    data.mkdir()
    for color in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), color).save(data / f"{color}.png")
    rows = [f"{color}.png,a {color} square\n" for color in ("red", "green", "blue")]
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    encoder = md.TextEncoder.from_captions(["a red green blue square"], dim=128)
    net = md.UNet(width=32, patch=1, condition_dim=128)
    model = md.Diffusion(net, md.Cosine(), "x0", encoder, shape=(3, 16, 16))
    for step in md.train(model, [(torch.zeros(3, 3, 16, 16), ["a red square"] * 3)], 1, precision="fp32"):
        step.save(place / "model")
        step.ema.save_pretrained(place / "model")
    return place


def files_of(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def guarded(monkeypatch, capsys, tmp_path: Path, says: str, *arguments: object) -> None:
    """Run a command that must fail as the head of this file says."""
    monkeypatch.chdir(tmp_path)
    before = files_of(tmp_path)
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, _, err = run(monkeypatch, capsys, *map(str, arguments))
    assert code == 1, err
    *before_it, line = err.splitlines()
    assert not [text for text in before_it if "Error" in text or text.startswith("minidiff: ")]
    assert line.startswith("minidiff: ")
    assert says in line
    assert len(line) < 600, line
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < KILOBYTES
    assert files_of(tmp_path) == before


# --- the weights of a model ------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def written(content: bytes) -> Damage:
    return lambda file: file.write_bytes(content)


def header(length: int, text: bytes) -> Damage:
    return written(struct.pack("<Q", length) + text)


def changed(change: Callable[[dict], object]) -> Damage:
    """Other tensors in a good file, whose metadata stay."""

    def damage(file: Path) -> None:
        state = load_file(file)
        change(state)
        save_file(state, file, {"training": '{"steps": 1}'})

    return damage


def linked(file: Path) -> None:
    file.unlink()
    file.symlink_to("/etc/hostname")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def torch_saved(file: Path) -> None:
    torch.save({"a": Trap()}, file)


FIRST = "net.first.weight"
HUGE = json.dumps({"a": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}).encode()
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "cut short": (cut, "model.safetensors holds no weights, or is cut short or damaged"),
    "empty": (written(b""), "model.safetensors is empty: copy or download it again"),
    "git-lfs": (written(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
    "pickle": (written(pickle.dumps(Trap())), "is a pickle by that name"),
    "torch.save": (torch_saved, "is a pickle by that name"),
    "random bytes": (written(bytes(range(256)) * 9), "cut short or damaged"),
    "a header of a terabyte": (header(2**40, b"{}"), "cut short or damaged"),
    "a header without end": (header(2**26, b"{" * 2**20), "cut short or damaged"),
    "a header that is no JSON": (header(8, b"not json"), "cut short or damaged"),
    "data beyond the end": (header(len(HUGE), HUGE), "cut short or damaged"),
    "link to another file": (linked, "cut short or damaged"),
    "folder by that name": (a_folder, "model.safetensors missing"),
    "pipe": (a_pipe, "model.safetensors missing"),
    "gone": (Path.unlink, "model.safetensors missing"),
    "a tensor missing": (changed(lambda s: s.pop(FIRST)), f"{FIRST} (32, 3, 3, 3) is missing"),
    "a tensor too many": (
        changed(lambda s: s.update(more=s[FIRST] + 0)),
        "more (32, 3, 3, 3) belongs to not",
    ),
    "another shape": (
        changed(lambda s: s.update({FIRST: torch.zeros(2, 3)})),
        f"{FIRST} is (2, 3), not (32,",
    ),
    "no tensor at all": (changed(dict.clear), "more tensors than the weights' file holds"),
    "NaN": (changed(lambda s: s[FIRST].fill_(torch.nan)), f"no numbers (NaN or infinity), first in {FIRST}"),
    "infinity": (changed(lambda s: s[FIRST][0].fill_(torch.inf)), "take an earlier save"),
}


@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights(fault, good, tmp_path, monkeypatch, capsys):
    damage, says = WEIGHTS[fault]
    shutil.copytree(good / "model", tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    guarded(monkeypatch, capsys, tmp_path, says, "sample", "a red square", "--model", "model", "--steps", 1)


def test_weights_at_the_other_commands(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good / "model", tmp_path / "model")
    cut(tmp_path / "model" / "model.safetensors")
    for command in (["evaluate", "model", good / "data"], ["doctor", "model"]):
        guarded(monkeypatch, capsys, tmp_path, "cut short or damaged", *command)


# --- config.json and the tokenizer -----------------------------------------------------------------


def put(path: str, value: object, file: str = "config.json") -> Damage:
    """Another value in a JSON file; ``path`` is like "net.width"."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        *way, last = path.split(".")
        place = content
        for name in way:
            place = place[name]
        place[last] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def says_file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def runs_code(folder: Path) -> None:
    """A tokenizer whose class comes with the folder."""
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")
    put("auto_map", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_config.json")(folder)
    put("tokenizer_class", "Evil", "tokenizer_config.json")(folder)


def more_words(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"word{i}": 50 + i for i in range(40)}
    file.write_text(json.dumps(content))


NOT_OURS = "config.json is not a minidiff model"
CONFIGS: dict[str, tuple[Damage, str]] = {
    "no JSON": (says_file("config.json", b"{"), NOT_OURS),
    "empty": (says_file("config.json", b""), NOT_OURS),
    "a list": (says_file("config.json", b"[1, 2]"), NOT_OURS),
    "a number": (says_file("config.json", b"7"), NOT_OURS),
    "UTF-16": (says_file("config.json", '{"format": 1}'.encode("utf-16")), NOT_OURS),
    "a thousand brackets": (says_file("config.json", b"[" * 100_000), NOT_OURS),
    "of another library": (says_file("config.json", b'{"model_type": "bert"}'), "'format'"),
    "of another class": (put("model", "DiffusersModel"), "load it with DiffusersModel.from_pretrained"),
    "a network unknown": (put("net.name", "Magic"), "saved with a network of your own, Magic"),
    "an argument unknown": (put("net.magic", 1), "unexpected keyword argument 'magic'"),
    "the network is a list": (put("net", [1]), NOT_OURS),
    "width of 10^9": (put("net.width", 32 * 10**9), "overflowed"),
    "width of 10^7": (
        put("net.width", 32 * 10**6),
        "net.embedding.time.0.weight is (128, 64), not (128000000, 64)",
    ),
    "width of 0": (put("net.width", 0), "width = 0: use at least 32"),
    "width of 64": (put("net.width", 64), "more do not fit"),
    "width of text": (put("net.width", "64"), "width = '64': use a whole number"),
    "blocks of 10^7": (put("net.blocks", 10**7), "more tensors than the weights' file holds"),
    "levels without end": (
        put("net.multipliers", [1] * 100_000),
        "more tensors than the weights' file holds",
    ),
    "a level of 10^9": (
        put("net.multipliers", [1, 1, 10**7]),
        "is (64, 32, 3, 3), not (320000000, 32, 3, 3)",
    ),
    "patch of 10^6": (
        put("net.patch", 10**6),
        "net.first.weight is (32, 3, 3, 3), not (32, 3000000000000, 3, 3)",
    ),
    "shape of 10^6": (put("shape", [3, 10**6, 10**6]), "a sample may hold 67,108,864 numbers at most"),
    "shape of nothing": (put("shape", [3, 0, 16]), "shape: a side = 0: use at least 1"),
    "shape of text": (put("shape", "big"), "shape: a side = 'b': use a whole number"),
    "schedule unknown": (put("schedule.name", "Magic"), "unknown schedule 'Magic'"),
    "schedule out of range": (put("schedule.offset", 9), "offset = 9 is outside [0, 1)"),
    "target unknown": (put("target", "magic"), "unknown target 'magic'"),
    "no encoder": (put("encoder", None), "belongs to nothing, and 36 more do not fit"),
    "vocabulary of 10^10": (put("encoder.model.vocab_size", 10**10), "not (10000000000, 128)"),
    "layers of 10^7": (put("encoder.model.num_hidden_layers", 10**7), "more tensors than the weights' file"),
    "positions of 10^9": (put("encoder.model.max_position_embeddings", 10**9), "not (1000000000, 128)"),
    "an encoder of 10^9": (put("encoder.model.hidden_size", 4 * 10**9), NOT_OURS[:11]),
    "reads 10^9 words": (put("encoder.max_length", 10**9), "max_length = 1000000000: use at most 32"),
    "reads -1 words": (put("encoder.max_length", -1), "max_length = -1: use at least 1"),
    "no text model": (
        put("encoder.model.model_type", "vit"),
        "ViTModel is no text model: it has no table of tokens",
    ),
    "a model unknown": (put("encoder.model.model_type", "magic"), "Unrecognized model identifier: magic"),
    "an encoder unknown": (put("encoder.name", "Magic"), "saved with an encoder of your own, Magic"),
    "a tokenizer with code": (runs_code, "asks to run code that comes with it (auto_map)"),
    "a tokenizer cut short": (says_file("tokenizer.json", b'{"version": "1.0", "mod'), NOT_OURS),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), NOT_OURS),
    "a tokenizer of more words": (more_words, "the tokenizer has 47 tokens, the text model 7: give its own"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_config(fault, good, tmp_path, monkeypatch, capsys):
    damage, says = CONFIGS[fault]
    shutil.copytree(good / "model", tmp_path / "model")
    damage(tmp_path / "model")
    guarded(monkeypatch, capsys, tmp_path, says, "sample", "a red square", "--model", "model", "--steps", 1)


# --- encoders brought along ------------------------------------------------------------------------

ENCODERS: dict[str, tuple[Damage, str]] = {
    "code of the model": (
        lambda f: (
            (
                put("auto_map", {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})(f),
                put("model_type", "evil")(f),
                (f / "evil.py").write_text("open('ran', 'w')\n"),
            )
        ),
        "no text encoder 'clip': ",
    ),
    "weights cut short": (lambda f: cut(f / "model.safetensors"), "cut short or damaged"),
    "a tensor missing": (
        lambda f: changed(lambda s: s.pop("text_model.final_layer_norm.weight"))(f / "model.safetensors"),
        "clip lack text_model.final_layer_norm.weight and 0 more",
    ),
    "a pickle": (
        lambda f: written(pickle.dumps(Trap()))(f / "model.safetensors"),
        "is a pickle by that name",
    ),
    "layers of 10^7": (put("text_config.num_hidden_layers", 10**7), "more tensors than the weights' file"),
    "vocabulary of 10^10": (put("text_config.vocab_size", 10**10), "clip"),
    "no JSON": (says_file("config.json", b"{"), "no text encoder 'clip'"),
}


@pytest.mark.parametrize("fault", ENCODERS)
def test_text_encoder(fault, good, tmp_path, monkeypatch, capsys):
    damage, says = ENCODERS[fault]
    shutil.copytree(md.files.SHIPPED / "critters-clip", tmp_path / "clip")
    damage(tmp_path / "clip")
    call = ("train", good / "data", "-o", "run", "--size", 16, "--steps", 1, "--text-encoder", "clip")
    guarded(monkeypatch, capsys, tmp_path, says, *call)


# --- the state of a run ----------------------------------------------------------------------------

STATES: dict[str, tuple[Damage, str]] = {
    "cut short": (cut, "training.safetensors holds no weights, or is cut short or damaged"),
    "empty": (written(b""), "training.safetensors is empty"),
    "pickle": (written(pickle.dumps(Trap())), "is a pickle by that name"),
    "gone": (Path.unlink, "nothing to resume"),
    "a model, no state": (
        lambda f: shutil.copy(f.parent / "model.safetensors", f),
        "training.safetensors holds no training state",
    ),
    "a weight missing": (changed(lambda s: s.pop(f"model.{FIRST}")), "holds a run of another model"),
    "a moment of another shape": (
        changed(lambda s: s.update({"optimizer.0.exp_avg": torch.zeros(1)})),
        "optimizer.0.exp_avg is (1,), not",
    ),
}


@pytest.mark.parametrize("fault", STATES)
def test_state(fault, good, tmp_path, monkeypatch, capsys):
    damage, says = STATES[fault]
    shutil.copytree(good / "model", tmp_path / "run")
    damage(tmp_path / "run" / "training.safetensors")
    put("net.patch", 1)(tmp_path / "run")
    call = ("train", good / "data", "-o", "run", "--size", 16, "--width", 32, "--steps", 3, "--resume")
    guarded(monkeypatch, capsys, tmp_path, says, *call)


# --- pictures and captions -------------------------------------------------------------------------

HEAD = "file_name,text\n"


def csv_of(text: str, encoding: str = "utf-8") -> Damage:
    return says_file("metadata.csv", text.encode(encoding))


def jsonl(*lines: object) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "metadata.csv").unlink()
        texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / "metadata.jsonl").write_text("\n".join(texts))

    return damage


def picture(make: Damage) -> Damage:
    """One picture, of this kind, is all there is."""

    def damage(folder: Path) -> None:
        make(folder / "one.png")
        csv_of(HEAD + "one.png,a picture\n")(folder)

    return damage


def bomb(path: Path) -> None:
    """A PNG that says it has 40,000 x 40,000 pixels."""
    Image.new("1", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    path.write_bytes(content)


def other(name: str, content: bytes) -> Damage:
    return lambda folder: ((folder / "metadata.csv").unlink(), (folder / name).write_bytes(content))


def link(name: str, place: str = "/etc/hostname") -> Damage:
    def damage(folder: Path) -> None:
        (folder / "metadata.csv").unlink()
        (folder / name).symlink_to(place)

    return damage


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file\n%%EOF\n"
NONE = "not one of 1 pictures could be read"
DATA: dict[str, tuple[Damage, str]] = {
    "a comma in a caption": (csv_of(HEAD + "red.png,red, on black\n"), "line 2: more cells than the head"),
    "an open quote": (csv_of(HEAD + 'red.png,"a red square\n'), "is every quote closed?"),
    "latin-1": (csv_of(HEAD + "red.png,café\n", "latin-1"), "metadata.csv is not in UTF-8 (at byte 26)"),
    "UTF-16": (csv_of(HEAD + "red.png,a\n", "utf-16"), "metadata.csv is not in UTF-8 (at byte 0)"),
    "semicolons": (csv_of("file_name;text\nred.png;a\n"), "line 2: needs file_name and text or caption"),
    "a cell of a megabyte": (csv_of(HEAD + f"red.png,{'a' * 10**6}\n"), "field larger than field limit"),
    "a head alone": (csv_of(HEAD), "metadata.csv lists no pictures"),
    "nothing": (csv_of(""), "metadata.csv lists no pictures"),
    "out of the folder": (csv_of(HEAD + "../../x.png,a\n"), "line 2: '../../x.png' leaves the folder"),
    "an absolute name": (csv_of(HEAD + "/etc/x.png,a\n"), "line 2: '/etc/x.png' leaves the folder"),
    "no name": (csv_of(HEAD + ",a\n"), "line 2: file_name = '' is no name"),
    "no JSON": (jsonl("{"), "metadata.jsonl, line 1: needs file_name and text or caption, has '{'"),
    "a number": (jsonl(7), "line 1: needs file_name and text or caption, has '7'"),
    "brackets": (jsonl("[" * 100_000), "line 1: needs file_name"),
    "a name of null": (jsonl({"file_name": None, "text": "a"}), "file_name = None is no name"),
    "a list of captions": (
        jsonl({"file_name": "red.png", "text": ["a", "b"]}),
        "caption ['a', 'b'] is no text",
    ),
    "a caption of true": (jsonl({"file_name": "red.png", "text": True}), "caption True is no text"),
    "out of it in JSON": (jsonl({"file_name": "../x.png", "text": "a"}), "'../x.png' leaves the folder"),
    "no words": (csv_of(HEAD + "red.png,\n"), "the captions hold no word"),
    "metadata from elsewhere": (link("metadata.jsonl"), "metadata.jsonl is a link that leaves the folder"),
    "a caption from elsewhere": (link("red.txt"), "red.txt is a link that leaves the folder"),
    "a caption in latin-1": (other("red.txt", b"caf\xe9"), "red.txt is not in UTF-8 (at byte 3)"),
    "no captions": (lambda folder: (folder / "metadata.csv").unlink(), "has no captions"),
    "zero bytes": (picture(written(b"")), NONE),
    "no picture": (picture(written(b"not a picture")), NONE),
    "a program for pictures": (picture(written(EPS)), NONE),
    "cut short": (picture(lambda p: (Image.effect_noise((99, 99), 9).save(p), cut(p))), NONE),
    "a bomb": (picture(bomb), NONE),
    "a folder": (picture(Path.mkdir), NONE),
    "not there": (csv_of(HEAD + "gone.png,a\n"), NONE),
    "floats": (
        picture(lambda p: Image.fromarray(np.zeros((9, 9), np.float32)).save(p, "TIFF")),
        "unknown range",
    ),
    "a link out": (picture(lambda p: p.symlink_to("/etc/hostname")), "a link that leaves the folder"),
}


@pytest.mark.parametrize("fault", DATA)
def test_data(fault, good, tmp_path, monkeypatch, capsys):
    damage, says = DATA[fault]
    shutil.copytree(good / "data", tmp_path / "data")
    damage(tmp_path / "data")
    call = ("train", "data", "-o", "run", "--size", 16, "--width", 32, "--steps", 1)
    guarded(monkeypatch, capsys, tmp_path, says, *call)


def test_the_good_ones_are_good(good, tmp_path, monkeypatch, capsys):
    """What the tables damage works as it is; else they would prove nothing."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / "model", "run")
    draw = ("sample", "a red square", "--model", "run", "--steps", "1", "--scale", "1")
    assert run(monkeypatch, capsys, *draw)[0] == 0
    learn = ("train", str(good / "data"), "-o", "run", "--size", "16", "--width", "32", "--steps", "1")
    assert run(monkeypatch, capsys, *learn, "--resume")[0] == 0
