"""A training run on disk: what ``minidiff train`` does with a recipe, step by step."""

import os
import shutil
import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minidiff.checks import positive, seed_number
from minidiff.data import Batches
from minidiff.denoiser import Diffusion
from minidiff.denoiser.diffusion import network_from_config, read_config
from minidiff.device import bytes_on_device
from minidiff.files import SAVING, StrPath, check_place
from minidiff.pipeline import TextToSound, pipeline
from minidiff.pixels import save_grid
from minidiff.recipes import Recipe
from minidiff.sounds import save_wav
from minidiff.state import LOG_EVERY, LossLog, recover, saved_steps
from minidiff.training import Step, processes, train

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

HANG_UP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
STOPS = {signal.SIGINT, signal.SIGTERM, HANG_UP}
"""Signals that end a run: of a keyboard, of `docker stop` and Slurm, of a terminal that is closed."""


def fit(
    recipe: Recipe,
    output: StrPath,
    *,
    seed: int = 0,
    resume: bool = False,
    sample_every: int = 300,
    save_every: int = 300,
) -> Iterator[Step]:
    """Train a recipe, step by step, writing into ``output``:

    * ``config.json``, ``model.safetensors``, tokenizer files: the averaged model, for
      ``TextToImage.from_pretrained(output)``;
    * ``samples/step_000300.png`` and so on: one row per prompt of the recipe; of sounds a .wav with one after
      another;
    * ``training.safetensors``: what ``resume=True`` goes on from, and ``training-before.safetensors``, from
      which it goes on if the former is damaged;
    * ``loss.csv``: ``step,loss,lr,images_per_s`` of every tenth step, written as it goes.

    An interrupt (Ctrl-C, SIGTERM or SIGHUP) lets the step in progress end, writes everything, and is raised
    again after. What does not fit ``output`` is said at once, before data are drawn, or read for a network
    that needs none.

    Args:
        recipe: what to train.
        output: folder, made if missing.
        seed: of data order, times and noise; the model's first weights come with the recipe.
        resume: go on from ``training.safetensors`` in ``output``.
        sample_every: steps between sample grids.
        save_every: steps between saves.

    Yields:
        One :class:`~minidiff.training.Step` per optimizer step.

    Raises:
        FileNotFoundError: ``resume`` and there is nothing to resume.
        FileExistsError: not ``resume``, and ``output`` holds a run or a model already; or another process
            writes there.
        ValueError: ``resume``, and the run in ``output`` is of another network, size, vocabulary or seed.
        KeyboardInterrupt: after the interrupted run has been saved.
        OSError: a save failed, as on a full disk, and the one before is as it was; or a picture on the disk
            cannot be read any more.
        SystemExit: the same, with the code that tells the signal, if it was another than Ctrl-C.
    """
    output, seed = Path(output), seed_number(seed)
    positive("lr", recipe.lr)
    check_place(output, folder=True)
    with held(output):
        pass  # to be refused now, not after the data are drawn
    if not resume and (output / "training.safetensors").exists():
        raise FileExistsError(f"{output} holds a training run: add --resume, or choose another folder")
    if not resume and (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model: choose another folder")
    before = 0
    if resume:
        recover(output)
        before = saved_steps(output)
        _check_network(recipe.model, output)
    return _fit(recipe, output, seed, before, sample_every, save_every)


def _fit(
    recipe: Recipe, output: Path, seed: int, before: int, sample_every: int, save_every: int
) -> Iterator[Step]:
    source = recipe.source
    batch_size = recipe.batch_size or min(128, len(source.images))
    # Every process takes its share of the batches, so a step uses up one batch per process.
    start = before * processes().num_processes
    images = bytes_on_device(source.images, processes().device)
    batches = Batches(images, source.caption, batch_size, seed=seed, start=start)
    steps = train(
        recipe.model, batches, recipe.steps, lr=recipe.lr, optimizer=recipe.optimizer,
        weighting=recipe.weighting, seed=seed, resume=output if before else None,
    )  # fmt: skip

    log = LossLog(output / "loss.csv", batch_size * processes().num_processes, before)
    output.mkdir(parents=True, exist_ok=True)
    with held(output), _interrupts_between_steps() as interrupted:
        if processes().is_main_process:
            for unfinished in output.rglob(f"{SAVING}*"):  # by a process that was killed
                shutil.rmtree(unfinished, ignore_errors=True)
        for step in steps:
            count = step.index + 1
            if step.is_main_process and (count % LOG_EVERY == 0 or count == recipe.steps):
                log(step.index, step.loss, step.lr)
            if count % save_every == 0 or count == recipe.steps or interrupted():
                try:
                    step.save(output)
                    if step.is_main_process:
                        step.ema.save_pretrained(output, torch.float16)  # half the size, same pictures
                except OSError as error:
                    raise OSError(
                        f"{output}: step {count} could not be saved ({error.strerror}); the save before is "
                        "as it was: make room, then --resume goes on from it"
                    ) from error
            if number := interrupted():
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
            if step.is_main_process and (count % sample_every == 0 or count == recipe.steps):
                _show(step.ema, recipe.prompts, output / "samples" / f"step_{count:06d}")
            yield step


def _show(model: Diffusion, prompts: list[str], file: Path) -> None:
    """Write samples of the prompts; the file's ending says what they are."""
    pipe = pipeline(model)
    if isinstance(pipe, TextToSound):
        save_wav(pipe(prompts).tensors, file.with_suffix(".wav"))
    else:
        save_grid(pipe(prompts, num_images=8).tensors, file.with_suffix(".png"), ncols=8)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder that exists; the lock falls with its holder, however
    that ends. There is none on Windows, nor where the file system knows none.

    Raises:
        FileExistsError: another process has it.
    """
    if fcntl is None or not (folder.is_dir() and processes().is_main_process):
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(place)
        raise FileExistsError(f"another process trains into {folder}: choose another folder") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(place)


def _check_network(model: Diffusion, folder: Path) -> None:
    """Raise ValueError unless the run in ``folder`` is of the same network, size and words."""
    config = read_config(folder / "config.json")
    saved = config["net"]
    net: Any = getattr(model.net, "_orig_mod", model.net)  # what torch.compile has wrapped
    name = type(net).__name__
    if saved["name"] != name:
        raise ValueError(f"{folder} holds a run of another kind of network, not of a {name}")
    # Built, not compared as it stands: what an older file does not say has its default.
    before: Any = network_from_config(saved, folder / "config.json")
    for key, value in net.config.items():
        if before.config[key] != value:
            raise ValueError(
                f"{folder} holds a run with {key} = {before.config[key]!r}, not {value!r}: "
                "resume it with that"
            )
    if (shape := config["shape"] and tuple(config["shape"])) != model.shape:
        raise ValueError(f"{folder} holds a run of shape {shape}, not {model.shape}: resume it with that")
    words: Any = getattr(model.encoder, "tokenizer", None)
    if words is not None and (folder / "tokenizer.json").is_file():
        known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        if known != words.get_vocab():
            new = sorted(known.keys() ^ words.get_vocab().keys())[:3]
            raise ValueError(
                f"{folder} holds a run that knows other words ({', '.join(new)}, ...): each would read "
                "another's weights; bring the captions back, give the --from it began with, or train anew"
            )


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], int]]:
    """Turn the first Ctrl-C, or other word to stop, into a note to be read between steps: its number, else 0.
    A second one acts at once.

    A step cut in half would leave weights and averages that belong to different steps.
    """
    caught = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: caught[0]  # only the main thread is sent signals
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    if before[HANG_UP] == signal.SIG_IGN:  # as nohup has it
        del before[HANG_UP]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: types.FrameType | None) -> None:
        caught[0] = number
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: caught[0]
    finally:
        restore()
