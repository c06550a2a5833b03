"""How good is a model on pictures that it did not train on? For any data; what is exact about critters is in
:mod:`minidiff.critters.scores`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.data.on_disk import OnDisk
from minidiff.doctor import errors_by_level
from minidiff.metrics import FEWEST, Interval, frechet_distance, kernel_distance, mean
from minidiff.pipeline import BATCH, PART, TextToImage, draw_each
from minidiff.pixels import from_bytes
from minidiff.text import CLIP

MOST_COMPARED = 4096
"""The exact denoiser compares each picture with each, so of more than so many the first are taken."""


def evaluate_images(
    pipe: TextToImage,
    images: Tensor | OnDisk,
    captions: Sequence[str],
    *,
    prompts: int = 512,
    seed: int = 0,
    **how: Any,
) -> dict[str, Interval]:
    """The loss against its floor, and distances between samples and pictures.

    Args:
        pipe: the model.
        images: pictures that it did not train on, (N, 1 or 3, H, W) uint8, in memory or on the disk.
        captions: what they show; the samples are asked for the same.
        prompts: how many of them to use at most.
        seed: of noise and samples.
        how: steps, guidance and sampler, as :class:`~minidiff.pipeline.TextToImage` takes them.

    Returns:
        Scores by name. The squared errors of x0, a mean over times from 0.02 to 1 and the first
        :data:`MOST_COMPARED` pictures, are those that :func:`minidiff.doctor` compares level by level.
        Fréchet and kernel distance are measured in the space of the picture tower of the shipped
        ``critters-clip``, which has seen drawings only: they compare models of the same data, and say
        nothing about FID in Inception's features.

    Raises:
        ValueError: fewer than :data:`~minidiff.metrics.FEWEST` pictures.
    """
    n = min(prompts, len(images))
    if n < FEWEST:
        raise ValueError(f"{n} pictures are too few for distances with error bars: use {FEWEST}")
    texts, few = list(captions[:n]), min(n, MOST_COMPARED)
    model = pipe.model
    x0 = from_bytes(images[:few]).to(model.device)
    levels = errors_by_level(model, x0, model.encode(texts[:few]), seed=seed)
    scores = {
        f"squared error of x0, {name}": mean(torch.stack([e[name] for e in levels.values()]).mean(0))
        for name in ("model", "trivial", "floor")
    }
    clip = CLIP.from_pretrained("critters-clip")

    @torch.no_grad()
    def embed(x: Tensor) -> Tensor:
        return torch.cat([clip.embed_images(some.expand(-1, 3, -1, -1)) for some in x.split(BATCH)])

    drawn = torch.cat([embed(part) for part in draw_each(pipe, texts, n, seed=seed, **how)])  # (n, D)
    real = torch.cat([embed(from_bytes(images[k : min(k + PART, n)])) for k in range(0, n, PART)])
    for what, distance in (("Fréchet", frechet_distance), ("kernel", kernel_distance)):
        scores[f"{what} distance, critters-clip features"] = distance(drawn, real)
    return scores
