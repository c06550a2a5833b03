"""Sounds as 16-bit numbers, and as numbers in [-1, 1]: where they enter the library and where they leave
it."""

import wave

import torch
from torch import Tensor

from minidiff.files import StrPath, write_whole

RATE = 8000
"""Samples a second of every sound in this library."""
_TOP = 32767


def from_int16(samples: Tensor) -> Tensor:
    """Samples (...) int16 as float32 in [-1, 1]."""
    return samples.float() / _TOP


def to_int16(x: Tensor) -> Tensor:
    """Numbers (...) as the nearest samples, int16, those outside [-1, 1] cut off. What is int16 stays."""
    if x.dtype == torch.int16:
        return x.detach()
    return (x.detach().float().clamp(-1, 1) * _TOP).round().to(torch.int16)


def save_wav(x: Tensor, path: StrPath, rate: int = RATE) -> None:
    """Write a sound, or several one after another, as a .wav file of one channel and 16 bits.

    Args:
        x: (..., 1, L) or (L,), in [-1, 1] or int16.
        path: where to.
        rate: samples a second.

    Raises:
        ValueError: ``x`` holds no sound, or has more than one channel.
    """
    if x.numel() == 0 or (x.ndim > 1 and x.shape[-2] != 1):
        raise ValueError(f"x has shape {tuple(x.shape)}: sounds are (..., 1, L) or (L,)")
    with write_whole(path) as unfinished, wave.open(str(unfinished), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(to_int16(x).flatten().cpu().numpy().astype("<i2").tobytes())
