"""Any folder of captioned images, in the layouts that people have them in.

Where the captions are, in the order in which they are looked for:

* ``metadata.jsonl`` or ``metadata.csv``, as in Hugging Face's ``imagefolder``: one line a picture,
  ``{"file_name": "cat.png", "text": "a cat"}``, or the columns ``file_name,text``;
* text files beside the pictures: ``cat.txt`` for ``cat.png``;
* class folders: ``tabby_cat/1.png`` shows "tabby cat".

What leaves the folder is not read: ``../cat.png``, an absolute name, a link to elsewhere. Transparent pixels
show white, 16-bit grey is scaled, pictures are turned as their camera says, of an animation the first counts.

Pictures are scaled and held in memory. If they would take more than a quarter of it, they stay where they are
and are read again whenever they are needed (:class:`~minidiff.data.on_disk.OnDisk`): a run is the same, only
slower.

Folders ``train`` and ``test`` (and ``validation``), with nothing else beside them but a metadata file, are
splits. Each has its own captions, or one file above them names ``train/cat.png``.
"""

import csv
import io
import json
import math
import os
import reprlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.checks import Size, sides
from minidiff.data.on_disk import OnDisk
from minidiff.device import memory, processes_here
from minidiff.files import StrPath, first_line

SPLITS = ("train", "validation", "test")
COLUMNS = ("text", "caption")
"""Columns of the metadata that may hold captions; the first that is there does."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000", "AVIF")
"""What a picture may be, whatever its name says. Not EPS, for one: to read it Pillow runs a program."""


class FolderImages(NamedTuple):
    """What was found in a folder.

    Attributes:
        images: (N, 3, H, W) uint8, or what stands for it where it would be too large; grey pictures have
            three equal channels.
        captions: N strings; "" where the metadata say ``null``, ``NaN`` or nothing.
        skipped: file name and reason for each picture that could not be read.
        uncaptioned: names of the pictures that no caption belongs to; they are left out.
    """

    images: Tensor | OnDisk
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
        if isinstance(self.images, OnDisk):
            size = f"{self.images.nbytes / 1e9:,.1f} GB"
            lines.append(f"in memory the pictures would take {size}: they are read as they are needed")
        return lines


def captioned_folder(
    folder: StrPath,
    size: Size = 64,
    *,
    split: str | None = None,
    caption_column: str | None = None,
    most_bytes: int | None = None,
    progress: Callable[..., AbstractContextManager[Any]] | None = None,
) -> FolderImages:
    """Pictures and captions of a folder, see above. Of each picture the largest part in its middle that has
    the form of ``size``, a square or another rectangle, is scaled to it.

    All pictures are read once, to know which can be: the others are left out.

    Args:
        folder: where the pictures are.
        size: to scale to: one number for height and width, or (height, width), each at least 1.
        split: one of :func:`folder_splits`; None for the training split, or for all of a folder without
            splits.
        caption_column: column of the metadata that holds the captions; None for one of :data:`COLUMNS`.
        most_bytes: more than so many of pictures stay on the disk; None for a quarter of the memory there is,
            shared with the other processes of a run.
        progress: shows how far it is, as :attr:`TextToImage.progress
            <minidiff.pipeline.TextToImage.progress>` does; None for nothing.

    Raises:
        FileNotFoundError: no folder, no such split, or no captions in it.
        ValueError: the size is none, the metadata cannot be parsed or name what is outside, or not one
            picture could be read.
    """
    height, width = sides(size)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    splits = folder_splits(folder)
    if split is not None and split not in splits:
        raise FileNotFoundError(f"{folder} has no split {split!r}: it has {splits or 'none'}")
    root = folder / (split or "train") if splits else folder
    rows = _captions(folder, root, caption_column)
    shape, read = (3, height, width), partial(_read_cut, size=(width, height))
    most_bytes = memory() // 4 // processes_here() if most_bytes is None else most_bytes
    fits = len(rows) * math.prod(shape) <= most_bytes
    held = torch.empty(len(rows) if fits else 0, *shape, dtype=torch.uint8)
    files: list[Path] = []
    captions: list[str] = []
    skipped: list[tuple[str, str]] = []
    inside = folder.resolve()
    shown = nullcontext() if progress is None else progress(total=len(rows), desc=f"{len(rows):,} pictures")
    with shown as bar:
        for path, text in rows.items():
            try:
                if not path.resolve().is_relative_to(inside):
                    raise ValueError("a link that leaves the folder: copy the picture into it")
                picture = read(path)
            except Exception as error:  # Pillow raises many kinds
                skipped.append((path.relative_to(root).as_posix(), first_line(error)))
            else:
                if fits:
                    held[len(files)] = picture
                files.append(path)
                captions.append(text)
            if bar is not None:
                bar.update()
    if not files:
        raise ValueError(f"{root}: not one of {len(rows)} pictures could be read, e.g. {skipped[0][1]}")
    left = [path.relative_to(root).as_posix() for path in _pictures(root) if path not in rows]
    return FolderImages(held[: len(files)] if fits else OnDisk(files, read, shape), captions, skipped, left)


def _read_cut(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture, scaled and cut to (width, height), as (3, height, width) uint8."""
    cut = ImageOps.fit(read_picture(path), size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1)


def read_picture(path: StrPath) -> Image.Image:
    """A picture as it is meant to be seen, in RGB: see the head of this module.

    Raises:
        ValueError: it has more pixels than :data:`PIL.Image.MAX_IMAGE_PIXELS`, or numbers whose range is not
            known.
        OSError: it is no picture of :data:`FORMATS`, or damaged.
    """
    with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as file:
        warnings.simplefilter("ignore")  # about damaged tags that are not needed here
        if file.width * file.height > (most := Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{file.width}x{file.height} pixels: use at most {most}")
        upright = ImageOps.exif_transpose(file)
    if upright.mode == "F":
        raise ValueError("floating-point pixels of unknown range: save it with 8 or 16 bits")
    if upright.mode.startswith("I"):  # 16 bits of grey; convert("RGB") would cut them off at 255
        return Image.fromarray((np.asarray(upright).clip(0, 65535) / 257).round().astype(np.uint8)).convert(
            "RGB"
        )
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    seen = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def folder_splits(folder: StrPath) -> tuple[str, ...]:
    """The splits of a folder, "train" first; none if its folders are of another kind."""
    names = {path.name for path in Path(folder).iterdir() if path.is_dir()}
    return tuple(s for s in SPLITS if s in names) if "train" in names <= set(SPLITS) else ()


def _captions(folder: Path, root: Path, column: str | None) -> dict[Path, str]:
    """The caption of each picture below ``root``, which is ``folder`` or one of its splits."""
    for place in dict.fromkeys((root, folder)):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (file := place / name).is_file():
                rows = dict(_metadata(file, folder, column))
                rows = {path: text for path, text in rows.items() if root in path.parents}
                if not rows:
                    raise ValueError(f"{file} lists no pictures of {root}")
                return rows
    pictures = list(_pictures(root))
    beside = {path: path.with_suffix(".txt") for path in pictures}
    if rows := {path: _text(text, folder).strip() for path, text in beside.items() if text.is_file()}:
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
    return (path for path in sorted(root.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file())


def _text(file: Path, folder: Path) -> str:
    """What a text file of ``folder`` says.

    Raises:
        ValueError: it is a link to elsewhere, or not in UTF-8.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{file} is a link that leaves the folder: copy it there")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 (at byte {error.start}): save it so") from error


def _lines(file: Path, folder: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line of a metadata file: the cells of a row by name, or JSON."""
    content = io.StringIO(_text(file, folder), newline="")
    if file.suffix != ".csv":
        yield from ((number, line) for number, line in enumerate(content, 1) if line.strip())
        return
    reader = csv.DictReader(content, strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}: is every quote closed?") from error


def _metadata(file: Path, folder: Path, column: str | None) -> Iterator[tuple[Path, str]]:
    """(picture, caption) of each line of a metadata file."""
    inside = os.path.abspath(folder)
    for number, entry in _lines(file, folder):
        where = f"{file}, line {number}"
        try:
            row = entry if isinstance(entry, dict) else json.loads(entry)
            key = column or next(name for name in COLUMNS if name in row)
            name, text = row["file_name"], row[key]
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
            needs = f"file_name and {column or ' or '.join(COLUMNS)}"
            raise ValueError(f"{where}: needs {needs}, has {reprlib.repr(entry)}") from error
        if None in row:  # where csv puts what the head has no names for
            raise ValueError(f"{where}: more cells than the head: put a caption with commas in double quotes")
        if not (isinstance(name, str) and name):
            raise ValueError(f"{where}: file_name = {name!r} is no name of a picture")
        path = file.parent / name
        if not Path(os.path.abspath(path)).is_relative_to(inside):
            raise ValueError(f"{where}: {name!r} leaves the folder: name pictures that are in it")
        yield path, _caption(text, where)


def _caption(value: Any, where: str) -> str:
    """What a cell says: numbers are words, too; None and NaN, as pandas writes it, are nothing.

    Raises:
        ValueError: it is something else.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    raise ValueError(f"{where}: the caption {reprlib.repr(value)} is no text: give one string")
