"""Any folder of captioned images, in the layouts that people have them in.

Where the captions are, in the order in which they are looked for:

* ``metadata.jsonl`` or ``metadata.csv``, as in Hugging Face's ``imagefolder``: one line a picture,
  ``{"file_name": "cat.png", "text": "a cat"}``, or the columns ``file_name,text``;
* text files beside the pictures: ``cat.txt`` for ``cat.png``;
* class folders: ``tabby_cat/1.png`` shows "tabby cat".

Folders ``train`` and ``test`` (and ``validation``), with nothing else beside them but a metadata file, are
splits. Each has its own captions, or one file above them names ``train/cat.png``.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.files import StrPath

SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "caption")
"""Columns of the metadata that may hold captions; the first that is there does."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderImages(NamedTuple):
    """What was found in a folder.

    Attributes:
        images: (N, 3, size, size) uint8.
        captions: N strings; "" where the metadata say ``null`` or nothing.
        skipped: file name and reason for each picture that could not be read.
        uncaptioned: names of the pictures that no caption belongs to; they are left out.
    """

    images: Tensor
    captions: list[str]
    skipped: list[tuple[str, str]]
    uncaptioned: list[str]

    @property
    def notes(self) -> list[str]:
        """What somebody who trains on the pictures should know, one line each."""
        lines = [f"skipped {name}: {reason}" for name, reason in self.skipped]
        if self.uncaptioned:
            some = ", ".join(self.uncaptioned[:3]) + (", ..." if len(self.uncaptioned) > 3 else "")
            lines.append(f"left out {len(self.uncaptioned)} pictures without a caption: {some}")
        return lines


def captioned_folder(
    folder: StrPath, size: int = 64, *, split: str | None = None, caption_column: str | None = None
) -> FolderImages:
    """Pictures and captions of a folder, see above. Pictures are turned upright, cut to a centred square
    and scaled.

    Args:
        folder: where the pictures are.
        size: height and width to scale to.
        split: one of :func:`folder_splits`; None for the training split, or for all of a folder without
            splits.
        caption_column: column of the metadata that holds the captions; None for one of :data:`COLUMNS`.

    Raises:
        FileNotFoundError: no folder, no such split, or no captions in it.
        ValueError: the metadata cannot be parsed, or not one picture could be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    splits = folder_splits(folder)
    if split is not None and split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}: it has {splits or 'none'}")
    root = folder / (split or "train") if splits else folder
    rows = _captions(folder, root, caption_column)
    images, captions, skipped = [], [], []
    for path, text in rows.items():
        try:
            with Image.open(path) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped.append((path.relative_to(root).as_posix(), str(error)))
            continue
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        captions.append(text)
    if not images:
        raise ValueError(f"{root}: not one of {len(rows)} pictures could be read, e.g. {skipped[0][1]}")
    left = [path.relative_to(root).as_posix() for path in _pictures(root) if path not in rows]
    return FolderImages(torch.stack(images), captions, skipped, left)


def folder_splits(folder: StrPath) -> tuple[str, ...]:
    """The splits of a folder, "train" first; none if its folders are of another kind."""
    names = {path.name for path in Path(folder).iterdir() if path.is_dir()}
    return tuple(s for s in SPLITS if s in names) if "train" in names <= set(SPLITS) else ()


def _captions(folder: Path, root: Path, column: str | None) -> dict[Path, str]:
    """The caption of each picture below ``root``, which is ``folder`` or one of its splits."""
    for place in dict.fromkeys((root, folder)):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (file := place / name).is_file():
                rows = {place / name: text for name, text in _metadata(file, column)}
                rows = {path: text for path, text in rows.items() if root in path.parents}
                if not rows:
                    raise ValueError(f"{file} lists no pictures of {root}")
                return rows
    pictures = list(_pictures(root))
    beside = {path: path.with_suffix(".txt") for path in pictures}
    if rows := {
        path: text.read_text(encoding="utf-8-sig").strip() for path, text in beside.items() if text.is_file()
    }:
        return rows
    if rows := {
        path: path.parent.name.replace("_", " ").replace("-", " ") for path in pictures if path.parent != root
    }:
        return rows
    raise FileNotFoundError(
        f"{root} has no captions: no metadata.jsonl or metadata.csv, no text files, no class folders. "
        'Write one line per picture, such as {"file_name": "cat.png", "text": "a cat in a top hat"}'
    )


def _pictures(root: Path) -> Iterator[Path]:
    """All pictures below ``root``, by name."""
    return (path for path in sorted(root.rglob("*")) if path.suffix.lower() in ENDINGS)


def _metadata(file: Path, column: str | None) -> list[tuple[str, str]]:
    """(file_name, caption) of each line of a metadata file."""
    rows = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        is_csv = file.suffix == ".csv"
        entries: Iterable[Any] = csv.DictReader(lines) if is_csv else filter(str.strip, lines)
        for number, entry in enumerate(entries, start=2 if is_csv else 1):
            try:
                row = entry if is_csv else json.loads(entry)
                key = column or next(name for name in COLUMNS if name in row)
                name, text = row["file_name"], row[key]
            except (json.JSONDecodeError, KeyError, TypeError, StopIteration) as error:
                needs = f"file_name and {column or ' or '.join(COLUMNS)}"
                raise ValueError(f"{file}, line {number}: needs {needs}, has {entry!r}") from error
            rows.append((str(name), "" if text is None else str(text)))
    return rows
