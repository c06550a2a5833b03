"""Training: teach a network to tell data from noise (chapter 4).

The whole of it is five lines, and :func:`loss` is where they stand: draw a time, draw noise, mix,
predict, compare. Around them :func:`train` does what every training run does (optimizer, learning rate,
averaged weights, devices and processes through ``accelerate``), one step at a time, as a generator::

    for step in train(model, loader, steps=1000):
        if step.index % 100 == 0:
            print(step.index, step.loss)
    samples = sample(ddim(step.ema.denoise, x, levels))

The caller owns the data, the printing and the stopping.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from minidiff.denoiser import Condition, Diffusion
from minidiff.forward import (
    SIGMA_DATA,
    NoiseLevel,
    broadcast,
    diffuse,
    from_target,
    target_coefficients,
    to_target,
)
from minidiff.state import TrainingState

Batch = Tensor | tuple[Tensor, Condition | Sequence[str] | None] | list[Any]
Weighting = Callable[[NoiseLevel], Tensor]
Judge = Callable[[Tensor, NoiseLevel, Sequence[str], Tensor | None], Tensor]  # Alignment is one


def snr_weight(level: NoiseLevel) -> Tensor:
    """SNR: the plain squared error of eps, written for x0 (Kingma et al. 2021, eq. 13)."""
    return level.snr


def min_snr_weight(level: NoiseLevel) -> Tensor:
    """min(SNR, 5): no level may shout (Hang et al. 2023, section 3.4)."""
    return level.snr.clamp(max=5)


def snr_plus_one_weight(level: NoiseLevel) -> Tensor:
    """min(SNR + 1, 50): the plain squared error of v, written for x0 (Salimans & Ho 2022, section 4),
    capped where x_t is so clean that the error says nothing more."""
    return (level.snr + 1).clamp(max=50)


def edm_weight(level: NoiseLevel) -> Tensor:
    """EDM's lambda(sigma), 1/c_out², at any alpha (Karras et al. 2022, table 1): the plain squared error
    of the target "edm", written for x0."""
    variance = level.alpha**2 * SIGMA_DATA**2 + level.sigma**2  # of x_t
    return variance / (level.sigma * SIGMA_DATA) ** 2


def sigmoid_weight(level: NoiseLevel, bias: float = 2.0) -> Tensor:
    """The squared error of eps times sigmoid(bias - log SNR), written for x0: clean levels, where only
    the last digits of the data are at stake, count little (Kingma & Gao 2023)."""
    return level.snr * torch.sigmoid(bias - level.log_snr)


def uniform_weight(level: NoiseLevel) -> Tensor:
    """1: the plain squared error of x0."""
    return torch.ones_like(level.alpha)


WEIGHTINGS: dict[str, Weighting | None] = {
    "simple": None,  # every level counts the same in the target's own units (Ho et al. 2020, eq. 14)
    "uniform": uniform_weight,
    "snr": snr_weight,
    "min_snr": min_snr_weight,
    "snr_plus_one": snr_plus_one_weight,
    "edm": edm_weight,
    "sigmoid": sigmoid_weight,
}


def stratified_times(n: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """``n`` times in (0, 1], one in each n-th of the interval, moved together by one random shift.

    Every time is uniform, as the loss demands; together they cover the interval evenly, which takes
    much of the noise out of the loss (Kingma et al. 2021, appendix I.1). t = 1 can occur, t = 0 cannot.

    Returns:
        (n,) float64 (float32 on MPS).
    """
    kind = torch.float32 if device.type == "mps" else torch.float64
    shift = torch.rand(1, generator=generator, device=device, dtype=kind)
    # Shuffled: a data set that comes in the same order every time must not tie times to samples.
    stratum = torch.randperm(n, generator=generator, device=device)
    return 1 - (shift + stratum) / n


def loss(
    model: Diffusion,
    x0: Tensor,
    condition: Condition | Sequence[str] | None = None,
    *,
    weighting: str | Weighting = "simple",
    condition_dropout: float = 0.0,
    alignment: Judge | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The training loss: how wrong is the network about a random mixture of data and noise?

    ``E || target(x0, eps) - net(x_t, t) ||²``; for target "eps" and the simple weighting this is Ho et
    al. 2020, eq. 14. A weighting is defined once, as a factor w(level) of the squared error of x0, and
    converted: the error of x0 is ``sigma/det`` times the error of the output.

    Args:
        model: network, schedule and target.
        x0: clean samples (B, ...), images in [-1, 1].
        condition: what each sample shows, or None.
        weighting: "simple", "uniform", "snr", "min_snr", "snr_plus_one", "edm", "sigmoid", or w(level).
        condition_dropout: chance in [0, 1] that a sample's condition is withheld, drawn for each
            sample on its own; classifier-free guidance needs about 0.1.
        alignment: a term to add that compares the guess of x0 with the caption
            (:class:`minidiff.alignment.Alignment`); then ``condition`` must be captions.
        generator: source of times, noise and dropout, on the device of ``x0``.

    Returns:
        Mean over batch and elements, a tensor of shape ().

    Raises:
        ValueError: the weighting is unknown, ``condition_dropout`` is no chance, or there are no captions
            to align with.
    """
    if not 0 <= condition_dropout <= 1:
        raise ValueError(
            f"condition_dropout = {condition_dropout:g} is a chance: give it in [0, 1]"
        )
    if isinstance(weighting, str) and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    level = model.schedule(stratified_times(len(x0), generator, x0.device))
    eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    x_t = diffuse(x0, eps, level)
    drop = None
    if condition_dropout > 0:
        drop = torch.rand(len(x0), generator=generator, device=x0.device) < condition_dropout
    out = model(x_t, level, condition, drop)
    error = (out.float() - to_target(x0, eps, level, model.target)) ** 2
    weigh = WEIGHTINGS[weighting] if isinstance(weighting, str) else weighting
    if weigh is not None:
        p, q = target_coefficients(model.target, level)
        det = level.alpha * q - level.sigma * p
        error = broadcast(weigh(level) * (level.sigma / det) ** 2, error) * error
    if alignment is None:
        return error.mean()
    if condition is None or isinstance(condition, Condition):
        raise ValueError(
            "alignment compares pictures with captions: give captions as the condition"
        )
    x0_hat = from_target(out.float(), x_t.float(), level, model.target).x0
    return error.mean() + alignment(x0_hat, level, condition, drop)


class EMA(AveragedModel):
    """Exponential moving average of a model's weights; samples are drawn from these.

    torch's :class:`~torch.optim.swa_utils.AveragedModel` with a warm-up: after n updates the decay is
    ``min(decay, (1 + n) / (10 + n))``, so the random first weights are forgotten quickly. The averaged
    model is ``ema.module``.

    Args:
        model: the model to follow.
        decay: share of the average that stays at each update, in [0, 1).

    Raises:
        ValueError: ``decay`` is outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay = {decay:g} is outside [0, 1)")

        def update(averages: Any, current: Any, n: Tensor | int) -> None:
            torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

        super().__init__(model, multi_avg_fn=update)
        self.module.eval().requires_grad_(False)


@dataclass
class Step:
    """What :func:`train` yields after each optimizer step.

    Attributes:
        index: 0 for the first step.
        ema: the averaged model in eval mode; the one to sample from and to keep.
        lr: learning rate of this step.
        is_main_process: False in all processes but one; print and write only where it is True.
    """

    index: int
    ema: Diffusion
    lr: float
    is_main_process: bool
    _loss: Tensor
    _state: "TrainingState"

    @property
    def loss(self) -> float:
        """The loss of this step. Reading it waits for the device, so read it when you need it."""
        return self._loss.item()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``training.safetensors``, from which ``train(..., resume=folder)`` goes on.

        It holds weights, averaged weights and the optimizer's moments. The file is replaced whole.
        """
        self._state.save(Path(folder), self.index + 1)


def train(
    model: Diffusion,
    batches: Iterable[Batch],
    steps: int,
    *,
    lr: float = 1e-3,
    warmup: int = 100,
    decay_from: float = 0.6,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
    condition_dropout: float = 0.1,
    weighting: str | Weighting = "simple",
    alignment: Judge | None = None,
    max_grad_norm: float = 1.0,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Iterator[Step]:
    """Train ``model`` in place, yielding after each optimizer step.

    ``accelerate`` chooses the device and, under ``torchrun`` or ``accelerate launch``, spreads the work
    over processes. The optimizer is AdamW (Loshchilov & Hutter 2019); the learning rate rises over
    ``warmup`` steps, stays, and falls to zero in a straight line from ``decay_from * steps`` on.
    Times and noise of step k depend on ``(seed, k)`` alone, so a resumed run goes on as if nothing had
    happened (the data go on too if ``batches`` does).

    Args:
        model: what to train; it is moved to the device.
        batches: x0, or pairs (x0, condition), with x0 (B, ...) and condition a Condition, a list of B
            captions or None. Started again when it ends. A DataLoader is split between processes; of
            any other iterable, process r of n takes every n-th batch from the r-th on.
        steps: optimizer steps in all, those before ``resume`` included.
        lr: highest learning rate.
        warmup: steps over which the learning rate rises from 0.
        decay_from: share of the run, in [0, 1], after which it falls.
        weight_decay: AdamW's.
        ema_decay: see :class:`EMA`.
        condition_dropout: see :func:`loss`.
        weighting: see :func:`loss`.
        alignment: see :func:`loss`.
        max_grad_norm: gradients longer than this are scaled down.
        precision: "bf16" computes the network in bfloat16 (weights and loss stay float32), "fp32" does
            not, "auto" uses bfloat16 where the hardware has it.
        seed: of times, noise and condition dropout.
        resume: folder in which :meth:`Step.save` left a state.

    Yields:
        One :class:`Step` per optimizer step.

    Raises:
        ValueError: ``steps`` is smaller than 1, ``batches`` is empty, or an argument of :func:`loss` is bad.
        FileNotFoundError: ``resume`` names a folder without a training state.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: train for at least 1")
    for name, value in (("lr", lr), ("max_grad_norm", max_grad_norm)):
        if not value > 0:
            raise ValueError(f"{name} = {value:g}: it must be positive")
    if warmup < 0:
        raise ValueError(f"warmup = {warmup}: give a number of steps, 0 for none")
    if not 0 <= decay_from <= 1:
        raise ValueError(f"decay_from = {decay_from:g} is a share of the run: give it in [0, 1]")
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}: choose one of auto, bf16, fp32")
    if isinstance(model.text, nn.Module) and getattr(model.text, "frozen", False):
        model.text.requires_grad_(False)  # whatever was asked of the whole model
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "all weights of this model are frozen: call model.requires_grad_(True) first"
        )
    accelerator = Accelerator(cpu=processes().device.type == "cpu")
    device, rank = accelerator.device, accelerator.process_index
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        trainable,
        lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=device.type in ("cpu", "cuda"),
    )  # fmt: skip
    ema = EMA(model, ema_decay)
    state = TrainingState(model, ema, optimizer, accelerator.is_main_process)
    start = 0 if resume is None else state.load(Path(resume))
    objective = partial(
        loss, weighting=weighting, condition_dropout=condition_dropout, alignment=alignment
    )
    objective = accelerator.prepare_model(_Objective(model, objective))
    if isinstance(batches, DataLoader):
        batches = accelerator.prepare_data_loader(batches)
        share = _forever(batches)
    else:
        share = itertools.islice(_forever(batches), rank, None, accelerator.num_processes)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    generator = torch.Generator(device)
    try:
        for index in range(start, steps):
            batch = next(share)
            x0, *told = batch if isinstance(batch, (tuple, list)) else (batch,)
            condition = told[0] if told else None
            if not x0.is_floating_point():
                raise ValueError(
                    f"a batch holds {x0.dtype}, not floats: bring images to [-1, 1] first"
                )
            x0 = x0.to(device, torch.float32)
            generator.manual_seed(((seed * 1_000_003 + index) * 1_009 + rank) % 2**63)
            rate = lr * _trapezoid(index, steps, warmup, decay_from)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                value = objective(x0, condition, generator)
            optimizer.zero_grad()
            accelerator.backward(value)
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            ema.update_parameters(model)
            averaged, main = cast(Diffusion, ema.module), accelerator.is_main_process
            yield Step(index, averaged, rate, main, value.detach(), state)
    finally:
        model.eval()


class _Objective(nn.Module):
    """Model and loss behind one ``forward``, which is what distributed training can wrap."""

    def __init__(self, model: Diffusion, objective: Callable[..., Tensor]):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(
        self,
        x0: Tensor,
        condition: Condition | Sequence[str] | None,
        generator: torch.Generator,
    ) -> Tensor:
        return self.objective(self.model, x0, condition, generator=generator)


def processes() -> PartialState:
    """Which device this process has, and which of how many it is, as ``accelerate`` sees it.

    Without an accelerator it must be told to use the CPU, or it takes each process of ``torchrun`` for
    one that runs alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def _trapezoid(index: int, steps: int, warmup: int, decay_from: float) -> float:
    """Up over ``warmup`` steps, flat, and from ``decay_from * steps`` down to 0 at the end."""
    rise = (index + 1) / max(warmup, 1)
    fall = (steps - index) / max(steps * (1 - decay_from), 1)
    return min(1.0, rise, fall)


def _forever(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, again and again."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches is empty (an iterator can be used only once: give a list or loader)"
            )
