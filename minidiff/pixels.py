"""Pictures as bytes, and as numbers in [-1, 1]: where they enter the library and where they leave it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff.files import StrPath, write_whole
from minidiff.sounds import from_int16


def from_bytes(pixels: Tensor) -> Tensor:
    """Pixels (...) uint8 as float32 in [-1, 1]; samples of sound, int16, too."""
    if pixels.dtype == torch.int16:
        return from_int16(pixels)
    return pixels.float() / 127.5 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Numbers (...) as the nearest pixels, uint8, those outside [-1, 1] cut off. Bytes stay as they are."""
    if x.dtype == torch.uint8:
        return x.detach()
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One image (1 or 3, H, W), in [-1, 1] or uint8, as a PIL image of the same size."""
    pixels = pixel_array(image[None])[0]
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(x: Tensor, *, ncols: int = 8, scale: int = 1, padding: int = 2) -> Image.Image:
    """Images side by side in one PIL image, pixel for pixel.

    Args:
        x: (B, C, H, W) in [-1, 1], or uint8, with 1 or 3 channels.
        ncols: images per row.
        scale: each pixel becomes a square of this side.
        padding: white pixels between the images.

    Raises:
        ValueError: ``x`` does not hold images.
    """
    pixels = pixel_array(x).repeat(scale, axis=1).repeat(scale, axis=2)  # (B, H, W, 1 or 3)
    n, height, width, channels = pixels.shape
    ncols = min(ncols, n)
    nrows = -(-n // ncols)
    down, across = height + padding, width + padding
    whole = np.full((nrows * down - padding, ncols * across - padding, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // ncols * down, i % ncols * across
        whole[top : top + height, left : left + width] = image
    return Image.fromarray(whole.repeat(3, axis=2) if channels == 1 else whole)


def save_grid(x: Tensor, path: StrPath, *, ncols: int = 8, scale: int = 1) -> None:
    """Write :func:`grid` to ``path``; the ending of its name says in which format, e.g. .png."""
    with write_whole(path) as unfinished:
        grid(x, ncols=ncols, scale=scale).save(unfinished)


def check_image_name(path: Path) -> None:
    """Raise ValueError unless Pillow can write a file of that name, before any work is done."""
    Image.init()
    if path.suffix.lower() not in Image.EXTENSION:
        ending = path.suffix or "no ending"
        raise ValueError(f"--output {path}: {ending} is no image format; use .png, or .wav for sounds")


def pixel_array(x: Tensor) -> np.ndarray:
    """Images (B, 1 or 3, H, W) as an array (B, H, W, 1 or 3) of bytes.

    Raises:
        ValueError: ``x`` does not hold images.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or len(x) == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: images are (B, 1 or 3, H, W)")
    return to_bytes(x).permute(0, 2, 3, 1).cpu().numpy()
