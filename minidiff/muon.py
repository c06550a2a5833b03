"""Muon: an optimizer that turns each matrix of a network as a whole (Jordan et al. 2024).

AdamW scales every single weight by the size of its own gradients. But the weights of a layer are a matrix,
and its gradient is dominated by a few directions, those that many samples agree about. Muon keeps the
momentum of the gradient and makes all its directions equally long before it steps, so that the rare ones are
learned as fast as the common ones. A step takes little more time than AdamW's.

``torch.optim.Muon`` does the same for parameters with two dimensions. The kernels of a U-Net have four, its
norms and biases are no matrices at all, and a step that is recorded as a CUDA graph reads its learning rate
from memory. Hence this one, which tests hold against torch's.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.device import has_bf16

SMALLEST = 32
"""A weight with fewer rows or columns is left to AdamW."""
TURNS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial that is iterated, of Jordan et al. 2024: they bring singular values between
0.01 and 1 to about 1 (0.6 to 1.3) within :data:`ITERATIONS` iterations."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Muon for the matrices of a model, AdamW for the rest, at one learning rate.

    A step of a matrix with R rows and C columns is ``lr * 0.2 * sqrt(max(R, C))`` times an orthogonal
    matrix, so that its weights move as far as AdamW's usually do (Liu et al. 2025, eq. 4), and both can share
    a learning rate. A convolution's kernel is one row for each channel that comes out.

    Args:
        model: whose weights with gradients learn. Tables of :class:`torch.nn.Embedding` are no matrices in
            this sense: most of their rows have no gradient in a step.
        lr: learning rate, a number or a tensor of shape ().
        options: of :class:`torch.optim.AdamW`.
    """

    def __init__(self, model: nn.Module, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__((p for p in model.parameters() if p.requires_grad), lr=lr, **options)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.matrices = [p for p in self.param_groups[0]["params"] if id(p) not in tables and _is_matrix(p)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change the weights by their gradients; not where ``found_inf`` is 1, as in torch's fused."""
        skip: Tensor | None = getattr(self, "found_inf", None)
        taken = 1.0 if skip is None else 1 - skip  # a number that a recorded step reads, too
        group = self.param_groups[0]
        rate = group["lr"] * taken
        moved = [p for p in self.matrices if p.grad is not None]
        gradients = [p.grad for p in moved]
        ahead = [self._momentum(p, taken) for p in moved]
        for p, turned in zip(moved, orthogonal(ahead), strict=True):
            rows, columns = p.shape[0], p[0].numel()
            p.mul_(1 - rate * group["weight_decay"])
            p.sub_(turned.to(p) * (rate * 0.2 * max(rows, columns) ** 0.5))
            p.grad = None  # it is done: AdamW passes it over
        super().step()
        for p, gradient in zip(moved, gradients, strict=True):
            p.grad = gradient

    def _momentum(self, p: Tensor, taken: float | Tensor) -> Tensor:
        """Nesterov's: the gradient, ahead by the momentum that it joins if the step is taken (1, else 0)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            # AdamW looks for a "step" when it is loaded, for all that it holds.
            state |= {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}
        good = torch.as_tensor(taken, device=p.device) > 0
        gradient = torch.where(good, p.grad, 0)  # a number even where the gradient is none
        state["step"] += taken
        state["momentum"].lerp_(gradient, (1 - MOMENTUM) * taken)
        return gradient.lerp(state["momentum"], MOMENTUM)


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST


def orthogonal(matrices: Iterable[Tensor]) -> list[Tensor]:
    """For each matrix the nearest one with orthogonal rows or columns, roughly: its singular values, whatever
    they were, become about 1 (Newton-Schulz iteration, Jordan et al. 2024).

    Args:
        matrices: (R, ...) each; what follows R counts as columns.

    Returns:
        Tensors of the same shapes; in bfloat16 where the device computes in it faster.
    """
    matrices = list(matrices)
    found: dict[int, Tensor] = {}
    alike: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(matrices):
        alike.setdefault((len(m), m[0].numel()), []).append(i)
    for (rows, columns), numbers in alike.items():  # those of one shape together: fewer, larger products
        x = torch.stack([matrices[i].flatten(1) for i in numbers])  # (N, R, C)
        x = x.to(torch.bfloat16 if has_bf16(x.device) else torch.float32)
        x = x.mT if rows > columns else x
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
        a, b, c = TURNS
        for _ in range(ITERATIONS):
            squares = x @ x.mT
            x = a * x + (b * squares + c * squares @ squares) @ x
        x = x.mT if rows > columns else x
        found |= {i: x[k].reshape(matrices[i].shape) for k, i in enumerate(numbers)}
    return [found[i] for i in range(len(matrices))]
