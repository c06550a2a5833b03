"""Conditions: what a denoiser is told about each sample besides its noisy version (chapters 3 and 6).

Whatever a condition is about, words or class numbers or a caller's own kind, it reaches the network as
one thing, a :class:`Condition`: some vectors that attention can look at, and one vector for the whole.
What makes conditions is an :class:`Encoder`. It works in two steps, and the first is a door::

    ids = encoder.ids(["a cat in a hat"])  # strings or labels -> whole numbers
    condition = encoder(ids)               # -> Condition; learns along

Behind the door there are tensors only: a training step never sees a string.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checks import whole


class Condition(NamedTuple):
    """What the denoiser is told about each sample: token states, and one vector that sums them up.

    A sample without a condition has no valid token and a zero vector. Nothing else marks "no
    condition": no reserved index, no learned null token, no difference between training and sampling.

    Attributes:
        tokens: (B, T, D) token states.
        mask: (B, T) bool, True where a token is there.
        pooled: (B, D) summary vector.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def drop(self, where: Tensor) -> "Condition":
        """The same conditions, except that the samples marked in ``where`` (B,) bool have none."""
        keep = ~where
        return Condition(self.tokens, self.mask & keep[:, None], self.pooled * keep[:, None])

    def take(self, rows: Sequence[int] | Tensor) -> "Condition":
        """The conditions of some samples, in the order of ``rows``, which may name one more than once."""
        at = torch.as_tensor(rows, device=self.mask.device)
        return Condition(*(part[at] for part in self))

    def to(self, like: Tensor) -> "Condition":
        """The same condition on the device and in the dtype of ``like``."""
        return Condition(self.tokens.to(like), self.mask.to(like.device), self.pooled.to(like))

    def expand(self, batch: int) -> "Condition":
        """One condition for a whole batch: (1, ...) becomes (batch, ...).

        Raises:
            ValueError: there are neither 1 nor ``batch`` conditions.
        """
        if len(self.pooled) not in (1, batch):
            raise ValueError(f"{len(self.pooled)} conditions for {batch} samples: give 1 or {batch}")
        return Condition(*(part.expand(batch, *part.shape[1:]) for part in self))

    def pad(self, length: int) -> "Condition":
        """The same conditions with tokens up to this length, masked; longer ones stay as they are."""
        missing = max(0, length - self.mask.shape[1])
        tokens = F.pad(self.tokens, (0, 0, 0, missing))
        return Condition(tokens, F.pad(self.mask, (0, missing)), self.pooled)

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Conditions one after the other along the batch; shorter ones are padded (and masked)."""
        longest = max(condition.mask.shape[1] for condition in conditions)
        parts = zip(*(condition.pad(longest) for condition in conditions), strict=True)
        return Condition(*map(torch.cat, parts))


@runtime_checkable
class Encoder(Protocol):
    """What makes conditions: a module with these two methods and a width.

    :class:`LabelEncoder` and :class:`~minidiff.text.TextEncoder` are two. One of your own is a
    ``torch.nn.Module``; if it learns, its weights are trained and saved with the model's.

    Attributes:
        dim: width D of token states and pooled vector.
    """

    @property
    def dim(self) -> int: ...

    def ids(self, values: Sequence[Any], /) -> Tensor:
        """The door: B captions, labels, ... as whole numbers (B, ...) int64 on the CPU."""
        ...

    def __call__(self, ids: Tensor, /) -> Condition:
        """The conditions of B rows of numbers."""
        ...


class LabelEncoder(nn.Module):
    """Class labels as conditions: one learned vector per class.

    The vector is the one token of the condition and its summary too, so a network can listen to it in
    either way. It learns with the denoiser, and is dropped and guided like text. Embeddings of classes
    that join that of time are those of Dhariwal & Nichol 2021, section 3.1; dropping them is Ho &
    Salimans 2022.

    Args:
        num_classes: labels are 0 to ``num_classes - 1``; -1 or None stands for no label.
        dim: width D of the vectors.

    Raises:
        ValueError: ``num_classes`` or ``dim`` is smaller than 1.
    """

    def __init__(self, num_classes: int, dim: int = 64):
        super().__init__()
        for name, value in (("num_classes", num_classes), ("dim", dim)):
            whole(name, value)
        self.num_classes, self.dim = num_classes, dim
        self.embedding = nn.Embedding(num_classes, dim)

    def ids(self, values: Sequence[int | None] | Tensor, /) -> Tensor:
        """The labels (B,) int64, checked.

        Raises:
            ValueError: a label is no whole number, or not one of the classes.
        """
        if isinstance(values, Tensor):
            values = values.tolist()
        for value in values:
            if not (value is None or (isinstance(value, Integral) and -1 <= int(value) < self.num_classes)):
                raise ValueError(
                    f"label {value!r}: give whole numbers from 0 to {self.num_classes - 1}, "
                    "-1 or None for no label"
                )
        return torch.tensor([-1 if value is None else int(value) for value in values])

    def forward(self, ids: Tensor) -> Condition:
        """Conditions of labels (B,): tokens (B, 1, D), mask (B, 1), pooled (B, D).

        Raises:
            ValueError: labels on the CPU are not all classes; on a GPU, to look would be to wait.
        """
        if ids.device.type == "cpu":
            ids = self.ids(ids)
        ids = ids.to(self.embedding.weight.device)
        given = ids >= 0  # (B,)
        vectors = self.embedding(ids.clamp(min=0)) * given[:, None]
        return Condition(vectors[:, None], given[:, None], vectors)

    def config(self) -> dict[str, Any]:
        """Name and arguments, from which a saved model is rebuilt."""
        return {"name": "LabelEncoder", "num_classes": self.num_classes, "dim": self.dim}
