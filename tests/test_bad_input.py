"""Bad input to functions and options: one line that names the value and what to do, before any work is done.

Folders that are damaged or hostile have a table of their own, in test_bad_folders.py.
"""

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from runs import fresh
from test_bad_folders import guarded
from test_cli import run
from texts import model_with, small

import minidiff as md
from minidiff.data import Batches, captioned_folder
from minidiff.device import pick_device
from minidiff.files import SHIPPED

BYTES = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
LEVELS = md.Cosine().levels(2)


@cache
def pipe() -> md.TextToImage:
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=32)
    return md.TextToImage(md.Diffusion(net, md.Cosine(), "x0", small(), shape=(3, 16, 16)))


def draw(**options: object) -> object:
    return pipe()("Hat", **{"steps": 1, **options})  # type: ignore[arg-type]


def learn(batch: object = None, model: object = None, **options: object) -> object:
    batch = torch.zeros(4, 2) if batch is None else batch
    return next(md.train(model or fresh(), [batch], **{"steps": 2, "precision": "fp32", **options}))  # type: ignore


def reads_text() -> md.Diffusion:
    return model_with(small())


def reads_labels() -> md.Diffusion:
    return md.Diffusion(md.MLP(2, 32, 1, condition_dim=8), md.Cosine(), "v", md.LabelEncoder(3, 8))


FUNCTIONS: dict[str, tuple[Callable[[], object], str]] = {
    # networks
    "MLP of no coordinates": (lambda: md.MLP(dim=0), "dim = 0: use at least 1"),
    "MLP of half a width": (lambda: md.MLP(width=2.5), "width = 2.5: use a whole number"),
    "MLP less than flat": (lambda: md.MLP(depth=-1), "depth = -1: use at least 0"),
    "MLP told of nothing": (lambda: md.MLP(condition_dim=-8), "condition_dim = -8: use at least 1"),
    "UNet of no width": (lambda: md.UNet(width=0), "width = 0: use at least 32"),
    "UNet of less": (lambda: md.UNet(width=-32), "width = -32: use at least 32"),
    "UNet of an odd width": (lambda: md.UNet(width=33), "width = 33 is not a multiple of 32"),
    "UNet of text": (lambda: md.UNet(width="64"), "width = '64': use a whole number"),
    "UNet of two levels": (
        lambda: md.UNet(multipliers=(1, 1)),
        "as many as multipliers: give attention=(1,)",
    ),
    "UNet of no level": (lambda: md.UNet(multipliers=(), attention=()), "levels = 0: use at least 1"),
    "UNet of an empty level": (
        lambda: md.UNet(multipliers=(1, 0, 1)),
        "one of multipliers = 0: use at least 1",
    ),
    "UNet of no patch": (lambda: md.UNet(patch=0), "patch = 0: use at least 1"),
    "UNet of no channel": (lambda: md.UNet(channels=0), "channels = 0: use at least 1"),
    "UNet of -1 blocks": (lambda: md.UNet(blocks=-1), "blocks = -1: use at least 0"),
    "UNet that listens to magic": (lambda: md.UNet(conditioning="magic"), "unknown conditioning 'magic'"),
    "DiT of no width": (lambda: md.DiT(width=0), "width = 0: use at least 64"),
    "DiT of no patch": (lambda: md.DiT(patch=0), "patch = 0: use at least 1"),
    "DiT of half a block": (lambda: md.DiT(depth=0.5), "depth = 0.5: use a whole number"),
    "pictures of 28": (
        lambda: md.UNet(1)(torch.zeros(1, 1, 28, 28), torch.ones(1)),
        "multiples of 16: pad to 32x32, or give the network a smaller patch or fewer levels",
    ),
    "pictures of 30": (lambda: md.DiT(1)(torch.zeros(1, 1, 30, 32), torch.ones(1)), "4: pad to 32x32, or"),
    "colours for grey": (lambda: md.UNet(1)(torch.zeros(1, 3, 16, 16), torch.ones(1)), "takes (B, 1, H, W)"),
    "points of 3": (lambda: md.MLP(2)(torch.zeros(1, 3), torch.ones(1)), "this network takes (B, 2)"),
    # models
    "a target unknown": (lambda: md.Diffusion(md.MLP(), md.Cosine(), "noise"), "unknown target 'noise'"),
    "no side": (lambda: md.Diffusion(md.MLP(), md.Cosine(), "v", shape=(3, 0)), "a side = 0: use at least 1"),
    "half a side": (
        lambda: md.Diffusion(md.MLP(), md.Cosine(), "v", shape=(3, 1.5)),
        "1.5: use a whole number",
    ),
    "too much": (
        lambda: md.Diffusion(md.MLP(), md.Cosine(), "v", shape=(10**9,)),
        "67,108,864 numbers at most",
    ),
    "no class": (lambda: md.LabelEncoder(0), "num_classes = 0: use at least 1"),
    "half a class": (lambda: md.LabelEncoder(2.5), "num_classes = 2.5: use a whole number"),
    "label beyond": (lambda: reads_labels().encode([3]), "label 3: give whole numbers from 0 to 2"),
    "label in words": (lambda: reads_labels().encode(["a cat"]), "label 'a cat': give whole numbers"),
    "words as one": (lambda: reads_text().encode("a cat"), "captions = 'a cat' is one string: give a list"),
    "no words": (lambda: reads_text().encode([]), "no captions: give a list with at least one"),
    "reads nothing": (lambda: md.TextEncoder.from_captions([""]), "the captions hold no word"),
    "reads -1": (
        lambda: md.TextEncoder.from_captions(["a"], max_length=-1),
        "max_length = -1: use at least 1",
    ),
    "no model": (
        lambda: md.Diffusion.from_pretrained("nowhere"),
        "no model 'nowhere': not a folder, not shipped",
    ),
    "no device": (lambda: md.Diffusion.from_pretrained("critters", "gpu"), "no device 'gpu' here: use '"),
    "no such card": (lambda: pick_device("cuda:99"), "no device 'cuda:99' here: use '"),
    "no place for a CLIP": (lambda: md.CLIP.from_pretrained("critters-clip", "gpu"), "no device 'gpu' here"),
    # schedules and samplers
    "half a step": (lambda: md.Cosine().levels(2.5), "levels: n = 2.5: use a whole number"),
    "no step": (lambda: md.Cosine().levels(0), "levels: n = 0: use at least 1"),
    "a million steps": (lambda: md.Cosine().levels(10**6), "levels: n = 1000000: use at most 100000"),
    "a chain of 10^10": (lambda: md.Linear(steps=10**10), "steps = 10000000000: use at most 100000"),
    "half a chain": (lambda: md.Linear(steps=2.5), "steps = 2.5: use a whole number"),  # type: ignore[arg-type]
    "a table of 10^10": (
        lambda: md.Cosine().to_diffusers("v", 10**10),
        "steps = 10000000000: use at most 100000",
    ),
    "a spacing unknown": (lambda: md.Cosine().levels(4, "log"), "unknown spacing 'log'"),
    "a time beyond": (lambda: md.Cosine()(1.5), "t = 1.5 is outside [0, 1]"),
    "half a seed": (lambda: md.generators(1.5, 2), "seed = 1.5: use a whole number"),
    "a seed below": (lambda: md.generators(-1, 2), "seed = -1: use at least 0"),
    "a seed beyond": (lambda: md.generators(2**64 - 1, 2), "use at most 9223372036854775806"),
    "noise nowhere": (lambda: md.noise((1, 2), LEVELS[0], device="gpu"), "no device 'gpu' here"),
    "gradients": (
        lambda: next(md.ddim(fresh("v").denoise, torch.zeros(1, 2, requires_grad=True), LEVELS)),
        "x requires gradients, and a sampler keeps none: give x.detach()",
    ),
    "a model for a function": (
        lambda: next(md.heun(fresh("v"), torch.zeros(1, 2), LEVELS)),
        "a sampler takes a function, not a Diffusion: give model.denoise",
    ),
    "levels upside down": (
        lambda: next(md.ddim(fresh("v").denoise, torch.zeros(1, 2), LEVELS[::-1])),
        "noise must fall from level to level",
    ),
    "one level": (
        lambda: next(md.ddim(fresh("v").denoise, torch.zeros(1, 2), LEVELS[:1])),
        "1 levels make no",
    ),
    "eta of 2": (
        lambda: next(md.ddim(fresh("v").denoise, torch.zeros(1, 2), LEVELS, eta=2)),
        "eta = 2 is outs",
    ),
    # the pipeline
    "a side for a size": (lambda: draw(size=64), "size = 64: give (height, width)"),
    "three sides": (lambda: draw(size=(3, 16, 16)), "size = (3, 16, 16): give (height, width)"),
    "a size of nothing": (lambda: draw(size=(0, 0)), "size = 0: use at least 1"),
    "a size in between": (lambda: draw(size=(16, 18)), "multiples of 4: pad to 16x20"),
    "half a picture": (lambda: draw(num_images=0.5), "num_images = 0.5: use a whole number"),
    "no picture": (lambda: draw(num_images=0), "num_images = 0: use at least 1"),
    "steps in words": (lambda: draw(steps="ten"), "steps = 'ten': use a whole number"),
    "half a seed of pictures": (lambda: draw(seed=1.5), "seed = 1.5: use a whole number"),
    "a seed too far": (lambda: draw(seed=2**63 - 1, num_images=2), "use at most 9223372036854775806"),
    "a batch of none": (lambda: draw(batch_size=0), "batch_size = 0: use at least 1"),
    "guidance of NaN": (lambda: draw(guidance=float("nan")), "guidance = nan: give a finite number"),
    "a sampler unknown": (lambda: draw(sampler="magic"), "unknown sampler 'magic'"),
    "a number to draw": (lambda: pipe()(7), "prompt 7 is no string"),
    "nothing to draw": (lambda: pipe()([]), "no prompt: give a string"),
    "no text to follow": (lambda: md.TextToImage(fresh("v")), "this model has no text encoder"),
    # folders
    "a size of three": (
        lambda: captioned_folder(".", (3, 16, 16)),
        "size = (3, 16, 16): give one number, or",
    ),  # type: ignore[arg-type]
    "a width of nothing": (lambda: captioned_folder(".", (16, 0)), "size = 16x0: use a multiple of 1 for"),
    "half a height": (lambda: captioned_folder(".", (1.5, 16)), "size = 1.5: use a whole number"),  # type: ignore[arg-type]
    # training
    "no training": (lambda: learn(steps=0), "steps = 0: use at least 1"),
    "half a training step": (lambda: learn(steps=1.5), "steps = 1.5: use a whole number"),
    "a rate of NaN": (lambda: learn(lr=float("nan")), "lr = nan: it must be positive"),
    "a rate without end": (lambda: learn(lr=float("inf")), "lr = inf: it must be positive and finite"),
    "a training seed of 1.5": (lambda: learn(seed=1.5), "seed = 1.5: use a whole number"),
    "fp16": (lambda: learn(precision="fp16"), "unknown precision 'fp16'"),
    "pictures of bytes": (lambda: learn(BYTES), "not floats: bring images to [-1, 1] first"),
    "labels for text": (
        lambda: learn((torch.zeros(2, 2), [0, 1]), reads_text()),
        "for labels there is LabelE",
    ),
    "a tensor for text": (
        lambda: learn({"image": torch.zeros(2, 2), "label": torch.tensor([0, 1])}, reads_text()),
        "a tensor (2,) of torch.int64 is no text, which this model reads: for labels give Diffusion(",
    ),
    "text for labels": (lambda: learn((torch.zeros(1, 2), ["a"]), reads_labels()), "label 'a': give whole"),
    "nothing to learn from": (lambda: next(md.train(fresh(), [], 2)), "batches is empty"),
    "nothing to go on from": (lambda: learn(resume="nowhere"), "nothing to resume: nowhere"),
    "a batch beyond the data": (lambda: Batches(BYTES, ["a"] * 4, 5), "batch size 5 does not fit 4 images"),
    "a batch of half": (lambda: Batches(BYTES, ["a"] * 4, 1.5), "batch_size = 1.5: use a whole number"),
    "a shuffle of -1": (lambda: Batches(BYTES, ["a"] * 4, 2, seed=-1), "seed = -1: use at least 0"),
    "NaN in a batch": (lambda: learn(torch.full((4, 2), torch.nan)), "the batch holds such numbers"),
    "a rate of 10^30": (
        lambda: list(md.train(fresh(), [torch.ones(4, 2)], 9, lr=1e30, warmup=0, precision="fp32")),
        "or its gradient is no number, at learning rate 1e+30: a smaller lr may help",
    ),
    "a weight unknown": (lambda: md.loss(fresh(), torch.zeros(2, 2), weighting="magic"), "unknown weighting"),
    "a chance of 2": (
        lambda: md.loss(fresh(), torch.zeros(2, 2), condition_dropout=2.0),
        "is a chance: give it",
    ),
}


@pytest.mark.parametrize("fault", FUNCTIONS)
def test_function(fault):
    call, says = FUNCTIONS[fault]
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)


BIG = 18446744073709551615
HERE = ("train", "critters", "-o", "run")
FURTHER = (*HERE, "--from", "critters")
OPTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "a seed beyond": (("sample", "a cat", "--seed", BIG), f"seed = {BIG}: use at most 9223372036854775807"),
    "a seed too large": ((*HERE, "--seed", BIG), f"seed = {BIG}: use at most"),
    "a million pictures": (
        ("sample", "a cat", "--num-images", 10**6),
        "--num-images 1000000 at --scale 4 is more",
    ),
    "a scale of 10^6": (
        ("sample", "a cat", "--scale", 10**6),
        "at --scale 1000000 is more than one file can hold",
    ),
    "10^8 steps": (("sample", "a cat", "--steps", 10**8), "levels: n = 100000000: use at most 100000"),
    "10^9 drawings": (
        (*HERE, "--images", 10**9),
        "1,000,000,000 pictures take 12,288 GB, more than the memory",
    ),
    "10^9 sounds": (
        ("train", "tones", "-o", "run", "--images", 10**9),
        "1,000,000,000 sounds take 16,384 GB, more than the memory there is: use at most",
    ),
    "no ending": (("sample", "a cat", "-o", "cat"), "--output cat: no ending is no image format; use .png"),
    "a text file": (
        ("sample", "a cat", "-o", "cat.txt"),
        "--output cat.txt: .txt is no image format; use .png",
    ),
    "nothing there": (("sample", "a cat", "--model", "nowhere"), "no model 'nowhere'"),
    "a sampler unknown": (("sample", "a cat", "--sampler", "magic"), "unknown sampler 'magic'"),
    "guidance of infinity": (
        ("sample", "a cat", "--guidance", "inf"),
        "guidance = inf: give a finite number",
    ),
    "a size in between": ((*HERE, "--size", 50), "size = 50: use a multiple of 16"),
    "half a size": ((*HERE, "--size", "48x"), "--size 48x: give a number such as 64, or height x width such"),
    "three sizes": (
        (*HERE, "--size", "48x96x3"),
        "--size 48x96x3: give a number such as 64, or height x width",
    ),
    "a size in words": ((*HERE, "--size", "big"), "--size big: give a number such as 64, or height x width"),
    "no height": (
        (*HERE, "--size", "0x96"),
        "size = 0x96: use a multiple of 16 for each side, such as 16x96",
    ),
    "a height in between": (
        (*HERE, "--size", "47x96"),
        "size = 47x96: use a multiple of 16 for each side, such as 48x96",
    ),
    "wide critters": (
        (*HERE, "--size", "48x96"),
        "size = 48x96: critters are drawn in squares: use 48 or 96",
    ),
    "a size below": ((*HERE, "--size", -16), "size = -16: use a multiple of 16"),
    "a width in between": ((*HERE, "--width", 50), "width = 50 is not a multiple of 32"),
    "a width of nothing": ((*HERE, "--width", 0), "width = 0: use at least 32"),
    "no recipe": (("train", "nothing", "-o", "run"), "'nothing' is no recipe"),
    "nothing to resume": ((*HERE, "--resume"), "nothing to resume: run"),
    "words for conditioning": ((*HERE, "--conditioning", "words"), "--conditioning words: choose one of"),
    "a rate of NaN": ((*HERE, "--lr", "nan"), "lr = nan: it must be positive"),
    "a file for a folder": (("train", "critters", "-o", __file__), "is no folder: choose another name"),
    "no place for a run": (("train", "critters", "-o", "/proc/none/run"), "/proc/none/run cannot be written"),
    "no place for a picture": (("sample", "a cat", "-o", "/proc/none/a.png"), "none/a.png cannot be written"),
    "no place for scores": (("evaluate", "critters", "-o", "/proc/none/a.json"), "a.json cannot be written"),
    "a folder for scores": (("evaluate", "critters", "-o", "/tmp"), "/tmp is a folder: name a file"),
    "a model there": (
        ("train", "critters", "-o", SHIPPED / "critters"),
        "critters holds a model: choose another",
    ),
    "a rate of 0": ((*HERE, "--lr", 0), "lr = 0: it must be positive"),
    "nothing to start from": ((*HERE, "--from", "nowhere"), "no model 'nowhere'"),
    "another size": (
        (*FURTHER, "--size", 32),
        "size = 32x32: the model to start from has 64x64: leave it out, or",
    ),
    "another width": (
        (*FURTHER, "--width", 32),
        "width = 32: the model to start from has 64: leave it out, or",
    ),
    "other conditioning": (
        (*FURTHER, "--conditioning", "pooled"),
        "conditioning = pooled: the model to start from has both: leave it out",
    ),
    "another encoder": (
        (*FURTHER, "--text-encoder", "critters-clip"),
        "the model to start from brings its own text encoder: leave the other out",
    ),
    "sounds to draw": (
        (*HERE, "--from", "tones"),
        "makes samples of shape (1, 8192), these data have (3, 64, 6",
    ),
    "grey for colours": (
        (*HERE, "--from", "fashion-mnist"),
        "(1, 32, 32), these data have (3, 32, 32): start",
    ),
    "no encoder there": (
        (*HERE, "--text-encoder", "./no"),
        "no text encoder './no': there is no such folder",
    ),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_option(fault, tmp_path, monkeypatch, capsys):
    arguments, says = OPTIONS[fault]
    guarded(monkeypatch, capsys, tmp_path, says, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "a cat", "--steps", "0"),
        ("sample", "a cat", "--num-images", "-1"),
        ("sample", "a cat", "--seed", "1.5"),
        ("sample", "a cat", "--seed", "-1"),
        ("sample", "a cat", "--scale", "0"),
        ("sample",),
        ("train", "critters"),
        (*HERE, "--steps", "0"),
        (*HERE, "--batch-size", "0"),
        (*HERE, "--images", "1"),
        ("evaluate", "critters", "--prompts", "1"),
        ("doctor", "critters", "--samples", "1"),
        ("doctor", "critters", "--samples", "1000000"),
        ("magic",),
    ],
)
def test_usage(arguments, tmp_path, monkeypatch, capsys):
    """What the parser of the command refuses: its own exit code, and nothing is loaded or written."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert "Error" in err
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_other_kinds_are_whole_too():
    """NumPy's and torch's whole numbers are as good as Python's."""
    (one,), (two,) = md.generators(np.int64(3), 1), md.generators(3, 1)
    assert torch.equal(torch.randn(3, generator=one), torch.randn(3, generator=two))
    assert len(md.Cosine().levels(torch.tensor(4))) == len(md.Cosine().levels(np.uint8(4))) == 5
    assert torch.equal(draw(seed=np.int32(7)).tensors, draw(seed=7).tensors)


def test_a_model_of_the_noise_draws_from_a_schedule_that_ends_in_noise():
    """At alpha = 0 the noise says nothing about x0: the pipeline starts just below."""
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=32)
    model = md.Diffusion(net, md.Cosine(), "eps", small(), shape=(3, 16, 16))
    assert md.TextToImage(model)("Hat", steps=3).tensors.isfinite().all()
