"""In other people's programs: their precision, their accelerate, their workers, their compilers."""

import multiprocessing
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from networks import NETWORKS, SHAPES, batch, condition
from runs import data, fresh, weights_of
from texts import model_with, small
from torch.utils.data import DataLoader, TensorDataset

import minidiff as md
from minidiff import fit
from minidiff.data import Batches
from minidiff.recipes import Recipe, Source


def pipe() -> md.TextToImage:
    torch.manual_seed(1)
    net = md.UNet(width=32, multipliers=(1,), attention=(0,), condition_dim=32, positions=True)
    torch.nn.init.normal_(net.last.weight, std=0.05)
    return md.TextToImage(md.Diffusion(net, md.Cosine(), "x0", small(), shape=(3, 16, 16)))


# --- precision -------------------------------------------------------------------------------------


def test_fp32_is_fp32_whatever_accelerate_was_told(monkeypatch):
    """`accelerate config` sets this variable for every program."""
    plain, told = fresh("v"), fresh("v")
    for step in md.train(plain, [data(8, 2).float()], 3, precision="fp32"):
        pass
    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for step in md.train(told, [data(8, 2).float()], 3, precision="fp32"):
        pass
    assert torch.equal(weights_of(plain), weights_of(told))


@pytest.mark.parametrize("loader", [False, True])
def test_an_accelerator_of_the_callers_own_comes_before_or_after(loader):
    points = data(8, 2).float()
    batches = DataLoader(TensorDataset(points), 8) if loader else [points]
    AcceleratorState._reset_state()
    before = fresh("v")
    list(md.train(before, batches, 2, precision="fp32"))
    theirs = Accelerator(cpu=True, mixed_precision="bf16")  # was "already initialized" with another
    assert theirs.mixed_precision == "bf16"
    after = fresh("v")
    list(md.train(after, batches, 2, precision="fp32"))
    assert torch.equal(weights_of(before), weights_of(after))
    AcceleratorState._reset_state()


def test_the_default_dtype_does_not_change_the_picture(tmp_path):
    pipe().model.save_pretrained(tmp_path)
    plain = md.TextToImage.from_pretrained(tmp_path, "cpu")("a cat", steps=3, seed=5).tensors
    torch.set_default_dtype(torch.float64)
    try:
        again = md.TextToImage.from_pretrained(tmp_path, "cpu")("a cat", steps=3, seed=5).tensors
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype,close", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-3)])
def test_a_model_of_another_dtype_draws_nearly_the_same(dtype, close):
    plain = pipe()("a cat in a top hat", steps=3, seed=5).tensors
    other = pipe()
    other.model.to(dtype)
    drawn = other("a cat in a top hat", steps=3, seed=5).tensors
    assert drawn.dtype == torch.float32
    assert (drawn - plain).abs().mean() < close


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_computes_in_half(name):
    net = NETWORKS[name]().to(torch.bfloat16)
    model = md.Diffusion(net, md.Cosine(), "v", shape=SHAPES[name])
    x_t, t = batch(name)
    guess = model.denoise(x_t, md.Cosine()(t), condition())
    assert guess.x0.dtype == x_t.dtype
    assert guess.x0.isfinite().all()


# --- workers ---------------------------------------------------------------------------------------


def items() -> dict[str, object]:
    return {
        "model": pipe().model,
        "pipeline": pipe(),
        "average": md.EMA(model_with(small())),
        "labels": md.LabelEncoder(3, 8),
        "batches": Batches(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), ["a", "b", "c", "d"], 2),
    }


@pytest.mark.parametrize("name", ["model", "pipeline", "average", "labels", "batches"])
def test_it_can_be_pickled(name):
    thing = items()[name]
    again = pickle.loads(pickle.dumps(thing))
    if name == "batches":
        assert again.number(3)[1] == thing.number(3)[1]
    elif name == "pipeline":
        assert torch.equal(again("Hat", steps=2).tensors, thing("Hat", steps=2).tensors)
    else:
        ours, theirs = thing.state_dict(), again.state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def seen_there(batches: Batches) -> list[str]:
    return batches.number(5)[1]


def test_a_spawned_worker_reads_the_same_batches():
    """As on Windows and macOS, where no process is forked."""
    batches = items()["batches"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(seen_there, (batches,)) == seen_there(batches)


# --- compilers -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:nothing to follow")
def test_a_compiled_network_trains_in_a_folder_and_goes_on(tmp_path):
    """Wrapped by torch.compile or not: one kind of network, whose run resumes, and one folder."""

    def recipe(compiled: bool, steps: int) -> Recipe:
        model = pipe().model
        if compiled:
            model.net = torch.compile(model.net, backend="eager")
        pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
        source = Source(pictures, ["Hat"] * 4)
        return Recipe(lambda: source, lambda recipe: model, lambda *a, **k: {}, ["Hat"], steps, 4)

    for resume, compiled, steps in ((False, True, 1), (True, True, 2), (True, False, 3)):
        made = [s.index for s in fit.fit(recipe(compiled, steps), tmp_path, resume=resume, sample_every=9)]
        assert made == [steps - 1]
    assert type(md.Diffusion.from_pretrained(tmp_path).net) is md.UNet


# --- one process at a time -------------------------------------------------------------------------


def test_a_second_run_into_a_folder_is_refused(tmp_path):
    def run() -> object:
        source = Source(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), ["Hat"] * 4)
        recipe = Recipe(lambda: source, lambda recipe: pipe().model, lambda *a, **k: {}, ["Hat"], 9, 4)
        return fit.fit(recipe, tmp_path)

    first = run()
    next(first)
    with pytest.raises(FileExistsError, match="another process trains into .*: choose another folder"):
        run()
    first.close()
    next(run())  # the first has let go
