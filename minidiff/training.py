"""Training: teach a network to tell data from noise (chapter 4).

:func:`train` does what every training run does around :func:`minidiff.loss` (optimizer, learning rate,
averaged weights, devices and processes through ``accelerate``), one step at a time, as a generator::

    for step in train(model, loader, steps=1000):
        if step.index % 100 == 0:
            print(step.index, step.loss)
    samples = sample(ddim(step.ema.denoise, x, levels))

The caller owns the data, the printing and the stopping. Batches come in at one door, :func:`unpack`, where
captions and labels become tensors; a step is a function of tensors.
"""

import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minidiff.checks import positive, seed_number, whole
from minidiff.condition import Condition
from minidiff.denoiser import Diffusion
from minidiff.device import has_bf16
from minidiff.files import StrPath
from minidiff.loss import Draws, Term, Weighting, draw, loss
from minidiff.muon import Muon
from minidiff.state import TrainingState
from minidiff.step import EMA, Graphed, TrainingStep

if TYPE_CHECKING:
    from minidiff.text import Alignment

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
X0_KEYS = ("x0", "pixel_values", "image", "images")
CONDITION_KEYS = ("condition", "text", "caption", "captions", "label", "labels")
OptimizerName = Literal["adamw", "muon"]


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
    _good: Tensor

    @property
    def loss(self) -> float:
        """The loss of this step. Reading it waits for the device, so read it when you need it.

        Raises:
            RuntimeError: it, or a gradient since the last look, is no number.
        """
        self._look()
        return self._loss.item()

    def _look(self) -> None:
        if not bool(self._good):
            raise RuntimeError(f"{_broken(self.index, self._loss)}: a smaller learning rate may help")

    def save(self, folder: StrPath) -> None:
        """Write ``training.safetensors``, from which ``train(..., resume=folder)`` goes on.

        It holds weights, averaged weights and the optimizer's moments. The file is replaced whole.

        Raises:
            RuntimeError: the loss or a gradient is no number; the file stays as it was.
        """
        self._look()
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
    optimizer: OptimizerName = "adamw",
    ema_decay: float = 0.999,
    condition_dropout: float = 0.1,
    weighting: str | Weighting = "simple",
    alignment: "Alignment | None" = None,
    max_grad_norm: float = 1.0,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    seed: int = 0,
    resume: StrPath | None = None,
) -> Iterator[Step]:
    """Train ``model`` in place, yielding after each optimizer step.

    ``accelerate`` chooses the device and, under ``torchrun`` or ``accelerate launch``, spreads the work
    over processes. The learning rate rises over ``warmup`` steps, stays, and falls to zero in a straight
    line from ``decay_from * steps`` on.
    Times and noise of step k depend on ``(seed, k)`` alone, so a resumed run goes on as if nothing had
    happened (the data go on too if ``batches`` does).

    Args:
        model: what to train; it is moved to the device.
        batches: what :func:`unpack` takes: x0, pairs (x0, captions), (x0, labels) or (x0, Condition), or a
            dict as Hugging Face's ``datasets`` gives them. Started again when it ends. A DataLoader is
            split between processes; of any other iterable, process r of n takes every n-th batch from the
            r-th on.
        steps: optimizer steps in all, those before ``resume`` included.
        lr: highest learning rate.
        warmup: steps over which the learning rate rises from 0; a tenth of the run at most.
        decay_from: share of the run, in [0, 1], after which it falls.
        weight_decay: share of the weights that is taken away in a step, times the learning rate.
        optimizer: "adamw" (Loshchilov & Hutter 2019), or "muon", which learns more in a step and wants a
            higher rate, 5e-3 where AdamW has 1e-3, see :class:`~minidiff.muon.Muon`.
        ema_decay: see :class:`EMA`.
        condition_dropout: see :func:`minidiff.loss`.
        weighting: see there.
        alignment: a term about pictures and captions to add to the loss; then every batch has captions.
        max_grad_norm: gradients longer than this are scaled down.
        precision: "bf16" computes the network in bfloat16 (weights and loss stay float32), "fp32" does
            not, "auto" uses bfloat16 where the hardware has it.
        seed: of times, noise and condition dropout.
        resume: folder in which :meth:`Step.save` left a state.

    Yields:
        One :class:`Step` per optimizer step.

    Raises:
        ValueError: ``steps`` is smaller than 1, ``batches`` is empty, a batch cannot be used, or an
            argument of :func:`minidiff.loss` is bad.
        FileNotFoundError: ``resume`` names a folder without a training state.
        RuntimeError: the loss or the length of the gradients is no number (NaN or infinity); that step is not
            taken.
    """
    steps, seed = whole("steps", steps), seed_number(seed)
    for name, value in (("lr", lr), ("max_grad_norm", max_grad_norm)):
        positive(name, value)
    if warmup < 0:
        raise ValueError(f"warmup = {warmup}: give a number of steps, 0 for none")
    if not 0 <= decay_from <= 1:
        raise ValueError(f"decay_from = {decay_from:g} is a share of the run: give it in [0, 1]")
    if optimizer not in (known := get_args(OptimizerName)):
        raise ValueError(f"unknown optimizer {optimizer!r}: choose one of {', '.join(known)}")
    if precision not in ("auto", "bf16", "fp32"):
        raise ValueError(f"unknown precision {precision!r}: choose one of auto, bf16, fp32")
    encoder: Any = model.encoder
    if getattr(encoder, "frozen", False):
        encoder.requires_grad_(False)  # whatever was asked of the whole model
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("all weights of this model are frozen: call model.requires_grad_(True) first")
    # Not an Accelerator: it would take precision from the environment, and leave none to the caller.
    here = processes()
    device, rank, count = here.device, here.process_index, here.num_processes
    model.to(device).train()
    on_cuda = device.type == "cuda"
    make: Any = partial(Muon, model) if optimizer == "muon" else partial(torch.optim.AdamW, trainable)
    learner = make(
        lr=torch.tensor(lr, device=device) if on_cuda else lr, betas=(0.9, 0.99), weight_decay=weight_decay,
        fused=device.type in ("cpu", "cuda"), capturable=on_cuda,
    )  # fmt: skip
    ema = EMA(model, ema_decay)
    state = TrainingState(model, ema, learner, here.is_main_process, seed)
    start = 0 if resume is None else state.load(Path(resume))
    objective: nn.Module = _Objective(model, weighting)
    if count > 1:
        devices = None if device.type == "cpu" else [here.local_process_index]
        objective = nn.parallel.DistributedDataParallel(objective, device_ids=devices)
    if isinstance(batches, DataLoader):
        same = ["generator"] if count > 1 else []  # all processes must shuffle alike
        batches = prepare_data_loader(batches, device, count, rank, put_on_device=True, rng_types=same)
        share = _forever(batches)
    elif on_cuda and alignment is None and hasattr(batches, "ahead"):  # this library's Batches
        share = batches.ahead(model.ids, itertools.count(rank, count))
    else:
        share = itertools.islice(_forever(batches), rank, None, count)
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    step = TrainingStep(
        objective, model, ema, learner, torch.Tensor.backward, autocast, max_grad_norm, in_memory=on_cuda
    )
    # Processes talk to each other between the kernels, and a term has captions of its own: no graph of those.
    alone = count == 1 and alignment is None
    update = Graphed(step) if on_cuda and alone else step
    generator = torch.Generator(device)
    ready = _ready(model, share, alignment)
    try:
        for index in range(start, steps):
            x0, condition, term = next(ready)
            generator.manual_seed(((seed * 1_000_003 + index) * 1_009 + rank) % 2**63)
            rate = lr * _trapezoid(index, steps, min(warmup, steps // 10), decay_from)
            draws = draw(model.schedule, x0, condition_dropout, generator)
            step.prepare(rate)
            loss_now = update(x0, condition, draws, term)
            # On a GPU to look is to wait: there the caller looks, with step.loss or step.save.
            if not on_cuda and not bool(step.good):
                why = (
                    "the batch holds such numbers"
                    if not bool(x0.isfinite().all())
                    else "a smaller lr may help"
                )
                raise RuntimeError(
                    f"{_broken(index, loss_now)}, at learning rate {rate:g}: {why}; the "
                    "weights are those of the step before"
                )
            averaged, main = cast(Diffusion, ema.module), here.is_main_process
            yield Step(index, averaged, rate, main, loss_now, state, step.good)
    finally:
        model.eval()


def unpack(batch: Batch) -> tuple[Tensor, Any]:
    """The samples of a batch, and what is said of them.

    Args:
        batch: x0 alone; a pair (x0, condition) with captions, labels, or a Condition; or a dict with one
            of :data:`X0_KEYS` and at most one of :data:`CONDITION_KEYS`.

    Returns:
        (x0, condition): a tensor of floats (B, ...), and what the model's encoder reads, or None.

    Raises:
        ValueError: the batch is of another form, or its samples are no tensor of floats.
    """
    if isinstance(batch, Mapping):
        found = [[key for key in keys if key in batch] for keys in (X0_KEYS, CONDITION_KEYS)]
        if len(found[0]) != 1 or len(found[1]) > 1:
            raise ValueError(
                f"a batch with {', '.join(map(repr, batch))}: give one of {', '.join(X0_KEYS)} and at most "
                f"one of {', '.join(CONDITION_KEYS)}"
            )
        batch = tuple(batch[key] for keys in found for key in keys)
    x0, *rest = batch if isinstance(batch, tuple | list) else (batch,)
    if len(rest) > 1:
        raise ValueError(f"a batch of {len(rest) + 1} parts: give x0, or (x0, condition)")
    if not isinstance(x0, Tensor):
        raise ValueError(
            f"a batch whose samples are {reprlib.repr(x0)}: give a tensor (B, ...), images in [-1, 1]"
        )
    if not x0.is_floating_point():
        raise ValueError(f"a batch holds {x0.dtype}, not floats: bring images to [-1, 1] first")
    return x0, rest[0] if rest else None


def _ready(
    model: Diffusion, batches: Iterator[Batch], alignment: "Alignment | None"
) -> Iterator[tuple[Tensor, Any, Term | None]]:
    """Batches as a step takes them: tensors on the device. On the CPU what does not learn is encoded here; on
    CUDA the step does it, and all captions are as long as the longest may be, for one graph to serve all."""
    encoder, device = model.encoder, model.device
    on_cuda = device.type == "cuda"
    learns = isinstance(encoder, nn.Module) and any(p.requires_grad for p in encoder.parameters())
    length = getattr(encoder, "max_length", 0) if on_cuda else 0
    for batch in batches:
        x0, values = unpack(batch)
        term = None if alignment is None else alignment.term(_captions(values))
        condition = model.ids(values)
        if not learns and not on_cuda:
            with torch.no_grad():
                condition = model.encode(condition)
        if isinstance(condition, Condition):
            condition = Condition(*(part.to(device) for part in condition)).pad(length)
        elif isinstance(condition, Tensor):
            missing = max(0, length - condition.shape[1]) if condition.ndim == 2 else 0
            condition = F.pad(condition, (0, missing), value=-1).to(device, non_blocking=True)
        yield x0.to(device, torch.float32, non_blocking=True), condition, term


def _captions(values: Any) -> Any:
    """The values, if they can be captions."""
    if isinstance(values, Condition) or not isinstance(values, tuple | list):
        raise ValueError("alignment compares pictures with captions: give batches (x0, captions)")
    return values


class _Objective(nn.Module):
    """Model and loss behind one ``forward``, which is what distributed training can wrap."""

    def __init__(self, model: Diffusion, weighting: str | Weighting):
        super().__init__()
        self.model, self.weighting = model, weighting

    def forward(
        self, x0: Tensor, condition: Condition | Tensor | None, draws: Draws, term: Term | None
    ) -> Tensor:
        return loss(self.model, x0, condition, weighting=self.weighting, alignment=term, draws=draws)


def _broken(index: int, loss: Tensor) -> str:
    return f"step {index + 1}: the loss ({loss.item():g}) or its gradient is no number"


def processes() -> PartialState:
    """Which device this process has, and which of how many it is, as ``accelerate`` sees it.

    Without an accelerator it must be told to use the CPU, or it takes each process of ``torchrun`` for
    one that runs alone.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


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
            raise ValueError("batches is empty (an iterator can be used only once: give a list or loader)")
