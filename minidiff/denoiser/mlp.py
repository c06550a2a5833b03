"""A denoiser for points (chapter 3)."""

import torch
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.condition import Condition
from minidiff.denoiser.layers import Embedding, check_condition, zero_init


class MLP(nn.Module):
    """A residual multilayer perceptron for vectors: the smallest denoiser that can be right.

    Args:
        dim: number of coordinates of a point.
        width: width of the hidden layers.
        depth: number of residual blocks.
        condition_dim: width of the condition (only its pooled vector is used), None for none.

    Raises:
        ValueError: a size is no whole number, or too small.
    """

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3, condition_dim: int | None = None):
        super().__init__()
        whole("depth", depth, 0)
        for name, value in (("dim", dim), ("width", width), ("condition_dim", condition_dim or 1)):
            whole(name, value)
        self.config = {"dim": dim, "width": width, "depth": depth, "condition_dim": condition_dim}
        self.dim, self.condition_dim = dim, condition_dim
        self.embedding = Embedding(width, condition_dim)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.last = zero_init(nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The raw output for noisy points.

        Args:
            x: (B, dim).
            t: (B,) times in [0, 1].
            condition: for each point its condition, or None.

        Returns:
            (B, dim).

        Raises:
            ValueError: the points have another number of coordinates, or the condition another width.
        """
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}: this network takes (B, {self.dim})")
        check_condition(condition, self.condition_dim)
        embedding = self.embedding(t, condition)  # (B, width)
        h = self.first(x)
        for block in self.blocks:
            h = h + block(torch.cat([h, embedding], dim=1))
        return self.last(nn.functional.silu(h))
