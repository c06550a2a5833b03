"""One optimizer step, a function of tensors (chapter 4).

A small network keeps a GPU busy for less time than Python needs to start its kernels. So on CUDA a step is
recorded once, as a graph of kernels, and replayed with other numbers (:class:`Graphed`). That works because
a :class:`TrainingStep` sees nothing but tensors: samples, conditions and all chance come in as arguments, the
learning rate and the weight of the average lie in memory that is written before the step.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_flatten, tree_unflatten

from minidiff.files import first_line

Call = Callable[[], Tensor]
WARM_UP = 3
"""Calls before a function is recorded: libraries choose their kernels and reserve memory in them."""
MOST_GRAPHS = 8
"""Shapes of arguments that are recorded; calls with others run as they are."""


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
        super().__init__(model)
        self.decay = decay
        self.module.eval().requires_grad_(False)

    def next_share(self) -> float:
        """The share of the model's weights in the next average, in (0, 1]; each call counts as an update."""
        n = int(self.n_averaged)
        self.n_averaged += 1
        return 1.0 if n == 0 else 1 - min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def mix(self, model: nn.Module, share: float | Tensor) -> None:
        """Let the model's weights have this share of the average, a number or a tensor of shape (); buffers
        are copied."""
        averages: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(model.parameters())
        shares: Any = [share] * len(averages) if isinstance(share, Tensor) else share
        torch._foreach_lerp_(averages, current, shares)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def update_parameters(self, model: nn.Module) -> None:
        """Mix in the weights of the model, as torch's training loops ask for it."""
        self.mix(model, self.next_share())


class TrainingStep:
    """Loss, gradients, optimizer and average: ``step(*arguments)`` is one update of the weights, unless loss
    or gradients are no numbers: then ``good`` is 0, and they stay as they are.

    Args:
        objective: gives the loss, ``objective(*arguments)``, a tensor of shape ().
        model: whose weights learn.
        ema: its average.
        optimizer: of the weights; where a learning rate is a tensor it is written, not replaced.
        backward: computes the gradients of the loss.
        autocast: makes the context in which the loss is computed.
        max_grad_norm: gradients longer than this are scaled down.
        in_memory: keep the average's share in a tensor on the model's device, which a graph can read.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        model: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        backward: Callable[[Tensor], None],
        autocast: Callable[[], AbstractContextManager[Any]],
        max_grad_norm: float,
        in_memory: bool,
    ):
        self.objective, self.model, self.ema, self.optimizer = objective, model, ema, optimizer
        self.backward, self.autocast, self.max_grad_norm = backward, autocast, max_grad_norm
        device = next(model.parameters()).device
        self.share: float | Tensor = torch.ones((), device=device) if in_memory else 1.0
        self.good = torch.ones((), device=device)  # 0 once a loss or a gradient was no number
        self.skip = torch.zeros((), device=device)
        if in_memory and optimizer.defaults.get("fused"):
            optimizer.found_inf = self.skip  # type: ignore[attr-defined]

    def prepare(self, lr: float) -> None:
        """Write what the next step reads from memory: its learning rate, and the share of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr
        share = self.ema.next_share()
        self.share = self.share.fill_(share) if isinstance(self.share, Tensor) else share

    def __call__(self, *arguments: Any) -> Tensor:
        """One step; the loss, of shape (), on the device."""
        with self.autocast():
            loss = self.objective(*arguments)
        self.optimizer.zero_grad()
        self.backward(loss)
        length = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.good *= (loss.detach() + length).isfinite()
        if isinstance(self.share, Tensor):
            self.skip.copy_(1 - self.good)  # where the fused optimizer looks: at 1 it takes no step
        elif not bool(self.good):
            return loss.detach()
        self.optimizer.step()
        self.ema.mix(self.model, self.share)
        return loss.detach()


class Graphed:
    """A function of tensors as CUDA graphs: after some calls it is recorded, and from then on replayed.

    There is a graph for each set of shapes. A function that cannot be recorded (it waits for the device, say)
    is called as it is, with one warning.

    Args:
        function: takes tensors, None, and tuples of them, in any nesting; gives a tensor. It may change
            memory that it knows, such as weights.
        warm: calls a function in the way that prepares its recording.
        record: makes of a function without arguments one that repeats what it does to memory.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        warm: Callable[[Call], Tensor] | None = None,
        record: Callable[[Call], Call] | None = None,
    ):
        self.function, self.warm, self.record = function, warm or run_aside, record or record_graph
        self.calls: Counter[Any] = Counter()
        self.graphs: dict[Any, tuple[list[Tensor], Call]] = {}
        self.possible = True

    def __call__(self, *arguments: Any) -> Tensor:
        leaves, form = tree_flatten(arguments)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (str(form), *((tensor.shape, tensor.dtype) for tensor in tensors))
        self.calls[key] += 1
        if key not in self.graphs:
            if not self.possible or len(self.graphs) == MOST_GRAPHS:
                return self.function(*arguments)
            if self.calls[key] <= WARM_UP:
                return self.warm(lambda: self.function(*arguments))
            held = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            try:
                repeat = self.record(lambda: self.function(*tree_unflatten(held, form)))
            except RuntimeError as error:
                warnings.warn(f"training goes on without a CUDA graph: {first_line(error)}", stacklevel=2)
                self.possible = False
                return self.function(*arguments)
            self.graphs[key] = [leaf for leaf in held if isinstance(leaf, Tensor)], repeat
        inputs, repeat = self.graphs[key]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        return repeat().clone()


def run_aside(function: Call) -> Tensor:
    """Call a function on a stream of its own: gradients remember the stream they were first made on, and what
    is recorded must not wait for the default one."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        output = function()
    current.wait_stream(stream)
    return output


def record_graph(function: Call) -> Call:
    """Record what a function does on the current CUDA device, without doing it; call the result to do it."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which bring the next batches, may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()

    def repeat() -> Tensor:
        graph.replay()
        return output

    return repeat
