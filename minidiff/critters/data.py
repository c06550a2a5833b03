"""An endless data set of captioned critters: every item follows from a seed."""

import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minidiff.critters.captions import caption, negative_caption
from minidiff.critters.drawing import check_size, draw
from minidiff.critters.scene import EXCHANGES, Scene, Shown, Split, check_split, sample_critter, sample_scene
from minidiff.device import check_memory


class Rendering(NamedTuple):
    """A rendered data set: entry i of each belongs to image i."""

    images: Tensor  # (N, 3, S, S) uint8
    captions: list[str]  # of epoch 0
    scenes: list[Shown]


class Critters(Dataset[tuple[Tensor, str]]):
    """Captioned pictures of random critters; item i depends on ``count``, ``split``, ``seed`` and i.

    ``data[i]`` is the picture, (3, size, size) float in [-1, 1], with its caption of epoch 0.
    ``data.scene(i)`` says what it shows, ``data.caption(i, epoch)`` words it anew in each epoch, and
    ``data.render()`` draws all pictures at once.

    Args:
        length: number of pictures.
        size: height and width in pixels.
        split: "train", "held_out" or "all", as in :func:`~minidiff.critters.scene.sample_critter`.
        seed: another seed gives another data set.
        count: critters in a picture, 1 or 2.

    Raises:
        ValueError: a negative length, a size below 8, an unknown split, or another count.
        IndexError: an item outside the data set.
    """

    def __init__(
        self, length: int = 24_000, size: int = 64, split: Split = "train", seed: int = 0, count: int = 1
    ) -> None:
        check_split(split)
        if length < 0:
            raise ValueError(f"length {length} is negative: use 0 or more")
        if count not in (1, 2):
            raise ValueError(f"count = {count}: a picture shows 1 critter or 2")
        check_size(size)
        self.length, self.size, self.split, self.seed, self.count = length, size, split, seed, count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return torch.from_numpy(self._pixels([index])[0]).float() / 127.5 - 1, self.caption(index)

    def scene(self, index: int) -> Shown:
        """What picture ``index`` shows: a critter, or a scene of two."""
        if self.count == 1:
            return sample_critter(self.chance(index, "critter"), self.split)
        return sample_scene(self.chance(index, "scene"), self.split)

    def caption(self, index: int, epoch: int = 0) -> str:
        """A true caption of picture ``index``, worded anew in each epoch."""
        return caption(self.scene(index), self.chance(index, f"caption {epoch}"))

    def negative_caption(self, index: int, epoch: int = 0) -> str:
        """What ``caption(index, epoch)`` says of the scene with one thing, by chance, exchanged between its
        critters, as :func:`~minidiff.critters.captions.negative_caption` does; "" for a single critter."""
        scene = self.scene(index)
        if not isinstance(scene, Scene):
            return ""
        what = self.chance(index, f"mix-up {epoch}").choice(EXCHANGES)
        words = self.chance(index, f"caption {epoch}")
        return negative_caption(scene, what, words, self.caption(index, epoch))

    def captions(self, epoch: int = 0) -> list[str]:
        """The captions of all pictures in this epoch."""
        return [self.caption(index, epoch) for index in range(self.length)]

    def image(self, index: int) -> Image.Image:
        """Picture ``index`` as a PIL image."""
        return draw(self.scene(index), self.size, self.chance(index, "picture"))

    def images(self, workers: int | None = None, rows: range | None = None) -> Tensor:
        """Draw all pictures, or some, with several processes where the system can fork (not on macOS).

        Args:
            workers: number of processes; None means one per usable core. The result does not depend
                on it.
            rows: which, in steps of 1; None for all.

        Returns:
            The pictures as bytes, (N, 3, size, size) uint8. Indexing gives ``images / 127.5 - 1``.

        Raises:
            ValueError: ``workers`` is below 1, or there is not as much memory.
            IndexError: a row is outside the data set.
            RuntimeError: a process died.
        """
        workers = _usable_cores() if workers is None else workers
        if workers < 1:
            raise ValueError(f"workers {workers} is too few: use 1 or more, or None")
        rows = range(self.length) if rows is None else rows
        check_memory("pictures", len(rows), 3 * self.size**2)
        pixels = np.empty((len(rows), 3, self.size, self.size), np.uint8)
        starts = range(0, len(rows), 100)
        parts = [rows[start : start + 100] for start in starts]
        with warnings.catch_warnings(), ExitStack() as stack:
            # Python 3.12 warns that forking a process with threads may deadlock. Here the children
            # only run Pillow and NumPy without BLAS, which wait for no lock of the parent's.
            warnings.simplefilter("ignore", DeprecationWarning)
            drawn: Iterable[NDArray[np.uint8]] = map(self._pixels, parts)
            if workers > 1 and _can_fork():
                pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"))
                drawn = stack.enter_context(pool).map(self._pixels, parts)
            for start, some in zip(starts, drawn, strict=True):
                pixels[start : start + len(some)] = some
        return torch.from_numpy(pixels)

    def render(self, workers: int | None = None) -> Rendering:
        """All pictures as :meth:`images` draws them, with captions and what they show."""
        scenes = [self.scene(index) for index in range(self.length)]
        return Rendering(self.images(workers), self.captions(), scenes)

    def chance(self, index: int, purpose: str) -> random.Random:
        """The random generator of item ``index`` for one purpose, such as its picture.

        Raises:
            IndexError: the item is outside the data set.
        """
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} is outside a data set of {self.length}")
        # Seeding with a string hashes it, so neighbouring items are unrelated.
        return random.Random(f"{self.seed} {self.split} {index % self.length} {purpose}")

    def _pixels(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """(n, 3, size, size)"""
        return np.stack([np.array(self.image(i)).transpose(2, 0, 1) for i in indices])


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a container allows, where the system can say
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _can_fork() -> bool:
    """Forking is unsafe on macOS and missing on Windows; a daemon, such as a loader's worker, may
    have no children."""
    return sys.platform == "linux" and not multiprocessing.current_process().daemon
