"""Any folder of captioned images, in the layout of Hugging Face's ``imagefolder``."""

import csv
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class FolderImages(NamedTuple):
    """What was found in a folder.

    Attributes:
        images: (N, 3, size, size) uint8.
        captions: N strings.
        skipped: file name and reason for each picture that could not be read.
    """

    images: Tensor
    captions: list[str]
    skipped: list[tuple[str, str]]


def captioned_folder(folder: str | os.PathLike[str], size: int = 64) -> FolderImages:
    """Pictures and captions of a folder with a ``metadata.jsonl`` or ``metadata.csv``.

    Each line names a picture and what it shows: ``{"file_name": "cat.png", "text": "a cat"}``, or the
    columns ``file_name,text``. Pictures are turned upright, cut to a centred square and scaled.

    Args:
        folder: where metadata and pictures are.
        size: height and width to scale to.

    Raises:
        FileNotFoundError: no folder, or no metadata in it.
        ValueError: the metadata cannot be parsed, or not one picture could be read.
    """
    folder = Path(folder)
    rows = _metadata(folder)
    images, captions, skipped = [], [], []
    for name, text in rows:
        try:
            with Image.open(folder / name) as file:
                upright = ImageOps.exif_transpose(file).convert("RGB")
            square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            skipped.append((name, str(error)))
            continue
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
        captions.append(text)
    if not images:
        raise ValueError(
            f"{folder}: not one of {len(rows)} pictures could be read, e.g. {skipped[0][1]}"
        )
    return FolderImages(torch.stack(images), captions, skipped)


def _metadata(folder: Path) -> list[tuple[str, str]]:
    """(file_name, text) of each picture listed in the folder's metadata."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}")
    for name in ("metadata.jsonl", "metadata.csv"):
        file = folder / name
        if not file.is_file():
            continue
        rows = []
        with file.open(encoding="utf-8-sig", newline="") as lines:
            is_csv = name.endswith("csv")
            entries: Iterable[Any] = csv.DictReader(lines) if is_csv else filter(str.strip, lines)
            for number, entry in enumerate(entries, start=2 if is_csv else 1):
                try:
                    row = entry if is_csv else json.loads(entry)
                    rows.append((str(row["file_name"]), str(row["text"])))
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{file}, line {number}: needs file_name and text ({error!r} in {entry!r})"
                    ) from error
        if not rows:
            raise ValueError(f"{file} lists no pictures")
        return rows
    raise FileNotFoundError(
        f"{folder} has no metadata.jsonl or metadata.csv: write one line per picture, such as "
        '{"file_name": "cat.png", "text": "a cat in a top hat"}'
    )
