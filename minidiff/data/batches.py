"""Endless, repeatable batches from captioned images held in memory."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.pixels import from_bytes


class Batches:
    """Shuffled batches without end; batch k depends on ``(seed, k)`` alone.

    That makes a resumed run see the data an uninterrupted one would have seen: give it ``start``.
    Every image comes up once per epoch; what does not fill a batch waits for the next epoch's shuffle.

    Args:
        images: (N, C, H, W) uint8; kept as bytes, turned into floats batch by batch.
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
        images: Tensor,
        caption: Callable[[int, int], Any] | Sequence[Any],
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        negative_caption: Callable[[int, int], str] | None = None,
    ):
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"batch size {batch_size} does not fit {len(images)} images: use 1 to that")
        self.images, self.batch_size, self.seed, self.start = images, batch_size, seed, start
        self.caption = caption if callable(caption) else lambda index, epoch: caption[index]
        self.negative_caption = negative_caption or (lambda index, epoch: "")

    def __iter__(self) -> Iterator[tuple[Tensor, list[Any]]]:
        per_epoch = len(self.images) // self.batch_size
        order, shuffled = np.empty(0, int), -1
        for k in itertools.count(self.start):
            epoch, place = divmod(k, per_epoch)
            if epoch != shuffled:
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
                shuffled = epoch
            indices = order[place * self.batch_size : (place + 1) * self.batch_size]
            x0 = from_bytes(self.images[torch.from_numpy(indices)])
            true = [self.caption(index, epoch) for index in indices.tolist()]
            negative = [self.negative_caption(index, epoch) for index in indices.tolist()]
            yield x0, true + [caption for caption in negative if caption]
