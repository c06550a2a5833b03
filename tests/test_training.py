import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import scipy.stats
import torch
from helpers import SCHEDULES, VARIANCE_PRESERVING, full_disk
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import minidiff as md
from minidiff import training
from minidiff.state import saved_steps
from minidiff.training import WEIGHTINGS, stratified_times

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Guess(md.Diffusion):
    """A model whose guess of x0 is a fixed function of x_t, whatever its target; remembers its inputs."""

    def __init__(self, schedule, target="eps", guess=lambda x_t: torch.tanh(3 * x_t), offset=0.0):
        super().__init__(nn.Linear(1, 1), schedule, target)
        self.guess, self.offset = guess, offset

    def forward(self, x_t, level, condition=None, drop=None):
        self.x_t, self.level, self.drop = x_t, level, drop
        alpha, sigma = (
            part.reshape(-1, *[1] * (x_t.ndim - 1)) for part in (level.alpha, level.sigma)
        )
        self.x0 = self.guess(x_t)
        eps = (x_t - alpha * self.x0) / sigma
        return md.to_target(self.x0, eps, level, self.target) + self.offset


def data(n: int = 64, *shape: int, seed: int = 7) -> Tensor:
    shape = shape or (3,)
    return torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)


# --- times -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 128])
def test_times_fall_one_in_each_nth_of_the_interval(n):
    for seed in range(20):
        t = stratified_times(n, generator(seed), CPU).sort().values
        assert ((t > torch.arange(n) / n) & (t <= torch.arange(1, n + 1) / n)).all()
        torch.testing.assert_close(t.diff(), torch.full((n - 1,), 1 / n, dtype=torch.float64))


def test_every_place_in_the_batch_gets_every_time():
    """The loss needs t independent of x0. Were stratum i always given to sample i, a list of batches
    used again and again would show each picture at its own few times only."""
    times = torch.stack([stratified_times(8, generator(seed), CPU) for seed in range(500)])
    for place in range(8):
        assert scipy.stats.kstest(times[:, place], "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(times[:, :2].T)[0, 1]
    assert abs(correlation + 1 / 7) < 0.15  # two different strata: slightly negative, never one


def test_times_come_close_to_noise_and_never_reach_clean_data():
    times = torch.cat([stratified_times(64, generator(seed), CPU) for seed in range(200)])
    assert times.max() > 0.9998
    assert 0 < times.min() < 0.0002


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_the_simple_loss_is_the_mean_squared_error(name, target):
    """E ||target - net||², with eps found back from what the network was shown: Ho et al. 2020, eq. 14."""
    x0 = data(16, 2, 3)
    model = Guess(SCHEDULES[name], target)
    found = md.loss(model, x0, generator=generator())
    total = 0.0
    for i in range(16):
        alpha, sigma = model.level.alpha[i], model.level.sigma[i]
        eps = (model.x_t[i] - alpha * x0[i]) / sigma
        guessed_eps = (model.x_t[i] - alpha * model.x0[i]) / sigma
        p, q = {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[target]
        error = p * x0[i] + q * eps - (p * model.x0[i] + q * guessed_eps)
        total += (error**2).sum().item()
    assert found.shape == ()
    assert found.item() == pytest.approx(total / x0.numel(), rel=1e-5)


def test_the_noise_in_the_loss_is_standard_normal():
    x0 = data(5000, 8)
    model = Guess(md.Cosine())
    md.loss(model, x0, generator=generator())
    eps = (model.x_t - model.level.alpha[:, None] * x0) / model.level.sigma[:, None]
    assert scipy.stats.kstest(eps.flatten(), "norm").pvalue > 1e-3
    each = torch.corrcoef(eps.T) - torch.eye(8)
    assert each.abs().max() < 5 / 5000**0.5  # independent between elements
    assert abs(torch.corrcoef(torch.stack([eps[:, 0], model.level.t]))[0, 1]) < 5 / 5000**0.5


def test_the_generator_decides_the_loss():
    model, x0 = md.Diffusion(md.MLP(3), md.Cosine()), data().float()
    nn.init.normal_(model.net.last.weight)
    losses = [md.loss(model, x0, generator=generator(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("weighting", [name for name, weigh in WEIGHTINGS.items() if weigh])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_weighting_means_the_same_for_every_target(weighting, name):
    """w(level) counts squared errors of x0; the same guess has the same loss in every parametrisation."""
    x0, losses = data(), {}
    for target in ("eps", "x0", "v", "flow", "edm"):
        model = Guess(SCHEDULES[name], target)
        losses[target] = md.loss(model, x0, weighting=weighting, generator=generator()).item()
    weight = WEIGHTINGS[weighting](model.level)
    direct = (weight[:, None] * (model.x0 - x0) ** 2).mean().item()
    for target in losses:
        assert losses[target] == pytest.approx(direct, rel=2e-4), target


def weights(schedule: md.Schedule, target: str, weighting: object) -> tuple[Tensor, md.NoiseLevel]:
    """The factor of the squared error of the output: the loss of a network that is wrong by 1."""
    found, levels = [], []
    for seed in range(40):
        x0 = torch.zeros(1, 2, dtype=torch.float64)
        model = Guess(schedule, target, guess=torch.zeros_like, offset=1.0)
        found.append(md.loss(model, x0, weighting=weighting, generator=generator(seed)))  # type: ignore[arg-type]
        levels.append(model.level)
    return torch.stack(found), md.NoiseLevel(
        *(torch.cat(part) for part in zip(*levels, strict=True))
    )


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize(
    "target,formula",
    [
        ("eps", lambda snr: snr.clamp(max=5) / snr),  # Hang et al. 2023, section 3.4
        ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),  # its appendix
        ("x0", lambda snr: snr.clamp(max=5)),
    ],
)
def test_min_snr_is_the_formula_of_the_paper(name, target, formula):
    found, level = weights(SCHEDULES[name], target, "min_snr")
    snr = (level.alpha / level.sigma) ** 2
    assert (snr > 5).any()
    assert (snr < 5).any()
    torch.testing.assert_close(found.double(), formula(snr), rtol=1e-4, atol=0)


def test_min_snr_of_the_flow_velocity():
    """x0 = x_t - t * velocity, so an error of 1 in the velocity is one of t in x0."""
    found, level = weights(md.Flow(), "flow", "min_snr")
    expected = level.t**2 * ((1 - level.t) / level.t).square().clamp(max=5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("target,weighting", [("eps", "snr"), ("v", lambda level: level.snr + 1)])
def test_plain_errors_of_eps_and_v_are_weighted_errors_of_x0(name, target, weighting):
    """Salimans & Ho 2022, section 4: SNR for eps, SNR + 1 for v."""
    found, _ = weights(SCHEDULES[name], target, weighting)
    torch.testing.assert_close(found.double(), torch.ones(len(found)).double(), rtol=1e-4, atol=0)


def test_snr_plus_one_is_capped():
    found, level = weights(md.Cosine(), "x0", "snr_plus_one")
    torch.testing.assert_close(
        found.double(), (1 / level.sigma**2).clamp(max=50), rtol=1e-4, atol=0
    )


def test_unknown_weighting_is_named():
    with pytest.raises(
        ValueError, match="unknown weighting 'p2': choose one of simple, uniform, snr, min_snr"
    ):
        md.loss(Guess(md.Cosine()), data(), weighting="p2")


# --- condition dropout -----------------------------------------------------------------------------


def test_conditions_are_dropped_sample_by_sample():
    model, x0 = Guess(md.Cosine()), data(4000)
    md.loss(model, x0, condition_dropout=0.1, generator=generator())
    assert model.drop.shape == (4000,)
    assert model.drop.dtype == torch.bool
    count = int(model.drop.sum())  # binomial: 400 ± 19
    assert abs(count - 400) < 5 * 19
    # Independent of each other and of t: neighbours are dropped together no more than by chance.
    pairs = int((model.drop[1:] & model.drop[:-1]).sum())  # 40 ± 6.6
    assert abs(pairs - 40) < 5 * 6.6
    assert (
        abs(torch.corrcoef(torch.stack([model.drop.double(), model.level.t]))[0, 1]) < 5 / 4000**0.5
    )


@pytest.mark.parametrize("chance,dropped", [(0.0, 0), (1.0, 64)])
def test_no_dropout_and_full_dropout(chance, dropped):
    model = Guess(md.Cosine())
    md.loss(model, data(), condition_dropout=chance, generator=generator())
    assert (0 if model.drop is None else int(model.drop.sum())) == dropped


@pytest.mark.parametrize("chance", [-0.1, 1.5])
def test_dropout_is_a_chance(chance):
    with pytest.raises(ValueError, match=rf"condition_dropout = {chance}"):
        md.loss(Guess(md.Cosine()), data(), condition_dropout=chance)


def test_dropped_captions_are_unseen():
    """With dropout 1 the loss is that of no condition; without, the captions change it."""
    text = md.TextEncoder.from_captions(["a cat", "a dog"], dim=32, layers=1)
    model = md.Diffusion(md.MLP(3, 32, condition_dim=32), md.Cosine(), text=text)
    nn.init.normal_(model.net.last.weight)
    x0, captions = data(2).float(), ["a cat", "a dog"]
    without = md.loss(model, x0, None, generator=generator())
    dropped = md.loss(model, x0, captions, condition_dropout=1.0, generator=generator())
    told = md.loss(model, x0, captions, generator=generator())
    torch.testing.assert_close(dropped, without)
    assert abs(told - without) > 1e-4


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
    assert (
        min((1 + n) / (10 + n) for n in (8, 9, 10)) >= 0.5 > (1 + 7) / (10 + 7)
    )  # both regimes were seen
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


def fresh(target: str = "eps", condition_dim: int | None = None, seed: int = 3) -> md.Diffusion:
    torch.manual_seed(seed)
    return md.Diffusion(md.MLP(2, 32, 2, condition_dim=condition_dim), md.Cosine(), target)  # type: ignore[arg-type]


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
        reached = md.loss(step.ema, test, generator=generator(3)).item()
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
    told = step.ema.denoise(x_t, level, c).x0
    torch.testing.assert_close(told, x0[:2], rtol=0, atol=0.2)
    assert step.ema.denoise(x_t, level).x0.abs().max() < 0.25


# --- train: what each step does --------------------------------------------------------------------


def short(
    model: md.Diffusion, steps: int = 6, batches: object = None, **kwargs: object
) -> list[md.Step]:
    settings = {"precision": "fp32", "warmup": 2, "lr": 0.01, **kwargs}
    return list(md.train(model, batches or [data(8, 2).float()], steps, **settings))  # type: ignore[arg-type]


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def test_learning_rate_rises_stays_and_falls():
    rates = [step.lr for step in short(fresh(), 10, lr=1.0, warmup=4, decay_from=0.6)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert [step.lr for step in short(fresh(), 4, lr=2.0, warmup=0, decay_from=1.0)] == [2.0] * 4


def test_the_first_step_is_adamw():
    """Loshchilov & Hutter 2019: first lr * weight_decay of each weight is taken away, then Adam's step,
    which at its first is lr in the direction of the gradient's sign."""
    model = fresh()
    before = weights_of(model)
    rate, decay = 0.01, 0.3
    step = next(md.train(model, [data(8, 2).float()], 1, lr=rate, warmup=1, decay_from=1.0,
                         weight_decay=decay, max_grad_norm=1e9, precision="fp32"))  # fmt: skip
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
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
    torch.testing.assert_close(
        gradients[1], gradients[0] * 1e-3 / gradients[0].norm(), rtol=1e-3, atol=0
    )


def test_the_averaged_model_follows_each_step():
    model, expected = fresh(), torch.zeros(())
    for step in md.train(
        model, [data(8, 2).float()], 12, ema_decay=0.6, warmup=2, precision="fp32"
    ):
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
    losses = [
        [s.loss for s in short(model, seed=s)] for model, s in zip(runs, (1, 1, 2), strict=True)
    ]
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
        model.net.last.register_forward_hook(
            lambda module, args, out, seen=seen: seen.add(out.dtype)
        )
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
    c = text(captions)
    c = md.Condition(*(part.detach() for part in c))
    loader = DataLoader(list(zip(x, captions, strict=True)), 2)
    for batch in ((x, c), [x, c], (x, captions), (x, tuple(captions)), (x, None)):
        model = md.Diffusion(md.MLP(2, 32, condition_dim=32), md.Cosine(), text=text)
        nn.init.normal_(model.net.last.weight)
        before = model.net.embedding.pooled.weight.detach().clone()
        short(model, 2, [batch], condition_dropout=0.0, weight_decay=0.0)
        assert torch.equal(model.net.embedding.pooled.weight, before) == (batch[1] is None)
    assert len(short(model, 3, loader)) == 3


def test_uint8_images_are_not_taken_for_data():
    """Whole numbers 0..255 are pixels that nobody brought to [-1, 1]."""
    with pytest.raises(ValueError, match=r"uint8.*\[-1, 1\]"):
        next(md.train(fresh(), [torch.zeros(4, 2, dtype=torch.uint8)], 1))


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"steps": 0}, "steps = 0: train for at least 1"),
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


# --- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MLP", "UNet"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(name, stop, tmp_path):
    """To the bit. The U-Net's weights lie in memory otherwise (channels last) than in the file."""

    def fresh(seed: int) -> md.Diffusion:
        torch.manual_seed(seed)
        net: nn.Module = md.MLP(16, 32, 2, condition_dim=4)
        if name == "UNet":
            net = md.UNet(1, 32, (1,), patch=1, attention=(0,), condition_dim=4)
        return md.Diffusion(net, md.Cosine(), "v")

    x = data(7, 8, 16).float().reshape(7, 8, *((16,) if name == "MLP" else (1, 4, 4)))
    c = md.Condition(data(8, 3, 4).float(), torch.ones(8, 3).bool(), data(8, 4).float())
    batches = [(part, c) for part in x]
    settings = {"warmup": 3, "lr": 0.01, "ema_decay": 0.9, "condition_dropout": 0.5}

    def run(model: md.Diffusion, batches: list, resume: Path | None = None) -> Iterator[md.Step]:
        return md.train(model, batches, 7, precision="fp32", resume=resume, **settings)  # type: ignore[arg-type]

    whole = fresh(3)
    *_, last = run(whole, batches)
    for step in run(fresh(3), batches):
        if step.index + 1 == stop:
            step.save(tmp_path)
            break
    assert saved_steps(tmp_path) == stop
    again = fresh(99)  # other first weights: all must come from the file
    resumed = list(run(again, batches[stop:], tmp_path))
    assert [step.index for step in resumed] == list(range(stop, 7))
    assert torch.equal(weights_of(again), weights_of(whole))
    assert torch.equal(weights_of(resumed[-1].ema), weights_of(last.ema))
    assert resumed[-1].loss == last.loss
    assert resumed[-1].lr == last.lr


def test_a_failed_save_leaves_the_old_state(tmp_path):
    steps = md.train(fresh(), [data(8, 2).float()], 5, precision="fp32")
    next(steps).save(tmp_path)
    before = (tmp_path / "training.safetensors").read_bytes()
    step = next(steps)
    with full_disk(), pytest.raises(OSError, match="too large"):
        step.save(tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == before
    next(steps).save(tmp_path)
    assert saved_steps(tmp_path) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["training.safetensors"]


def test_nothing_to_resume_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing to resume: .*training.safetensors does not exist"
    ):
        short(fresh(), resume=tmp_path)


# --- two processes ---------------------------------------------------------------------------------

WORKER = """
    import os
    import sys
    from pathlib import Path

    import torch
    from torch.utils.data import DataLoader, TensorDataset

    import minidiff as md

    class Mean(torch.nn.Module):  # its gradient tells the mean of the batch, see above
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x, t, condition=None):
            return self.w.expand_as(x)

    def constant(*values):
        return [torch.full((4, 2), float(value)) for value in values]

    def means(batches, steps):
        model = md.Diffusion(Mean(), md.Cosine(), "x0")
        run = md.train(model, batches, steps, lr=1e-12, max_grad_norm=1e9, precision="fp32")
        return [-model.net.w.grad[0].item() for _ in run]

    def weights(model):
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    settings = dict(precision="fp32", warmup=1, lr=0.01)
    batches = [(x, ["a cat", "a dog", "", "a cat"]) for x in constant(1, 2, 3)]

    def fresh():
        text = md.TextEncoder.from_captions(["a cat", "a dog"], dim=32, layers=1)
        return md.Diffusion(md.MLP(2, 32, 1, condition_dim=32), md.Cosine(), "v", text)

    torch.manual_seed(rank)  # the ranks begin with different weights
    model = fresh()
    began = weights(model).clone()
    for step in md.train(model, batches, 4, **settings):
        if step.index == 2:
            step.save(out / "half")
    torch.distributed.barrier()  # the file is written
    other = fresh()
    resumed = [again.index for again in md.train(other, batches, 4, resume=out / "half", **settings)]
    points = torch.arange(16.0)[:, None].expand(16, 2)
    found = {
        "world": torch.distributed.get_world_size(),
        "began": began,
        "weights": weights(model),
        "weights resumed": weights(other),
        "ema": weights(step.ema),
        "loss": step.loss,
        "main": step.is_main_process,
        "resumed": resumed,
        "list": means(constant(0, 10, 20), 3),
        "loader": means(DataLoader(TensorDataset(points), 4), 4),
    }
    torch.save(found, out / f"{rank}.pt")
"""


def test_two_processes_train_one_model(tmp_path):
    """Under torchrun: the gradient is the mean over both shares of the data, the ranks end with the same
    weights and averages, and one of them writes."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    library = str(Path(md.__file__).parents[1])
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": library,
    }
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert not torch.equal(first["began"], second["began"])
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ema"], second["ema"])
    assert first["loss"] != second["loss"]  # of its own share, with its own noise
    assert (first["main"], second["main"]) == (True, False)
    assert saved_steps(tmp_path / "half") == 3
    assert first["resumed"] == second["resumed"] == [3]
    assert torch.equal(first["weights resumed"], second["weights resumed"])
    # Batches 0, 10, 20, 0, 10, 20: rank 0 takes 0, 20, 10, rank 1 takes 10, 0, 20; the mean of each pair.
    assert first["list"] == second["list"] == pytest.approx([5, 10, 15])
    # Four batches of the loader, two per step: means 1.5, 5.5 and 9.5, 13.5, then again.
    assert first["loader"] == second["loader"] == pytest.approx([3.5, 11.5, 3.5, 11.5])


def test_edm_weighting_is_the_papers_lambda():
    """Karras et al. 2022, table 1: lambda = (sigma² + sigma_data²) / (sigma sigma_data)², and with the
    target "edm" it is the plain squared error of the output."""
    level = md.Karras()(torch.linspace(0, 1, 9, dtype=torch.float64))
    wanted = (level.sigma**2 + 0.25) / (level.sigma * 0.5) ** 2
    torch.testing.assert_close(WEIGHTINGS["edm"](level), wanted)
    found, _ = weights(md.Cosine(), "edm", "edm")
    torch.testing.assert_close(found.double(), torch.ones(len(found)).double(), rtol=1e-4, atol=0)


def test_sigmoid_weighting_of_eps():
    """Kingma & Gao 2023: the squared error of eps counts sigmoid(2 - log SNR)."""
    found, level = weights(md.Cosine(), "eps", "sigmoid")
    wanted = 1 / (1 + (level.log_snr - 2).exp())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_uniform_weighting_is_the_error_of_x0():
    found, _ = weights(md.Cosine(), "x0", "uniform")
    torch.testing.assert_close(found, torch.ones_like(found))
