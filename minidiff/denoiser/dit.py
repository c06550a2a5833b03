"""A transformer denoiser: the DiT (chapter 3)."""

import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.condition import Condition
from minidiff.denoiser import layers


class DiT(nn.Module):
    """Diffusion transformer (Peebles & Xie 2023) with text tokens in its attention (as PixArt-alpha).

    The image is cut into patches, each patch becomes one token, and a plain transformer lets every
    patch look at every other and at the words of the prompt. Time and pooled condition set scale,
    shift and gate of each block ("adaLN-Zero", section 3.2): at the start every gate is closed and the
    network is the identity on its tokens.

    Args:
        channels: channels of the image.
        width: width of the tokens; a multiple of 64.
        depth: number of blocks.
        patch: side of a patch in pixels.
        condition_dim: width of the condition, None for an unconditional network.
        conditioning: how it is listened to: "pooled" through adaLN, "tokens" through attention, or
            "both".

    Raises:
        ValueError: a size is too small, ``width`` is not a multiple of 64, ``conditioning`` is unknown, or
            is "tokens" where there is no block.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 192,
        depth: int = 6,
        patch: int = 4,
        condition_dim: int | None = None,
        conditioning: layers.Conditioning = "both",
    ):
        super().__init__()
        sizes = {"channels": channels, "patch": patch, "condition_dim": condition_dim or 1}
        for name, size in sizes.items():
            whole(name, size)
        whole("depth", depth, 0)
        if whole("width", width, 64) % 64:
            raise ValueError(f"width = {width} is not a multiple of 64")
        self.config = {
            "channels": channels, "width": width, "depth": depth, "patch": patch,
            "condition_dim": condition_dim, "conditioning": conditioning,
        }  # fmt: skip
        pooled_dim, token_dim = layers.condition_widths(condition_dim, conditioning, depth > 0)
        self.channels, self.patch, self.condition_dim = channels, patch, condition_dim
        self.embedding = layers.Embedding(width, pooled_dim)
        self.first = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, token_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.scale_shift = layers.zero_init(nn.Linear(width, 2 * width))
        self.last = layers.zero_init(nn.Linear(width, channels * patch**2))

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The raw output for noisy images.

        Args:
            x: (B, channels, H, W); H and W multiples of ``patch``.
            t: (B,) times in [0, 1].
            condition: for each sample what it should show, or None.

        Returns:
            Tensor shaped like ``x``.

        Raises:
            ValueError: the image does not have that shape, or the condition not that width.
        """
        layers.check_shape(x, self.channels, self.patch)
        layers.check_condition(condition, self.condition_dim)
        embedding = self.embedding(t, condition)  # (B, width)
        patches = F.pixel_unshuffle(x, self.patch)  # (B, channels * patch², rows, columns)
        rows, columns = patches.shape[2:]
        h = self.first(patches.flatten(2).transpose(1, 2))  # (B, rows * columns, width)
        h = h + layers.image_positions(rows, columns, h.shape[2], h.device).to(h)
        for block in self.blocks:
            h = block(h, embedding, condition)
        scale, shift = self.scale_shift(embedding)[:, None].chunk(2, dim=2)  # (B, 1, width)
        h = self.last(self.norm(h) * (1 + scale) + shift)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (rows, columns)), self.patch)


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each with its own scale, shift and gate from the embedding."""

    def __init__(self, width: int, condition_dim: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = layers.Attention(width, condition_dim)
        # Attention ends in a zero layer of its own; behind a closed gate it would never start to learn.
        nn.init.xavier_uniform_(self.attention.out.weight)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = layers.zero_init(nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, embedding: Tensor, condition: Condition | None) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding)[:, None].chunk(6, 2)
        h = h + gate1 * self.attention(self.norm1(h) * (1 + scale1) + shift1, condition)
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)
