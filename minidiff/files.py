"""Files of models: where they are looked for, and how they are written, whole or not at all."""

import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

StrPath = str | os.PathLike[str]
"""What names a file or folder: a string or a path."""
SHIPPED = Path(__file__).parent / "checkpoints"
"""The models that come with minidiff, a folder each."""
SAVING = ".saving-"
"""How the name of a folder begins in which files are unfinished."""


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
def checked_weights(place: StrPath) -> Iterator[None]:
    """Around what lets ``transformers`` load a folder, or a hub id, which is only kept quiet: one line for
    weights that cannot be read or do not fit, before the model that a folder's config asks for is built.

    Raises:
        ValueError: the weights cannot be read, or there are fewer than the config asks for.
    """
    file = Path(place) / "model.safetensors"
    try:
        with ExitStack() as stack:
            stack.enter_context(quiet_loading())
            if file.is_file():
                count = len(shapes_in(stack.enter_context(open_weights(file))))
                stack.enter_context(at_most(2 * count + 64))
            yield
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {place} cannot be used: {first_line(error)}") from error


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
    """The first line of an error's message, at most 300 signs of it, or the kind of error if it has none."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 300 else f"{line[:297]}..."


def check_place(path: StrPath, *, folder: bool = False) -> None:
    """Raise OSError unless a file, or a folder, of that name can be written; to be asked before any work."""
    path = Path(path)
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is no folder: choose another name")
    if not folder and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file")
    above = path if folder else path.parent
    while not above.exists():
        above = above.parent
    try:
        tempfile.TemporaryDirectory(dir=above, prefix=SAVING).cleanup()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose another place") from error


@contextmanager
def write_whole(path: StrPath) -> Iterator[Path]:
    """Write a file whole or not at all: ``with write_whole("a.png") as unfinished: ...``.

    Args:
        path: the file's name; missing folders are made.

    Yields:
        The place to write to: in the same folder, with the same ending. It takes the place of ``path``
        when the block ends, once the disk has it, and is deleted when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SAVING) as scratch:
        unfinished = Path(scratch) / path.name
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with none of the new bytes
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
    with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as scratch:
        yield Path(scratch)
        files = sorted(Path(scratch).iterdir(), key=lambda file: file.name == "config.json")
        # The rights of any new file: some libraries write some that their owner alone can read.
        (plain := Path(scratch) / ".plain").touch()
        for file in files:
            os.chmod(file, plain.stat().st_mode)
            os.replace(file, folder / file.name)


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, open for reading. Its header is checked against its size by the library.

    Raises:
        ValueError: it is none; the message says what it seems to be.
    """
    try:
        handle = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} {_instead(file)}") from error
    with handle:
        yield handle


def _instead(file: Path) -> str:
    """What a file that is no safetensors file seems to be, and what to do."""
    with file.open("rb") as content:
        head = content.read(64)
    if not head:
        return "is empty: copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights: run `git lfs pull`"
    if head.startswith((b"PK\3\4", b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")) and any(head[2:8]):
        return "is a pickle by that name, and nothing is unpickled here: save the weights with safetensors"
    return "holds no weights, or is cut short or damaged: copy or download it again"


Shapes = Mapping[str, Sequence[int]]


def shapes_in(handle: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in an open file, from its header: nothing is read or allocated."""
    return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118


def difference(needed: Shapes, found: Shapes) -> str | None:
    """What is wrong with the weights found, in one line: the first tensor, and how many more; or None."""
    lines = []
    for name, shape in needed.items():
        if name not in found:
            lines.append(f"{name} {tuple(shape)} is missing")
        elif tuple(found[name]) != tuple(shape):
            lines.append(f"{name} is {tuple(found[name])}, not {tuple(shape)}")
    lines += [f"{name} {tuple(found[name])} belongs to nothing" for name in found if name not in needed]
    if not lines:
        return None
    return lines[0] + (f", and {len(lines) - 1} more do not fit" if len(lines) > 1 else "")


@contextmanager
def at_most(parameters: int) -> Iterator[None]:
    """Stop a module that is being built when it has more parameters than this: what the numbers in a
    stranger's config.json ask for may take hours or terabytes.

    Raises:
        ValueError: it has.
    """
    count, thread = 0, threading.get_ident()

    def one_more(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += parameter is not None and threading.get_ident() == thread
        if count > parameters:
            raise ValueError("config.json asks for more tensors than the weights' file holds")

    hook = register_module_parameter_registration_hook(one_more)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def nothing_runs(name: StrPath) -> Iterator[None]:
    """Around a door of ``transformers`` at which ``trust_remote_code`` is False: one line if a folder asks
    for code of its own.

    Raises:
        ValueError: it does.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} asks to run code that comes with it (auto_map), and nothing of a model is ever run: use "
            "one whose kind transformers knows"
        ) from error


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module under the names it has without ``torch.compile``, which adds one of its own."""
    return {key.replace("_orig_mod.", ""): value for key, value in module.state_dict().items()}


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`weights` gave, into a module that may be compiled or not. In files of the first
    format the encoder's weights are called ``text``.

    Raises:
        ValueError: names or shapes do not fit.
    """
    names = {key.replace("_orig_mod.", ""): key for key in module.state_dict()}
    state = {todays_name(key): v for key, v in state.items()}
    try:
        module.load_state_dict({names.get(key, key): value for key, value in state.items()})
    except RuntimeError as error:
        needed, found = ({k: v.shape for k, v in s.items()} for s in (weights(module), state))
        raise ValueError(difference(needed, found) or first_line(error)) from error


def todays_name(key: str) -> str:
    """The name of a weight, whatever format the file has."""
    return re.sub(r"^(module\.)?text\.", r"\1encoder.", key)
