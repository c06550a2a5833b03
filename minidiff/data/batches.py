"""Endless, repeatable batches from captioned images, held in memory or read as they are needed."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minidiff.checks import seed_number, whole
from minidiff.data.on_disk import OnDisk
from minidiff.pixels import from_bytes


class Batches:
    """Shuffled batches without end; batch k depends on ``(seed, k)`` alone.

    That makes a resumed run see the data an uninterrupted one would have seen: give it ``start``.
    Every image comes up once per epoch; what does not fill a batch waits for the next epoch's shuffle.

    Args:
        images: (N, C, H, W) uint8, in memory or on the disk, or sounds (N, 1, L) int16; kept as they are,
            turned into floats batch by batch.
        caption: caption of image i in an epoch, ``caption(i, epoch)``, or a list of N captions (or labels,
            or what else goes with an image).
        batch_size: images per batch, at most N.
        seed: of the shuffles.
        start: number of the first batch.
        negative_caption: a caption that is not true of image i in an epoch, "" for none; for
            :meth:`CLIP.loss <minidiff.text.CLIP.loss>`, which learns from such too.

    Yields:
        (x0, captions): x0 (batch_size, C, H, W) float32 in [-1, 1], and a list: first the
        captions of the images, then the negative ones there are.

    Raises:
        ValueError: the batch size is below 1 or larger than the data set.
    """

    def __init__(
        self,
        images: Tensor | OnDisk,
        caption: Callable[[int, int], Any] | Sequence[Any],
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        negative_caption: Callable[[int, int], str] | None = None,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch size {batch_size} does not fit {len(images)} images: use 1 to that")
        self.images, self.start = images, start
        self.caption = caption if callable(caption) else partial(_entry, caption)
        self.negative_caption = negative_caption or _nothing
        self.batch_size, self.seed = whole("batch_size", batch_size), seed_number(seed)
        self._epoch, self._order = -1, np.empty(0, int)

    def __iter__(self) -> Iterator[tuple[Tensor, list[Any]]]:
        for k in itertools.count(self.start):
            rows, captions = self.number(k)
            yield from_bytes(self.images[rows]), captions

    def number(self, k: int) -> tuple[Tensor, list[Any]]:
        """Batch k: which images (batch_size,) int64, and their captions."""
        epoch, place = divmod(k, len(self.images) // self.batch_size)
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
            self._epoch = epoch
        rows = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        true = [self.caption(row, epoch) for row in rows.tolist()]
        negative = [self.negative_caption(row, epoch) for row in rows.tolist()]
        return torch.from_numpy(rows), true + [caption for caption in negative if caption]

    def ahead(
        self, read: Callable[[list[Any]], Any], numbers: Iterable[int], workers: int = 4
    ) -> Iterator[tuple[Tensor, Any]]:
        """The batches of these numbers, counted from ``start``, with captions, and pictures on the disk, that
        other processes have read while the caller was busy; images in memory come from where they are.

        Args:
            read: what to make of the captions of a batch, such as ``model.ids``.
            numbers: which batches, in this order.
            workers: processes, where the system can fork; else, or with 0, it is done in this one.

        Raises:
            OSError: a picture on the disk cannot be read any more.
        """
        fork = workers > 0 and sys.platform == "linux"
        loader = DataLoader(
            _Read(self, read), batch_size=None, sampler=numbers,
            num_workers=workers if fork else 0, multiprocessing_context="fork" if fork else None,
        )  # fmt: skip
        for found, values in loader:
            if isinstance(found, OSError):  # as it is: the loader would wrap it in a traceback
                raise found
            yield from_bytes(self.images[found] if isinstance(self.images, Tensor) else found), values


def _entry(captions: Sequence[Any], index: int, epoch: int) -> Any:
    return captions[index]


def _nothing(index: int, epoch: int) -> str:
    return ""


class _Read(Dataset[tuple[Tensor | OSError, Any]]):
    """Item k: which images are in batch k, or the images themselves if they are on the disk, or why they
    cannot be read; and what was read of their captions."""

    def __init__(self, batches: Batches, read: Callable[[list[Any]], Any]):
        self.batches, self.read = batches, read

    def __getitem__(self, k: int) -> tuple[Tensor | OSError, Any]:
        rows, captions = self.batches.number(self.batches.start + k)
        images = self.batches.images
        try:
            return rows if isinstance(images, Tensor) else images[rows], self.read(captions)
        except OSError as error:
            return error, None
