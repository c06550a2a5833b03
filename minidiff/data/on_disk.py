"""Pictures that stay in their files and are read when they are asked for: a tensor of all would fill the
memory."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff.files import first_line


class OnDisk:
    """Stands for a tensor (N, C, H, W) uint8 of pictures; each is read again whenever it is asked for.

    ``images[rows]`` is that part of the tensor: of one number, a slice, or a tensor of numbers or of truth
    values. What is read is what a tensor of all would hold, as long as nobody changes the files.

    Args:
        files: where the pictures are.
        read: brings one of them, (C, H, W) uint8.
        shape: (C, H, W).
    """

    dtype, ndim = torch.uint8, 4

    def __init__(self, files: Sequence[Path], read: Callable[[Path], Tensor], shape: tuple[int, int, int]):
        self.files, self.read = files, read
        self.shape = torch.Size((len(files), *shape))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def nbytes(self) -> int:
        """What the tensor would take."""
        return self.shape.numel()

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        """The pictures of these rows, (n, C, H, W) uint8, or one of them, (C, H, W).

        Raises:
            IndexError: there is no such row.
            OSError: a picture cannot be read any more.
        """
        numbers = torch.arange(len(self))[rows]
        pictures = [self._picture(self.files[i]) for i in numbers.flatten().tolist()]
        if numbers.ndim == 0:
            return pictures[0]
        return torch.stack(pictures) if pictures else torch.empty(0, *self.shape[1:], dtype=self.dtype)

    def _picture(self, file: Path) -> Tensor:
        try:
            return self.read(file)
        except Exception as error:  # Pillow raises many kinds
            raise OSError(
                f"{file} could be read before, and cannot now ({first_line(error)}): bring it back, then "
                "--resume goes on from the last save"
            ) from error


def part(images: Tensor | OnDisk, rows: Tensor) -> Tensor | OnDisk:
    """Some of the pictures, in memory or on the disk as they are.

    Args:
        images: N of them.
        rows: truth values (N,).
    """
    if isinstance(images, Tensor):
        return images[rows]
    files = [images.files[i] for i in rows.nonzero()[:, 0].tolist()]
    return OnDisk(files, images.read, tuple(images.shape[1:]))  # type: ignore[arg-type]
