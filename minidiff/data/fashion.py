"""Fashion-MNIST: 60,000 real pictures of clothes, with their kinds as captions (Xiao et al. 2017)."""

import gzip
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from minidiff.files import StrPath

CAPTIONS = (
    "a t-shirt", "a pair of trousers", "a pullover", "a dress", "a coat",
    "a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot",
)  # fmt: skip
"""What each of the ten classes is called here; the index is the label."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""


class CaptionedImages(NamedTuple):
    """A data set in memory.

    Attributes:
        images: (N, C, H, W) uint8.
        captions: N strings.
        labels: (N,) int64, the class of each.
    """

    images: Tensor
    captions: list[str]
    labels: Tensor


def fashion_mnist(root: StrPath | None = None, *, train: bool = True, size: int = 32) -> CaptionedImages:
    """Fashion-MNIST, padded from 28x28 to a size that halves well.

    Looks in ``root`` (the four idx files there, gzipped or not, or torchvision's
    ``FashionMNIST/raw`` below it); without ``root`` in Debian's place, then where an earlier download
    left it, and last downloads it with torchvision.

    Args:
        root: folder with a local copy.
        train: the 60,000 training pictures, else the 10,000 test pictures.
        size: height and width, at least 28.

    Raises:
        FileNotFoundError: no copy was found and none could be downloaded; the message says what to do.
        ValueError: ``size`` is below 28, or a file is damaged.
    """
    if size < 28:
        raise ValueError(f"size = {size}: the pictures are 28x28 and are only padded, never shrunk")
    from torchvision.datasets import FashionMNIST  # not needed by who never comes here

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minidiff"
    places = [Path(root)] if root is not None else [DEBIAN, cache]
    folders = [folder for place in places for folder in (place, place / "FashionMNIST" / "raw")]
    part = "train" if train else "t10k"
    for folder in folders:
        images = _read(folder / f"{part}-images-idx3-ubyte")
        labels = _read(folder / f"{part}-labels-idx1-ubyte")
        if images is not None and labels is not None:
            break
    else:
        if root is not None:
            raise FileNotFoundError(f"no Fashion-MNIST in {root}: it should hold {part}-images-idx3-ubyte.gz")
        try:
            data = FashionMNIST(cache, train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                "Fashion-MNIST is not on this machine and could not be downloaded: "
                "`apt install dataset-fashion-mnist`, or name a folder that has it with --data-root"
            ) from error
        images, labels = data.data, data.targets
    before = (size - 28) // 2
    after = size - 28 - before
    padded = F.pad(images, (before, after, before, after))[:, None]  # (N, 1, size, size)
    return CaptionedImages(padded, [CAPTIONS[label] for label in labels.tolist()], labels.long())


def _read(file: Path) -> Tensor | None:
    """The numbers in an idx file, gzipped or not, as torchvision reads it; None if there is no such file."""
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    zipped = file.with_name(file.name + ".gz")
    if not (zipped.is_file() or file.is_file()):
        return None
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / file.name
        try:
            plain.write_bytes(gzip.decompress(zipped.read_bytes()) if zipped.is_file() else file.read_bytes())
            return read_sn3_pascalvincent_tensor(str(plain))
        except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is damaged: not a complete idx file of bytes") from error
