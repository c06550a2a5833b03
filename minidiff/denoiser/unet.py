"""A convolutional denoiser: the U-Net (chapter 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.condition import Condition
from minidiff.denoiser import layers

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


class UNet(nn.Module):
    """U-Net for images, or with ``dims=1`` for sequences (Ronneberger et al. 2015; Ho et al. 2020, appendix
    B).

    Down: blocks of convolutions at ever coarser resolution. Up: the same way back, each block also
    seeing what the block at its resolution saw on the way down, so that detail need not pass the
    narrow middle.

    The image is first folded into patches (space-to-depth): a 64x64x3 image with ``patch=4`` becomes
    16x16x48. All work is then done at 16x16 and below, which makes training on a CPU possible.

    A shortcut adds the noisy image itself to the output, times a factor per channel that is learned as
    a function of time (EDM's c_skip, Karras et al. 2022, eq. 7, but not fixed by hand). Where there is
    little noise, most of the answer is in the image already, and layers that normalise what passes
    through them cannot copy it digit by digit.

    Args:
        channels: channels of the image or sequence.
        width: channels of the first level; a multiple of 32.
        multipliers: one entry per level; level i has ``width * multipliers[i]`` channels and half the
            resolution of the level before.
        blocks: residual blocks per level on the way down (one more on the way up).
        patch: side of the square of pixels, or length of the stretch, folded into channels; 1 for none.
        attention: levels with attention; only there do the condition's tokens enter.
        condition_dim: width of the condition, None for an unconditional network.
        conditioning: how it is listened to: "pooled" through scale and shift of every block (FiLM),
            "tokens" through cross-attention, or "both".
        positions: add to the features the sine and cosine codes of their positions. A convolution works
            everywhere alike and learns of positions only from the edges of the picture, which is too
            little where a prompt says "left of" (Liu et al. 2018).
        dims: 2 for images (B, C, H, W), 1 for sequences (B, C, L): sounds, time series.
        out_channels: channels of the output; None for as many as come in. With another number there is no
            shortcut.

    Raises:
        ValueError: a size is too small, ``dims`` is neither 1 nor 2, ``width`` is not a multiple of 32,
            ``attention`` names a level that is not there, ``conditioning`` is unknown, or is "tokens" where
            no level has attention.
    """

    def __init__(
        self,
        channels: int = 3,
        width: int = 64,
        multipliers: tuple[int, ...] = (1, 1, 2),
        blocks: int = 1,
        patch: int = 4,
        attention: tuple[int, ...] = (1, 2),
        condition_dim: int | None = None,
        conditioning: layers.Conditioning = "both",
        positions: bool = False,
        dims: int = 2,
        out_channels: int | None = None,
    ):
        super().__init__()
        if dims not in (1, 2):
            raise ValueError(f"dims = {dims}: 2 is for images, 1 for sequences")
        sizes = {"channels": channels, "patch": patch, "condition_dim": condition_dim or 1}
        for name, size in {**sizes, "levels": len(multipliers)}.items():
            whole(name, size)
        for multiplier in multipliers:
            whole("one of multipliers", multiplier)
        whole("blocks", blocks, 0)
        if whole("width", width, 32) % 32:
            raise ValueError(f"width = {width} is not a multiple of 32")
        if not set(attention) <= set(range(len(multipliers))):
            there = tuple(level for level in attention if level in range(len(multipliers)))
            raise ValueError(
                f"attention = {attention} names a level outside 0..{len(multipliers) - 1}, as many as "
                f"multipliers: give attention={there}"
            )
        self.config = {
            "channels": channels, "width": width, "multipliers": list(multipliers), "blocks": blocks,
            "patch": patch, "attention": list(attention), "condition_dim": condition_dim,
            "conditioning": conditioning, "positions": positions, "dims": dims,
            "out_channels": out_channels,
        }  # fmt: skip
        pooled_dim, token_dim = layers.condition_widths(condition_dim, conditioning, bool(attention))
        self.channels, self.patch, self.condition_dim = channels, patch, condition_dim
        self.positions, self.dims = positions, dims
        self.multiple = patch * 2 ** (len(multipliers) - 1)
        self.embedding = layers.Embedding(4 * width, pooled_dim)

        def block(c_in: int, c_out: int, level: int) -> Block:
            return Block(c_in, c_out, 4 * width, level in attention, token_dim, dims)

        c, skips, conv = width, [width], CONV[dims]
        self.first = conv(channels * patch**dims, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, multiplier in enumerate(multipliers):
            if level > 0:
                self.down.append(conv(c, c, 3, stride=2, padding=1))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(block(c, width * multiplier, level))
                c = width * multiplier
                skips.append(c)
        self.middle = nn.ModuleList(block(c, c, level) for _ in range(2))
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(block(c + skips.pop(), width * multiplier, level))
                c = width * multiplier
            if level > 0:
                self.up.append(conv(c, c, 3, padding=1))
        self.norm = nn.GroupNorm(8, c)
        self.last = layers.zero_init(conv(c, (out_channels or channels) * patch**dims, 3, padding=1))
        straight = out_channels in (None, channels)
        self.shortcut = layers.zero_init(nn.Linear(4 * width, channels)) if straight else None
        if dims == 2:
            self.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and GPU

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The raw output for noisy images.

        Args:
            x: (B, channels, H, W), or (B, channels, L); H and W, or L, multiples of patch * 2^(levels - 1).
            t: (B,) times in [0, 1].
            condition: for each sample what it should show, or None.

        Returns:
            Tensor shaped like ``x``, with ``out_channels`` channels.

        Raises:
            ValueError: ``x`` does not have that shape, or the condition not that width.
        """
        layers.check_shape(x, self.channels, self.multiple, self.dims)
        layers.check_condition(condition, self.condition_dim)
        embedding = self.embedding(t, condition)  # (B, 4 * width)
        shortcut: Tensor | float = 0.0
        if self.shortcut is not None:
            shortcut = layers.over(self.shortcut(embedding), x) * x  # shaped like x
        h = self.first(layers.fold(x, self.patch))  # (B, width, H / patch, W / patch)
        if self.positions:
            rows, columns = (1, *h.shape[2:])[-2:]  # a sequence is one row
            codes = layers.image_positions(rows, columns, h.shape[1], h.device)  # (H W / patch², width)
            h = h + codes.T.unflatten(1, h.shape[2:]).to(h)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding, condition) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding, condition)
        for layer in self.up:
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], dim=1), embedding, condition)
            else:
                h = layer(F.interpolate(h, scale_factor=2.0))
        return shortcut + layers.unfold(self.last(F.silu(self.norm(h))), self.patch)


class Block(nn.Module):
    """Two convolutions around a residual path, scaled and shifted by the embedding (FiLM, Perez et al.
    2018), followed by attention on the levels that have it."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding_dim: int,
        attend: bool,
        condition_dim: int | None,
        dims: int = 2,
    ):
        super().__init__()
        conv = CONV[dims]
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), conv(c_in, c_out, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = layers.zero_init(conv(c_out, c_out, 3, padding=1))
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = layers.Attention(c_out, condition_dim) if attend else None
        self.attention_norm = nn.GroupNorm(8, c_out) if attend else None

    def forward(self, x: Tensor, embedding: Tensor, condition: Condition | None) -> Tensor:
        scale, shift = layers.over(self.scale_shift(embedding), x).chunk(2, dim=1)  # (B, C, 1, 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        x = self.skip(x) + self.conv2(F.silu(h))
        if self.attention is None or self.attention_norm is None:
            return x
        positions = self.attention_norm(x).flatten(2).transpose(1, 2)  # (B, H * W, C)
        return x + self.attention(positions, condition).transpose(1, 2).unflatten(2, x.shape[2:])
