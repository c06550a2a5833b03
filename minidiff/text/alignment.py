"""Alignment: CLIP's opinion of a denoiser's guess, to train on or to be guided by (chapter 7)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.forward import NoiseLevel
from minidiff.text.clip import CLIP


@dataclass(frozen=True)
class Alignment:
    """How far a denoiser's guess of x0 is from what the caption says: 1 - cosine in CLIP's space.

    Given to :func:`minidiff.train` it adds to the loss, for each sample that keeps its caption::

        weight * alpha² * (1 - cosine(image(x0_hat), text(caption)))

    At high noise the best guess is a blurred mean of many pictures, on which CLIP was not trained and
    which no caption describes well; alpha² lets such levels count little. The same cosine of a guess of
    x0 is what Bansal et al. 2023 follow at sampling time (:meth:`score`); as a part of the training loss
    it is an experiment.

    Attributes:
        clip: whose space it is; a copy is kept, whose weights stay as they are.
        weight: strength, >= 0, beside a loss that starts near 1.

    Raises:
        ValueError: ``weight`` is negative.
    """

    clip: CLIP
    weight: float = 0.1

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight = {self.weight:g}: it must not be negative")
        frozen = copy.deepcopy(self.clip).eval().requires_grad_(False)
        object.__setattr__(self, "clip", frozen)  # the way to set a field of a frozen dataclass

    def term(self, captions: Sequence[str]) -> Callable[[Tensor, NoiseLevel, Tensor | None], Tensor]:
        """The term for the samples of one batch, as :func:`minidiff.loss` takes it.

        The captions are read here, once: the term itself is a function of tensors.

        Args:
            captions: B strings; the empty one, which asks for nothing, counts as dropped.

        Returns:
            A function of the guesses of x0 (B, 3, H, W), their level, () or (B,), and the samples (B,) whose
            caption was withheld, or None. It gives the mean over the batch, a tensor of shape ().
        """
        with torch.no_grad():
            text = self.clip.embed_captions(captions)  # (B, D), a row of zeros for the empty caption

        def term(x0: Tensor, level: NoiseLevel, drop: Tensor | None = None) -> Tensor:
            vectors = text.to(x0.device)
            keep = vectors.any(1)  # (B,)
            if drop is not None:
                keep = keep & ~drop
            distance = 1 - self._cosine(x0, vectors)
            return self.weight * ((level.alpha**2).to(distance) * keep * distance).mean()

        return term

    def score(self, captions: Sequence[str]) -> Callable[[Tensor, NoiseLevel], Tensor]:
        """The cosine as what :func:`minidiff.gradient_guide` follows, in place of a log-likelihood.

        Args:
            captions: one per sample, or one for all.

        Returns:
            A function of x0 (B, 3, H, W) and its level that gives B cosines in [-1, 1].
        """
        with torch.no_grad():
            text = self.clip.embed_captions(captions)  # (1 or B, D)
        return lambda x0, level: self._cosine(x0, text.to(x0.device))

    def _cosine(self, x0: Tensor, text: Tensor) -> Tensor:
        """Cosines (B,) of guesses (B, 3, H, W) with unit vectors (1 or B, D)."""
        if len(text) not in (1, len(x0)):
            raise ValueError(f"{len(text)} captions for {len(x0)} pictures: give one each")
        return (self.clip.to(x0.device).embed_images(x0) * text).sum(1)
