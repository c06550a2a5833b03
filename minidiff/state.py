"""What a training run leaves: the state to go on from after a break, and its log (chapter 4).

``training.safetensors`` holds the weights, their running average, and the moments of every gradient that the
optimizer keeps. Times and noise of a step depend on the seed and its number, so with the same seed and
data nothing else is needed. The state before it stays beside it, as ``training-before.safetensors``: if a
disk damages the newer one, its checksum tells, and the run goes on from the older. ``loss.csv`` is for
people.
"""

import csv
import json
import os
import shutil
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.files import StrPath, load_weights, open_weights, weights, write_whole

STATE, BEFORE = "training.safetensors", "training-before.safetensors"
LOG_EVERY = 10
"""Steps between two lines of ``loss.csv``."""


class TrainingState:
    """Weights, averaged weights and optimizer moments, to and from one safetensors file.

    Args:
        model: what is trained.
        ema: its running average.
        optimizer: one whose moments are tensors shaped like the parameters, as AdamW's.
        writes: False in all processes but one.
        seed: of the run.
    """

    def __init__(
        self, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, writes: bool, seed: int
    ):
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.writes, self.seed, self.kind = writes, seed, type(optimizer).__name__

    def save(self, folder: Path, steps: int) -> None:
        """Write the state after ``steps`` steps into ``folder``. The file is replaced whole, and what it held
        is kept as :data:`BEFORE`."""
        if not self.writes:  # one process of many is enough
            return
        tensors = {f"model.{key}": value for key, value in weights(self.model).items()}
        tensors |= {f"ema.{key}": value for key, value in weights(self.ema).items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in moments.items()}
        # Copies: safetensors refuses tensors that share memory, as T5's embedding tables do.
        tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        known = {"steps": steps, "seed": self.seed, "optimizer": self.kind, "crc32": checksum(tensors)}
        about = json.dumps(known)
        with write_whole(folder / STATE) as unfinished:
            unfinished.write_bytes(save(tensors, {"training": about}))
            if (folder / STATE).is_file():
                with write_whole(folder / BEFORE) as kept:
                    same_file(folder / STATE, kept)

    def load(self, folder: Path) -> int:
        """Read the state in ``folder`` into model, average and optimizer; return its number of steps.

        Raises:
            ValueError: it is none, or of another model, seed or optimizer.

        Warns:
            UserWarning: see :func:`recover`.
        """
        recover(folder)
        steps, seed = saved_steps(folder), _about(folder / STATE).get("seed", self.seed)
        if seed != self.seed:
            raise ValueError(f"{folder} holds a run with seed {seed}, not {self.seed}: resume it with that")
        kind = _about(folder / STATE).get("optimizer", "AdamW")
        if kind != self.kind:
            raise ValueError(
                f"{folder} holds a run of the optimizer {kind}, not {self.kind}: start a new run"
            )
        parameters = self.optimizer.param_groups[0]["params"]
        moments: dict[int, dict[str, Tensor]] = {}
        try:
            load_weights(self.model, saved_part(folder, "model"))
            load_weights(self.ema, saved_part(folder, "ema"))
            for key, value in saved_part(folder, "optimizer").items():
                number, name = key.split(".")
                if value.ndim:
                    # The fused optimizer walks through memory, so a moment must lie as its parameter does
                    # (channels last, say), not as the file has it.
                    like = parameters[int(number)]
                    if value.shape != like.shape:
                        raise ValueError(f"optimizer.{key} is {tuple(value.shape)}, not {tuple(like.shape)}")
                    value = torch.empty_like(like).copy_(value)
                moments.setdefault(int(number), {})[name] = value
        except (ValueError, IndexError) as error:
            raise ValueError(f"{folder} holds a run of another model: {error}") from error
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        return steps


def recover(folder: StrPath) -> None:
    """Put the state before the last in the place of the last, if the last is gone or damaged.

    Raises:
        FileNotFoundError: there is no state in ``folder``.
        ValueError: the last is damaged, and the one before is not there or damaged too.

    Warns:
        UserWarning: the last was damaged; after how many steps the one before is.
    """
    folder = Path(folder)
    try:
        _check(folder / STATE)
        return
    except (FileNotFoundError, ValueError) as error:
        try:
            steps = _check(folder / BEFORE)
            os.replace(folder / BEFORE, folder / STATE)
        except (FileNotFoundError, ValueError):
            _check(folder / STATE)  # raises again, unless another process has just put it right
            return
        warnings.warn(f"{error}; the run goes on from the state before it, of step {steps}", stacklevel=2)


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of all bytes of some tensors on the CPU, in the order of their names."""
    total = 0
    for _, value in sorted(tensors.items()):
        total = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def same_file(old: Path, new: Path) -> None:
    """Give a file a second name, or, where the file system knows no such thing, copy it."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy(old, new)


def _check(file: Path) -> int:
    """The number of steps of a state that is as it was written; states of older formats have no checksum.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    about = _about(file)
    if "crc32" in about and about["crc32"] != checksum(_tensors(file)):
        raise ValueError(f"{file} is damaged: its bytes are not those that were written")
    return int(about["steps"])


def saved_steps(folder: StrPath) -> int:
    """How many steps the training state in ``folder`` has behind it.

    Raises:
        FileNotFoundError: there is no ``training.safetensors`` in ``folder``.
        ValueError: it holds no training state.
    """
    return int(_about(Path(folder) / STATE)["steps"])


def _about(file: Path) -> dict[str, Any]:
    """Steps and, but for older formats, seed and checksum of a training state."""
    if not file.is_file():
        raise FileNotFoundError(f"nothing to resume: {file} does not exist")
    with open_weights(file) as handle:
        try:
            about: dict[str, Any] = json.loads(handle.metadata()["training"])
            whole("steps", about["steps"], 0)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} holds no training state: take the one of a run") from error
    return about


def saved_part(folder: StrPath, part: str) -> dict[str, Tensor]:
    """What ``training.safetensors`` holds of the "model", as the optimizer left it, of its average, "ema", or
    of the "optimizer", by name.

    Raises:
        FileNotFoundError: there is no such file in ``folder``.
    """
    return {k.removeprefix(f"{part}."): v for k, v in _tensors(Path(folder) / STATE, f"{part}.").items()}


def _tensors(file: Path, start: str = "") -> dict[str, Tensor]:
    """The tensors in a file whose names begin so."""
    with open_weights(file) as handle:
        return {k: handle.get_tensor(k) for k in handle.keys() if k.startswith(start)}  # noqa: SIM118


class LossLog:
    """``loss.csv``: a line every few steps, there to be read while the run goes on.

    A resumed run repeats the steps since the last save: what was written of those is dropped.

    Args:
        path: the file; made with the first line.
        images: images of one step, in all processes together.
        start: steps that were made before; lines of later ones are dropped.
    """

    def __init__(self, path: Path, images: int, start: int = 0):
        self.path, self.images, self.start = path, images, start
        self.index: int | None = None  # of the last line
        self.clock = time.monotonic()

    def __call__(self, index: int, loss: float, lr: float) -> None:
        """Write the line of step ``index``, counted from 0 (in the file from 1), with the images per second
        since the line before: none in the first line, whose time is that of the preparations too."""
        now, rate = time.monotonic(), ""
        if self.index is None:
            self._begin()
        else:
            done = self.images * (index - self.index)
            rate = f"{done / max(now - self.clock, 1e-9):.1f}"
        self.index, self.clock = index, now
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([index + 1, f"{loss:.6g}", f"{lr:.6g}", rate])

    def _begin(self) -> None:
        lines = [["step", "loss", "lr", "images_per_s"]]
        if self.start and self.path.is_file():
            with self.path.open(newline="") as file:
                for line in csv.reader(file):
                    # Neither the head nor a line that a kill tore apart.
                    if len(line) == 4 and line[0].isdigit() and int(line[0]) <= self.start:
                        lines.append(line)
        with write_whole(self.path) as unfinished, unfinished.open("w", newline="") as file:
            csv.writer(file).writerows(lines)
