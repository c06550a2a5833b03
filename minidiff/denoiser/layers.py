"""What the networks share: how they listen to a condition, the embedding of time, and attention."""

import math
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.condition import Condition

Conditioning = Literal["both", "pooled", "tokens"]
"""How a network listens to its condition: through the pooled vector, which joins the embedding of time,
through the tokens, which attention looks at, or both."""

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def condition_widths(
    condition_dim: int | None, conditioning: Conditioning, attends: bool
) -> tuple[int | None, int | None]:
    """The widths of pooled vector and tokens that a network needs weights for; None for no weights.

    Args:
        condition_dim: width of the condition, None for an unconditional network.
        conditioning: which of the two the network listens to.
        attends: whether it has attention at all.

    Raises:
        ValueError: ``conditioning`` is unknown, or is "tokens" where nothing attends.
    """
    if conditioning not in get_args(Conditioning):
        raise ValueError(
            f"unknown conditioning {conditioning!r}: choose one of {', '.join(get_args(Conditioning))}"
        )
    if condition_dim is not None and conditioning == "tokens" and not attends:
        raise ValueError("conditioning = 'tokens', but no attention is there to look at them")
    pooled_dim = None if conditioning == "tokens" else condition_dim
    return pooled_dim, None if conditioning == "pooled" else condition_dim


def check_condition(condition: Condition | None, condition_dim: int | None) -> None:
    """Raise ValueError for a condition of another width than ``condition_dim``, or where there is none.

    A condition that is not looked at would otherwise seem like a bad model.
    """
    if condition is None:
        return
    if condition_dim is None:
        raise ValueError("this network takes no condition: give it a condition_dim")
    for wide in (condition.pooled.shape[1], condition.tokens.shape[2]):
        if wide != condition_dim:
            raise ValueError(f"the condition is {wide} wide, the network's condition_dim is {condition_dim}")


class Embedding(nn.Module):
    """Time and pooled condition as one vector that every block listens to.

    Time enters through sines and cosines of 32 frequencies from 1 to 1000 (Vaswani et al. 2017,
    section 3.5), the pooled condition through one linear map; a missing condition adds nothing.

    Args:
        width: width of the vector.
        condition_dim: width D of the condition, None to leave its pooled vector alone.
    """

    def __init__(self, width: int, condition_dim: int | None):
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.logspace(0, 3, 32, dtype=torch.float32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Linear(condition_dim, width, bias=False) if condition_dim else None

    def forward(self, t: Tensor, condition: Condition | None) -> Tensor:
        angles = t[:, None].float() * self.frequencies  # (B, 32)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (B, 64), float32 until here
        embedding = self.time(waves.to(next(self.time.parameters()).dtype))  # (B, width)
        if condition is not None and self.pooled is not None:
            embedding = embedding + self.pooled(condition.pooled)
        return F.silu(embedding)


class Attention(nn.Module):
    """Each position looks at all positions and, at the same time, at the tokens of the condition.

    Self- and cross-attention share one softmax: keys and values of both are laid side by side, so a
    sample whose condition is dropped simply has fewer places to look at.

    Args:
        width: width C of the positions; a multiple of ``head_width``.
        condition_dim: width D of the condition tokens, None for self-attention alone.
        head_width: width of one head.
    """

    def __init__(self, width: int, condition_dim: int | None, head_width: int = 32):
        super().__init__()
        if width % head_width:
            raise ValueError(f"width = {width} is not a multiple of the head width {head_width}")
        self.heads = width // head_width
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.token_key_value = nn.Linear(condition_dim, 2 * width) if condition_dim else None
        self.out = zero_init(nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        key_value, mask = self.key_value(x), None  # x (B, N, C)
        if condition is not None and self.token_key_value is not None:
            key_value = torch.cat([key_value, self.token_key_value(condition.tokens)], dim=1)
            mask = F.pad(condition.mask, (x.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, N + T)
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N or N + T, head_width)
            for part in (self.query(x), *key_value.chunk(2, dim=2))
        )
        # For sequences this short, PyTorch's fused CPU kernel is several times slower going backward.
        backends = [SDPBackend.MATH] if x.device.type == "cpu" else FUSED
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


Layer = TypeVar("Layer", nn.Linear, nn.Conv1d | nn.Conv2d)


def zero_init(layer: Layer) -> Layer:
    """The layer with weights and bias at zero, so that a residual branch starts as "add nothing"."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def image_positions(height: int, width: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Sine and cosine codes of the places of a grid, (height * width, dim) (Vaswani et al. 2017).

    Half of the numbers tell the row, half the column. They are computed for the grid at hand, so one
    network takes images of any size; on the device, since a recorded step may not bring anything there.
    """
    frequencies = torch.linspace(0, -math.log(100), dim // 4, device=device, dtype=torch.float32).exp()
    rows = torch.arange(height, device=device)[:, None] * frequencies  # (height, dim/4)
    columns = torch.arange(width, device=device)[:, None] * frequencies
    row_codes = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(-1, width, -1)
    column_codes = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(height, -1, -1)
    return torch.cat([row_codes, column_codes], dim=2).flatten(0, 1)


def over(values: Tensor, x: Tensor) -> Tensor:
    """One number per sample and channel, (B, C), with the axes it needs to be multiplied with x (B, C,
    ...)."""
    return values.reshape(*values.shape, *(1 for _ in x.shape[2:]))


def fold(x: Tensor, patch: int) -> Tensor:
    """Patches into channels: (B, C, H, W) to (B, C * patch², H / patch, W / patch), and (B, C, L) to
    (B, C * patch, L / patch)."""
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)
    return x.unflatten(2, (-1, patch)).transpose(2, 3).flatten(1, 2)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The way back from :func:`fold`."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch)
    return x.unflatten(1, (-1, patch)).transpose(2, 3).flatten(2)


def check_shape(x: Tensor, channels: int, multiple: int, dims: int = 2) -> None:
    """Raise ValueError unless ``x`` is (B, channels, H, W), or (B, channels, L) where ``dims`` is 1, with
    sides that are multiples of ``multiple``."""
    if x.ndim != 2 + dims or x.shape[1] != channels or any(side % multiple for side in x.shape[2:]):
        sides, shape = ("H and W multiples", "H, W") if dims == 2 else ("L a multiple", "L")
        remedy = ""
        if x.ndim == 2 + dims and x.shape[1] == channels:
            padded = "x".join(str(-(-side // multiple) * multiple) for side in x.shape[2:])
            remedy = f": pad to {padded}, or give the network a smaller patch or fewer levels"
        raise ValueError(
            f"x has shape {tuple(x.shape)}: this network takes (B, {channels}, {shape}) "
            f"with {sides} of {multiple}{remedy}"
        )
