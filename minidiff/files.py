"""Files of models: where they are looked for, and how they are written, whole or not at all."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

StrPath = str | os.PathLike[str]
"""What names a file or folder: a string or a path."""
SHIPPED = Path(__file__).parent / "checkpoints"
"""The models that come with minidiff, a folder each."""


def find_folder(name: StrPath, *files: str) -> Path | None:
    """The folder of that name, else the one shipped here, that holds these files; None if neither is there.

    Raises:
        FileNotFoundError: there is a folder of that name, without them.
    """
    for folder in (Path(name), SHIPPED / name):
        if all((folder / file).is_file() for file in files):
            return folder
    if missing := [file for file in files if Path(name).exists() and not (Path(name) / file).is_file()]:
        raise FileNotFoundError(f"{name} holds no model: {' and '.join(missing)} missing")
    return None


def locate(name: StrPath, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder of a model: a folder of that name, else one shipped here, else one from the hub.

    Args:
        name: of the folder, the shipped model or the hub's repository.
        revision: branch, tag or commit on the hub.
        token: for the hub; None for the one you are logged in with.

    Raises:
        FileNotFoundError: there is none; the message says where it was looked for.
    """
    if folder := find_folder(name, "config.json", "model.safetensors"):
        return folder
    names = ", ".join(sorted(path.parent.name for path in SHIPPED.glob("*/model.safetensors")))
    missing_model = f"no model {str(name)!r}: not a folder, not shipped ({names})"
    if str(name).count("/") != 1:
        raise FileNotFoundError(missing_model)
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        files = ["*.json", "*.safetensors", "*.txt"]
        return Path(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        reason = first_line(error)
        raise FileNotFoundError(f"{missing_model}, and not to be had from the hub ({reason})") from error


def locate_pretrained(name: StrPath) -> str:
    """The folder of an encoder, or the hub id if there is no such folder.

    Raises:
        FileNotFoundError: the folder is there and holds no model, or the name can be no hub id.
    """
    if folder := find_folder(name, "config.json"):
        return str(folder)
    if Path(name).is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise FileNotFoundError(f"no text encoder {str(name)!r}: there is no such folder")
    return str(name)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers for what takes a moment; the hub's downloads keep theirs."""
    from transformers.utils import logging  # whoever asks has loaded it already

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the kind of error if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def write_whole(path: StrPath) -> Iterator[Path]:
    """Write a file whole or not at all: ``with write_whole("a.png") as unfinished: ...``.

    Args:
        path: the file's name; missing folders are made.

    Yields:
        The place to write to: in the same folder, with the same ending. It takes the place of ``path``
        when the block ends, and is deleted when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        os.replace(unfinished, path)


@contextmanager
def fill_folder(folder: StrPath) -> Iterator[Path]:
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
        files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json")
        # The rights of any new file: some libraries write some that their owner alone can read.
        (plain := Path(scratch) / ".plain").touch()
        for file in files:
            os.chmod(file, plain.stat().st_mode)
            os.replace(file, folder / file.name)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module under the names it has without ``torch.compile``, which adds one of its own."""
    return {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`weights` gave, into a module that may be compiled or not. In files of the first
    format the encoder's weights are called ``text``.

    Raises:
        RuntimeError: names or shapes do not fit.
    """
    names = {key.replace("_orig_mod.", ""): key for key in module.state_dict()}
    state = {re.sub(r"^(module\.)?text\.", r"\1encoder.", key): v for key, v in state.items()}
    module.load_state_dict({names.get(key, key): value for key, value in state.items()})
