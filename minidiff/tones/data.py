"""An endless data set of captioned tones: every item follows from a seed."""

import random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from minidiff.device import check_memory
from minidiff.sounds import to_int16
from minidiff.tones.captions import caption
from minidiff.tones.sound import SAMPLES, Sound, Split, check_split, sample_sound
from minidiff.tones.synthesis import play


class Tones(Dataset[tuple[Tensor, str]]):
    """Captioned sounds; item i depends on ``split``, ``seed`` and i alone.

    ``data[i]`` is the wave, (1, 8192) float in [-1, 1], with its caption of epoch 0. ``data.sound(i)`` says
    what it is, ``data.caption(i, epoch)`` words it anew in each epoch, ``data.waves()`` plays all.

    Args:
        length: number of sounds.
        split: "train", "held_out" or "all", as in :func:`~minidiff.tones.sound.sample_sound`.
        seed: another seed gives another data set.

    Raises:
        ValueError: a negative length or an unknown split.
        IndexError: an item outside the data set.
    """

    def __init__(self, length: int = 16_000, split: Split = "train", seed: int = 0) -> None:
        check_split(split)
        if length < 0:
            raise ValueError(f"length {length} is negative: use 0 or more")
        self.length, self.split, self.seed = length, split, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        wave = play(self.sound(index), self.chance(index, "wave"))
        return torch.from_numpy(wave)[None], self.caption(index)

    def sound(self, index: int) -> Sound:
        """What sound ``index`` is."""
        return sample_sound(self.chance(index, "sound"), self.split)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A true caption of sound ``index``, worded anew in each epoch."""
        return caption(self.sound(index), self.chance(index, f"caption {epoch}"))

    def waves(self, rows: range | None = None) -> Tensor:
        """All sounds, or those of some rows, (N, 1, 8192) int16, as a .wav file has them.

        Raises:
            IndexError: a row is outside the data set.
            ValueError: there is not as much memory.
        """
        rows = range(self.length) if rows is None else rows
        check_memory("sounds", len(rows), 2 * SAMPLES)
        waves = np.empty((len(rows), 1, SAMPLES), np.int16)
        for place, index in enumerate(rows):
            waves[place] = to_int16(self[index][0]).numpy()
        return torch.from_numpy(waves)

    def chance(self, index: int, purpose: str) -> random.Random:
        """The random generator of item ``index`` for one purpose, such as its wave."""
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} is outside a data set of {self.length}")
        return random.Random(f"{self.seed} {self.split} {index % self.length} {purpose}")
