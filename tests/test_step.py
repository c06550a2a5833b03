"""A training step is a function of tensors, and what is recorded of one does what it does."""

import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from runs import data, fresh, generator, weights_of, words
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import minidiff as md
from minidiff.critters import Critters, vocabulary
from minidiff.data import Batches
from minidiff.loss import draw, loss
from minidiff.step import MOST_GRAPHS, WARM_UP, Graphed, TrainingStep


class Recorder:
    """In place of a CUDA graph, which runs a function again on what lies in the same memory."""

    def __init__(self):
        self.recorded = 0

    def __call__(self, function):
        self.recorded += 1
        return function


def call(function):
    return function()


def graphed(function, recorder) -> Graphed:
    return Graphed(function, warm=call, record=recorder)


def step_of(model: md.Diffusion, in_memory: bool) -> TrainingStep:
    lr = torch.tensor(0.0) if in_memory else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), foreach=False)

    def objective(x0: Tensor, condition: md.Condition | None, draws) -> Tensor:
        return loss(model, x0, condition, draws=draws)

    ema = md.EMA(model, 0.9)
    return TrainingStep(objective, model, ema, optimizer, Tensor.backward, nullcontext, 1.0, in_memory)


def arguments(model: md.Diffusion, k: int, n: int = 8):
    x0 = data(n, 2, seed=k).float()
    condition = md.Condition(
        data(n, 3, 4, seed=k).float(), torch.ones(n, 3).bool(), data(n, 4, seed=k).float()
    )
    return x0, condition, draw(model.schedule, x0, 0.3, generator(k))


def run(steps: int, in_memory: bool, wrap=lambda step: step) -> tuple[list[float], Tensor, Tensor]:
    model = fresh(condition_dim=4)
    step = step_of(model, in_memory)
    update, losses = wrap(step), []
    for k in range(steps):
        step.prepare(0.01 / (1 + k))  # another rate each time, as a schedule gives it
        losses.append(update(*arguments(model, k)).item())
    return losses, weights_of(model), weights_of(step.ema)


# --- the step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_step_that_is_no_number_is_not_taken(in_memory):
    """Neither here nor where nobody can look, as in a recorded step: the optimizer is told in memory."""
    model = fresh(condition_dim=4)
    step = step_of(model, in_memory)
    if in_memory:
        rate = torch.tensor(0.0)
        step.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        step.optimizer.found_inf = step.skip
    step.prepare(0.01)
    step(*arguments(model, 0))
    assert step.good == 1
    before, average = weights_of(model), weights_of(step.ema)
    x0, condition, draws = arguments(model, 1)
    x0[0, 0] = torch.nan
    step.prepare(0.01)
    step(x0, condition, draws)
    assert step.good == 0
    assert torch.equal(weights_of(model), before)
    assert weights_of(step.ema).isfinite().all()
    assert in_memory or torch.equal(weights_of(step.ema), average)


def test_chance_may_be_drawn_before():
    """The loss of some draws is the loss that draws them: times, noise, and whose condition is dropped."""
    model, x0, c = fresh(condition_dim=1), data(500, 2).float(), words(500)
    torch.nn.init.normal_(model.net.last.weight)
    drawn = draw(model.schedule, x0, 0.5, generator(5))
    assert 0.4 < drawn.drop.float().mean() < 0.6
    expected = md.loss(model, x0, c, condition_dropout=0.5, generator=generator(5))
    assert torch.equal(md.loss(model, x0, c, draws=drawn), expected)
    assert not torch.equal(md.loss(model, x0, c, draws=drawn._replace(drop=None)), expected)
    with pytest.raises(ValueError, match="condition_dropout = 2 is a chance"):
        draw(model.schedule, x0, 2)


def test_rate_and_share_may_lie_in_memory():
    """As a graph needs them: tensors that are written before each step, in place of numbers."""
    (losses, *weights), (others, *other_weights) = run(8, False), run(8, True)
    assert losses == pytest.approx(others, rel=1e-6)
    torch.testing.assert_close(weights, other_weights, rtol=1e-4, atol=1e-5)


def test_the_loop_is_this_step():
    """What md.train does with a batch is one TrainingStep: the same weights after four."""
    batches = [data(8, 2, seed=k).float() for k in range(4)]
    looped, model = fresh(), fresh()
    rates = [s.lr for s in md.train(looped, batches, 4, precision="fp32", weight_decay=0.01, seed=3)]
    step = step_of(model, in_memory=False)
    for k, (x0, rate) in enumerate(zip(batches, rates, strict=True)):
        chance = torch.Generator().manual_seed((3 * 1_000_003 + k) * 1_009)
        step.prepare(rate)
        step(x0, None, draw(model.schedule, x0, 0.1, chance))
    torch.testing.assert_close(weights_of(model), weights_of(looped), rtol=1e-6, atol=1e-7)


# --- recorded ---------------------------------------------------------------------------------------


def test_a_recorded_step_does_what_the_step_does():
    """It is recorded once, after the warm-up; each replay sees its own batch, chance, rate and share."""
    recorder = Recorder()
    expected = run(WARM_UP + 6, True)
    found = run(WARM_UP + 6, True, lambda step: graphed(step, recorder))
    assert recorder.recorded == 1
    for here, there in zip(expected, found, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)
    assert len(set(found[0])) == len(found[0])


def test_each_shape_has_a_graph_of_its_own_up_to_a_number():
    recorder = Recorder()
    double = graphed(lambda x, y: 2 * x if y is None else x + y, recorder)
    for n in (*range(1, MOST_GRAPHS + 3), 1):
        for k in range(WARM_UP + 2):
            x = torch.full((n,), float(k))
            assert torch.equal(double(x, None), 2 * x)
    assert recorder.recorded == MOST_GRAPHS
    assert torch.equal(
        double(torch.ones(1), torch.ones(1)), torch.full((1,), 2.0)
    )  # not the graph of one alone


def test_what_it_returns_is_not_overwritten_by_the_next_call():
    place = torch.zeros(())
    count = graphed(lambda x: place.copy_(x.sum()), Recorder())
    results = [count(torch.tensor([float(k)])) for k in range(WARM_UP + 4)]
    assert [r.item() for r in results[WARM_UP:]] == [float(k) for k in range(WARM_UP, WARM_UP + 4)]


def test_what_cannot_be_recorded_runs_as_it_is_with_one_warning():
    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing\nand many more lines")

    with pytest.warns(
        UserWarning, match="without a CUDA graph: operation not permitted when stream is"
    ) as caught:
        found = run(WARM_UP + 4, True, lambda step: graphed(step, refuse))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    for here, there in zip(run(WARM_UP + 4, True), found, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


class Unrecordable(TorchDispatchMode):
    """Refuses what a graph cannot hold: to bring something to the device, or to ask it for a number."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        out = function(*arguments, **keywords)
        if function.overloadpacket is torch.ops.aten._local_scalar_dense:
            raise RuntimeError("waits for the device")
        given = [a for a in tree_leaves((arguments, keywords)) if isinstance(a, Tensor)]
        brought = any(a.device.type == "cpu" and a.ndim for a in given)
        if brought and any(isinstance(o, Tensor) and o.device.type == "meta" for o in tree_leaves(out)):
            raise RuntimeError(f"{function} brings something to the device")
        return out


def recordable_models() -> dict[str, md.Diffusion]:
    words = [*vocabulary(2), ","]
    read_both_ways = md.TextEncoder.from_captions(words, dim=32, layers=1)
    frozen = md.TextEncoder.from_pretrained("critters-clip")
    labels = md.LabelEncoder(3, 32)
    placed = md.UNet(3, 64, patch=4, condition_dim=32, positions=True)
    plain = md.UNet(3, 64, patch=4, condition_dim=frozen.dim)
    return {
        "captions, learned": md.Diffusion(placed, md.Cosine(), "x0", read_both_ways),
        "captions, frozen": md.Diffusion(plain, md.Flow(), "flow", frozen),
        "labels": md.Diffusion(md.DiT(3, 64, 2, condition_dim=32), md.Karras(), "edm", labels),
        "no condition": md.Diffusion(md.MLP(8, 32), md.Linear(), "v"),
    }


@pytest.mark.parametrize("name", ["captions, learned", "captions, frozen", "labels", "no condition"])
def test_nothing_in_a_step_waits_for_the_device_or_brings_something_there(name, monkeypatch):
    """On torch's device without memory, "meta", where each operation is only looked at."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: nullcontext())  # unknown to "meta"
    # transformers looks whether a mask hides anything, but not while a graph is recorded.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    model = recordable_models()[name].to("meta").requires_grad_(True)
    if getattr(model.encoder, "frozen", False):
        model.encoder.requires_grad_(False)
    condition = {"labels": torch.zeros(4, dtype=torch.long), "no condition": None}.get(
        name, torch.ones(4, 20, dtype=torch.long)
    )
    x0 = torch.randn(4, *((8,) if name == "no condition" else (3, 32, 32)))
    drawn = draw(model.schedule, x0, 0.1)
    x0, condition, drawn = tree_map(
        lambda part: part.to("meta") if isinstance(part, Tensor) else part, (x0, condition, drawn)
    )
    with Unrecordable():
        loss(model, x0, condition, weighting="snr_plus_one", draws=drawn).backward()
    assert all(p.grad is not None for p in model.net.parameters() if p.requires_grad)
    ema = md.EMA(model)
    with Unrecordable():
        ema.mix(model, torch.ones((), device="meta"))


def test_that_test_sees_what_cannot_be_recorded():
    x = torch.ones(3, device="meta")
    with pytest.raises(RuntimeError, match="brings something"), Unrecordable():
        x + torch.ones(3).to(x)
    with pytest.raises(RuntimeError), Unrecordable():
        bool(x.any())


# --- batches made ahead -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_read_by_other_processes_are_those_of_the_batches(workers):
    """Three epochs, from the second batch on, every second one, as process 1 of 2 takes them."""
    drawings = Critters(20, 16)
    images = drawings.images()
    text = md.TextEncoder.from_captions([*vocabulary(), ","], dim=32, layers=1)

    def batches() -> Batches:
        return Batches(images, drawings.caption, 6, seed=4, start=2)

    numbers = itertools.islice(itertools.count(1, 2), 4)
    found = list(batches().ahead(text.ids, numbers, workers))
    expected = list(itertools.islice(batches(), 1, 9, 2))
    assert len(found) == len(expected) == 4
    for (x, ids), (x0, captions) in zip(found, expected, strict=True):
        assert torch.equal(x, x0)
        assert torch.equal(ids, text.ids(captions))


def test_padded_conditions_say_the_same():
    """All captions of a recorded step are as long as the longest may be."""
    text = md.TextEncoder.from_captions(["a cat in a hat"], dim=32, layers=1)
    net = md.UNet(1, 32, (1, 1), patch=1, condition_dim=32, attention=(0, 1))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = md.Diffusion(net, md.Cosine(), "x0", text)
    ids = text.ids(["a cat", "", "a cat in a hat"])
    padded = torch.nn.functional.pad(ids, (0, 20), value=-1)
    x_t, level = data(3, 1, 4, 4).float(), model.schedule(0.5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.denoise(x_t, level, text(ids)).x0
        assert (plain - model.denoise(x_t, level, None).x0)[0].abs().max() > 1e-3
        for condition in (text(padded), text(ids).pad(25), text(ids).pad(2)):
            torch.testing.assert_close(model.denoise(x_t, level, condition).x0, plain, rtol=1e-5, atol=1e-5)
