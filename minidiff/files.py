"""Files of models: where they are looked for, and how they are written, whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

SHIPPED = Path(__file__).parent / "checkpoints"
"""The models that come with minidiff, a folder each."""


def locate(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a folder of that name, else one shipped here, else one from the hub.

    Raises:
        FileNotFoundError: there is none; the message says where it was looked for.
    """
    folder, shipped = Path(name), SHIPPED / str(name)
    for candidate in (folder, shipped):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    if folder.exists():
        raise FileNotFoundError(
            f"{folder} holds no model: config.json and model.safetensors are missing"
        )
    shipped_names = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))
    missing = f"no model {str(name)!r}: not a folder, not shipped ({shipped_names})"
    if str(name).count("/") != 1:
        raise FileNotFoundError(missing)
    try:
        files = ["*.json", "*.safetensors", "*.txt"]
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{missing}, and not to be had from the hub ({reason})") from error


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all: ``with write_whole("a.png") as unfinished: ...``.

    Args:
        path: the file's name; missing folders are made.

    Yields:
        The place to write to: beside ``path``, with the same ending. It is renamed when the block ends, and
        deleted when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def fill_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Write the files of a model so that a new folder holds all of them or no model.

    In an old folder the files are replaced one by one, each whole; files of other names stay.

    Args:
        folder: where to; made if missing.

    Yields:
        A folder to write to; its files are moved when the block ends, config.json last, for a folder
        without it holds no model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        yield Path(scratch)
        mask = os.umask(0)
        os.umask(mask)
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json"):
            # The rights of any new file: some libraries write some that their owner alone can read.
            os.chmod(file, 0o666 & ~mask)
            os.replace(file, folder / file.name)
