import pytest
import torch
from runs import data, fresh, generator, short, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import minidiff as md
from minidiff import training

CPU = torch.device("cpu")


# --- EMA -------------------------------------------------------------------------------------------


def test_ema_is_the_closed_form_with_warm_up():
    """After a first copy, weight = decay_n * weight + (1 - decay_n) * new with decay_n = min(decay,
    (1 + n)/(10 + n)), n updates behind it; buffers are copied."""
    net = nn.BatchNorm1d(1)
    ema = md.EMA(net, decay=0.5)
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0, 2.0, 6.0, -5.0, 3.0, 5.0, 8.0]
    expected = 0.0
    for n, value in enumerate(values):
        net.weight.data.fill_(value)
        net.running_mean.fill_(10 * value)
        ema.update_parameters(net)
        decay = 0.0 if n == 0 else min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert ema.module.running_mean.item() == 80
    assert min((1 + n) / (10 + n) for n in (8, 9, 10)) >= 0.5 > (1 + 7) / (10 + 7)  # both regimes were seen
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_ema_is_a_copy():
    net = nn.Linear(1, 1)
    ema = md.EMA(net)
    net.weight.data.fill_(100.0)
    assert ema.module.weight.item() != 100


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_is_a_share(decay):
    with pytest.raises(ValueError, match=f"EMA decay = {decay:g} is outside"):
        md.EMA(nn.Linear(1, 1), decay)


# --- train: does it learn? -------------------------------------------------------------------------


def test_training_reaches_the_floor_that_the_oracle_sets():
    """Data N(m, s²): the best network still errs by Var(eps | x_t) = alpha² s²/(alpha² s² + sigma²).
    Training must come close to that number, and cannot go below."""
    mean, std = 0.8, 0.5
    draws = generator(1)

    def batches():
        while True:
            yield mean + std * torch.randn(256, 2, generator=draws)

    model = fresh()
    for step in md.train(model, batches(), 500, lr=4e-3, ema_decay=0.99, precision="fp32"):
        pass
    level = md.Cosine()((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    kept = (level.alpha * std) ** 2
    floor = (kept / (kept + level.sigma**2)).mean().item()
    test = mean + std * torch.randn(100_000, 2, generator=generator(2))
    with torch.no_grad():
        reached = md.loss(step.ema.cpu(), test, generator=generator(3)).item()
        untrained = md.loss(fresh(), test, generator=generator(3)).item()
    assert untrained > 1.5 * floor
    assert 0.99 * floor < reached < 1.06 * floor
    # And it is the oracle's function, not only its loss.
    at = md.Cosine()(0.5)
    x_t = torch.linspace(-1, 2, 20, dtype=torch.float64)[:, None].repeat(1, 2)
    kept = (at.alpha * std) ** 2
    exact = at.sigma / (kept + at.sigma**2) * (x_t - at.alpha * mean)
    found = step.ema.denoise(x_t, at).eps
    assert (found - exact).abs().max() < 0.15


def test_a_fixed_list_of_batches_is_learnt_at_every_time():
    """The whole data set as one batch, used at each step: at high noise the best guess of x0 is its mean.
    If a place in the batch had its own times, the guess would be the sample at the first places."""
    x0 = torch.cat([torch.full((32, 2), -1.0), torch.full((32, 2), 1.0)])
    model = fresh("x0")
    for step in md.train(model, [x0], 250, lr=4e-3, ema_decay=0.98, precision="fp32"):
        pass
    guess = step.ema.denoise(torch.zeros(1, 2), md.Cosine()(0.97)).x0
    assert guess.abs().max() < 0.3


def test_a_condition_is_learnt():
    """Data sit at -1 or +1 as the condition says; with it the guess at pure noise is right, and without
    it (10 % of training) it is the mean."""
    c = md.Condition(torch.zeros(2, 1, 4), torch.ones(2, 1).bool(), torch.eye(4)[:2])
    x0 = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(64, 1)
    both = md.Condition(*(part.repeat(64, *[1] * (part.ndim - 1)) for part in c))
    model = fresh("x0", condition_dim=4)
    for step in md.train(
        model, [(x0, both)], 250, lr=4e-3, ema_decay=0.98, condition_dropout=0.3, precision="fp32"
    ):
        pass
    level, x_t = md.Cosine()(0.999), torch.zeros(2, 2)
    guess = step.ema.denoise(x_t, level, c).x0
    torch.testing.assert_close(guess, x0[:2], rtol=0, atol=0.2)
    assert step.ema.denoise(x_t, level).x0.abs().max() < 0.25


# --- train: what each step does --------------------------------------------------------------------


def test_learning_rate_rises_stays_and_falls():
    rates = [step.lr for step in short(fresh(), 40, lr=1.0, warmup=4, decay_from=0.9)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1] * 34, 0.75, 0.5, 0.25])
    # A warm-up longer than a tenth of the run would never end, or take most of it.
    rates = [step.lr for step in short(fresh(), 20, lr=1.0, warmup=100, decay_from=1.0)]
    assert rates == pytest.approx([0.5, *[1] * 19])
    assert [step.lr for step in short(fresh(), 4, lr=2.0, warmup=0, decay_from=1.0)] == [2.0] * 4


def test_the_first_step_is_adamw():
    """Loshchilov & Hutter 2019: first lr * weight_decay of each weight is taken away, then Adam's step,
    which at its first is lr in the direction of the gradient's sign."""
    model = fresh()
    before = weights_of(model)
    rate, decay = 0.01, 0.3
    step = next(md.train(model, [data(8, 2).float()], 1, lr=rate, warmup=1, decay_from=1.0,
                         weight_decay=decay, max_grad_norm=1e9, precision="fp32"))  # fmt: skip
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).cpu()
    expected = before * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(weights_of(model), expected, rtol=1e-5, atol=1e-6)
    assert step.index == 0


def test_long_gradients_are_scaled_down():
    gradients = []
    for limit in (1e9, 1e-3):
        model = fresh()
        next(md.train(model, [data(8, 2).float()], 1, max_grad_norm=limit, precision="fp32"))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert gradients[0].norm() > 0.01
    torch.testing.assert_close(gradients[1], gradients[0] * 1e-3 / gradients[0].norm(), rtol=1e-3, atol=0)


def test_the_averaged_model_follows_each_step():
    model, expected = fresh(), torch.zeros(())
    for step in md.train(model, [data(8, 2).float()], 12, ema_decay=0.6, warmup=2, precision="fp32"):
        n = step.index
        decay = 0.0 if n == 0 else min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights_of(model)
        torch.testing.assert_close(weights_of(step.ema), expected, rtol=1e-4, atol=1e-6)
        assert not step.ema.training
        assert model.training
    assert not model.training


def test_stopping_early_leaves_the_model_ready_to_sample():
    model = fresh()
    for _ in md.train(model, [data(8, 2).float()], 100, precision="fp32"):
        break
    assert not model.training


def test_the_seed_decides_the_run():
    runs = [fresh() for _ in range(3)]
    losses = [[s.loss for s in short(model, seed=s)] for model, s in zip(runs, (1, 1, 2), strict=True)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))


def test_noise_is_new_at_every_step():
    """One batch, one model that does not learn: the losses still differ, and by chance alone."""
    losses = [step.loss for step in short(fresh(), 20, lr=1e-12)]
    assert len(set(losses)) == 20


@pytest.mark.parametrize("precision,dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_of_the_network(precision, dtype):
    model, seen = fresh(), set()
    model.net.last.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    steps = short(model, 3, precision=precision)
    assert seen == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert steps[0]._loss.dtype == torch.float32


def test_auto_precision_asks_the_hardware(monkeypatch):
    for answer, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(training, "has_bf16", lambda device, answer=answer: answer)
        model, seen = fresh(), set()
        model.net.last.register_forward_hook(lambda module, args, out, seen=seen: seen.add(out.dtype))
        short(model, 1, precision="auto")
        assert seen == {dtype}


# --- train: batches --------------------------------------------------------------------------------


class Mean(nn.Module):
    """The smallest network: one vector, the guess of x0 whatever x_t is. The gradient of its loss is
    2 (w - mean of the batch)/dim, free of times and noise, so it tells which samples were seen."""

    def __init__(self, dim: int = 2):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition | None = None) -> Tensor:
        return self.w.expand_as(x)


def seen_means(batches: object, steps: int) -> list[float]:
    """The mean of the batch that each step of training saw, from the gradient."""
    model = md.Diffusion(Mean(), md.Cosine(), "x0")
    means = []
    for _ in md.train(model, batches, steps, lr=1e-12, max_grad_norm=1e9, precision="fp32"):  # type: ignore[arg-type]
        means.append(-model.net.w.grad[0].item())  # 2 / dim = 1
    return means


def constant(*values: float) -> list[Tensor]:
    return [torch.full((4, 2), float(value)) for value in values]


def test_batches_may_be_a_list_and_start_again():
    assert seen_means(constant(1, 2, 3), 7) == pytest.approx([1, 2, 3, 1, 2, 3, 1])


def test_batches_may_be_an_endless_generator():
    def count():
        i = 0
        while True:
            yield torch.full((4, 2), float(i))
            i += 1

    assert seen_means(count(), 4) == pytest.approx([0, 1, 2, 3])


def test_batches_may_be_a_loader():
    """Of plain tensors, or of a TensorDataset, which makes lists of one."""
    x = torch.arange(12.0)[:, None].expand(12, 2)
    for dataset in (x, TensorDataset(x)):
        assert seen_means(DataLoader(dataset, 4), 4) == pytest.approx([1.5, 5.5, 9.5, 1.5])  # type: ignore[arg-type]
    shuffled = seen_means(DataLoader(TensorDataset(x), 4, shuffle=True, generator=generator()), 3)
    assert sum(shuffled) == pytest.approx(16.5)
    assert shuffled != pytest.approx([1.5, 5.5, 9.5])


def test_batches_may_carry_conditions():
    """As tensors or captions, in tuples or (as loaders make them) lists."""
    text = md.TextEncoder.from_captions(["a cat", "a dog"], dim=32, layers=1)
    x, captions = data(2, 2).float(), ["a cat", "a dog"]
    c = text(text.ids(captions))
    c = md.Condition(*(part.detach() for part in c))
    loader = DataLoader(list(zip(x, captions, strict=True)), 2)
    for batch in ((x, c), [x, c], (x, captions), (x, tuple(captions)), (x, None)):
        model = md.Diffusion(md.MLP(2, 32, condition_dim=32), md.Cosine(), encoder=text)
        nn.init.normal_(model.net.last.weight)
        before = model.net.embedding.pooled.weight.detach().clone()
        short(model, 2, [batch], condition_dropout=0.0, weight_decay=0.0)
        assert torch.equal(model.net.embedding.pooled.weight.cpu(), before) == (batch[1] is None)
    assert len(short(model, 3, loader)) == 3


def test_uint8_images_are_not_taken_for_data():
    """Whole numbers 0..255 are pixels that nobody brought to [-1, 1]."""
    with pytest.raises(ValueError, match=r"uint8.*\[-1, 1\]"):
        next(md.train(fresh(), [torch.zeros(4, 2, dtype=torch.uint8)], 1))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"steps": 0}, "steps = 0: use at least 1"),
        ({"batches": []}, "batches is empty"),
        ({"batches": iter([torch.zeros(4, 2)]), "steps": 2}, "an iterator can be used only once"),
        ({"ema_decay": 1.5}, "EMA decay = 1.5 is outside"),
        ({"weighting": "p2"}, "unknown weighting 'p2'"),
        ({"condition_dropout": 2.0}, "condition_dropout = 2"),
        ({"precision": "fp16"}, "precision.*'fp16'.*auto, bf16, fp32"),
        ({"decay_from": 1.5}, "decay_from = 1.5"),
        ({"max_grad_norm": -1.0}, "max_grad_norm = -1"),
        ({"warmup": -1}, "warmup = -1"),
        ({"lr": -1.0}, "lr = -1: it must be positive"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_bad_arguments_are_named_in_one_line(kwargs, message):
    arguments = {"batches": [torch.zeros(4, 2)], "steps": 1, "precision": "fp32", **kwargs}
    with pytest.raises(ValueError, match=message) as error:
        list(md.train(fresh(), **arguments))
    assert "\n" not in str(error.value)


def test_a_frozen_model_says_so(tmp_path):
    """from_pretrained gives a model that is not trained further by accident."""
    fresh().save_pretrained(tmp_path)
    model = md.Diffusion.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        short(model)
    before = weights_of(model)
    short(model.requires_grad_(True))
    assert not torch.equal(weights_of(model), before)
