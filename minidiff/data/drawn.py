"""What all drawn data sets share: items that follow from a seed, and rendering with all cores.

A drawn data set knows how to choose what an item shows, how to draw it and how to word it
(:class:`~minidiff.data.critters.Critters`, :class:`~minidiff.data.duo.Duo`). The rest is here.
"""

import mmap
import multiprocessing
import os
import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import ceil
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "held_out", "all"]


class Drawn(Dataset[tuple[Tensor, str]], ABC):
    """Captioned drawings; item i depends on ``split``, ``seed`` and i.

    ``data[i]`` is the picture, (3, size, size) float in [-1, 1], with its caption of epoch 0.
    A subclass says what picture i looks like and how its caption reads, with chance from
    :meth:`chance`.

    Args:
        length: number of pictures.
        size: height and width in pixels.
        split: "train", "held_out" or "all".
        seed: another seed gives another data set.

    Raises:
        ValueError: a negative length, a size below 8 or an unknown split.
        IndexError: an item outside the data set.
    """

    def __init__(
        self, length: int = 24_000, size: int = 64, split: Split = "train", seed: int = 0
    ) -> None:
        check_split(split)
        if length < 0:
            raise ValueError(f"length {length} is negative: use 0 or more")
        check_size(size)
        self.length, self.size, self.split, self.seed = length, size, split, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        pixels = torch.from_numpy(self._pixels(index))
        return pixels.float() / 127.5 - 1, self.caption(index)

    @abstractmethod
    def caption(self, index: int, epoch: int = 0) -> str:
        """A true caption of picture ``index``, worded anew in each epoch."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Picture ``index`` as a PIL image."""

    def captions(self, epoch: int = 0) -> list[str]:
        """The captions of all pictures in this epoch."""
        return [self.caption(index, epoch) for index in range(self.length)]

    def images(self, workers: int | None = None) -> Tensor:
        """Draw all pictures, with several processes where the system can fork (not on macOS).

        Args:
            workers: number of processes; None means one per usable core. The result does not depend
                on it.

        Returns:
            The pictures as bytes, (N, 3, size, size) uint8. Indexing gives ``images / 127.5 - 1``.

        Raises:
            ValueError: ``workers`` is below 1.
            RuntimeError: a process died.
        """
        if workers is None:
            workers = _usable_cores()
        if workers < 1:
            raise ValueError(f"workers {workers} is too few: use 1 or more, or None")
        # Forked processes share this memory, so pictures need not be sent from one to the other.
        memory = mmap.mmap(-1, max(1, self.length * 3 * self.size**2))
        pixels = np.frombuffer(memory, np.uint8, self.length * 3 * self.size**2)
        pixels = pixels.reshape(self.length, 3, self.size, self.size)
        if _can_fork() and workers > 1:
            self._draw_forked(pixels, workers)
        else:
            self._draw_into(pixels, range(self.length))
        return torch.from_numpy(pixels)

    def chance(self, index: int, purpose: str) -> random.Random:
        """The random generator of item ``index`` for one purpose, such as its picture.

        Raises:
            IndexError: the item is outside the data set.
        """
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} is outside a data set of {self.length}")
        # Seeding with a string hashes it, so neighbouring items are unrelated.
        return random.Random(f"{self.seed} {self.split} {index % self.length} {purpose}")

    def _draw_forked(self, pixels: NDArray[np.uint8], workers: int) -> None:
        context = multiprocessing.get_context("fork")
        share = max(1, ceil(self.length / workers))
        processes = []
        for start in range(0, self.length, share):
            part = range(start, min(start + share, self.length))
            processes.append(
                context.Process(target=self._draw_into, args=(pixels, part), daemon=True)
            )
        with warnings.catch_warnings():
            # Python 3.12 warns that forking a process with threads may deadlock. Here the children
            # only run Pillow and NumPy without BLAS, which wait for no lock of the parent's.
            warnings.simplefilter("ignore", DeprecationWarning)
            for process in processes:
                process.start()
        try:
            for process in processes:
                process.join()
        finally:  # when the parent is interrupted
            for process in processes:
                process.terminate()
        if codes := [process.exitcode for process in processes if process.exitcode]:
            raise RuntimeError(f"a drawing process ended with code {codes[0]}: try workers=1")

    def _draw_into(self, pixels: NDArray[np.uint8], indices: Iterable[int]) -> None:
        for index in indices:
            pixels[index] = self._pixels(index)

    def _pixels(self, index: int) -> NDArray[np.uint8]:  # (3, size, size)
        return np.array(self.image(index)).transpose(2, 0, 1)


def check_split(split: str) -> None:
    """Raise ValueError unless ``split`` is "train", "held_out" or "all"."""
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown: choose from {', '.join(get_args(Split))}")


def check_size(size: int) -> None:
    """Raise ValueError unless a picture of ``size`` pixels can be drawn."""
    if size < 8:
        raise ValueError(f"size {size} is too small for a portrait: use 8 or more")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a container allows, where the system can say
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_fork() -> bool:
    """Forking is unsafe on macOS and missing on Windows; a daemon, such as a loader's worker, may
    have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon
