"""A denoiser for sound: a U-Net that looks at a wave through a lapped cosine transform (chapter 11)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.condition import Condition
from minidiff.denoiser import layers
from minidiff.denoiser.unet import UNet


def lapped_basis(frame: int) -> Tensor:
    """The waves of which a frame is made, (frame, 2 * frame): row k is a cosine of
    ``(k + 1/2) / (2 * frame)`` periods a sample, under a half sine; neighbouring frames overlap by a half
    (MDCT, Princen et al. 1987)."""
    n, k = torch.arange(2 * frame, dtype=torch.float64), torch.arange(frame, dtype=torch.float64)[:, None]
    window = torch.sin(math.pi * (n + 0.5) / (2 * frame))
    angles = math.pi / frame * (n + 0.5 + frame / 2) * (k + 0.5)
    return (math.sqrt(2 / frame) * window * torch.cos(angles)).float()


def to_frames(x: Tensor, basis: Tensor) -> Tensor:
    """A wave as what it holds of each frequency, frame by frame: a rotation, so noise stays white noise.

    The wave is taken as a ring: the last frame overlaps the first.

    Args:
        x: (B, 1, L), L a multiple of ``frame``.
        basis: from :func:`lapped_basis`.

    Returns:
        (B, frame, L / frame); its sum of squares is that of ``x``.
    """
    frame = basis.shape[0]
    return F.conv1d(torch.cat([x, x[:, :, :frame]], dim=2), basis[:, None], stride=frame)


def from_frames(coefficients: Tensor, basis: Tensor) -> Tensor:
    """The way back from :func:`to_frames`: (B, frame, N) to (B, 1, frame * N)."""
    frame = basis.shape[0]
    x = F.conv_transpose1d(coefficients, basis[:, None], stride=frame)  # (B, 1, frame * (N + 1))
    return torch.cat([x[:, :, :frame] + x[:, :, -frame:], x[:, :, frame:-frame]], dim=2)


class WaveUNet(nn.Module):
    """A :class:`UNet` for sound: waves in, waves out, (B, 1, L).

    Inside, the wave is a sequence of frames with one channel per frequency, as an image is a grid of patches.
    The transform is orthonormal and fixed: it loses nothing, and white noise stays white, so this *is*
    diffusion of waves. Only the network has an easier view: a steady tone is a few loud channels.

    Args:
        frame: samples between frames, and frequencies in each.
        gate: let the network say, for each frequency of each frame, how much of what it sees to keep, besides
            what to add. Noise fills all channels and a tone few; a layer that is narrower than the frame
            cannot carry the noise along to take it away, but it can shut a gate.
        width, multipliers, blocks, attention, condition_dim, conditioning: as for :class:`UNet`.

    Raises:
        ValueError: as for :class:`UNet`.
    """

    def __init__(
        self,
        width: int = 96,
        multipliers: tuple[int, ...] = (1, 1, 1),
        blocks: int = 1,
        frame: int = 128,
        attention: tuple[int, ...] = (0, 1, 2),
        condition_dim: int | None = None,
        conditioning: layers.Conditioning = "both",
        gate: bool = True,
    ):
        super().__init__()
        self.net = UNet(
            frame, width, multipliers, blocks, 1, attention, condition_dim, conditioning, positions=True,
            dims=1, out_channels=2 * frame if gate else None,
        )  # fmt: skip
        self.config = {
            "width": width, "multipliers": list(multipliers), "blocks": blocks, "frame": frame,
            "attention": list(attention), "condition_dim": condition_dim, "conditioning": conditioning,
            "gate": gate,
        }  # fmt: skip
        self.multiple, self.condition_dim, self.gate = frame * self.net.multiple, condition_dim, gate
        self.basis: Tensor
        self.register_buffer("basis", lapped_basis(frame), persistent=False)

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The raw output for noisy waves.

        Args:
            x: (B, 1, L); L a multiple of frame * 2^(levels - 1).
            t: (B,) times in [0, 1].
            condition: for each sample what it should be, or None.

        Returns:
            Tensor shaped like ``x``.

        Raises:
            ValueError: ``x`` does not have that shape, or the condition not that width.
        """
        layers.check_shape(x, 1, self.multiple, dims=1)
        with torch.autocast(x.device.type, enabled=False):
            frames = to_frames(x.to(self.basis), self.basis)  # (B, frame, L / frame)
        out = self.net(frames, t, condition)
        with torch.autocast(x.device.type, enabled=False):
            out = out.to(self.basis)
            if self.gate:
                add, keep = out.chunk(2, dim=1)
                out = add + keep * frames
            return from_frames(out, self.basis)
