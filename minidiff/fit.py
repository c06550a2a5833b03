"""A training run on disk: what ``minidiff train`` does with a recipe, step by step."""

import json
import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minidiff.data import Batches
from minidiff.denoiser import Diffusion
from minidiff.denoiser.diffusion import network_from_config
from minidiff.device import bytes_on_device
from minidiff.files import StrPath
from minidiff.pipeline import TextToSound, pipeline
from minidiff.pixels import save_grid
from minidiff.recipes import Recipe
from minidiff.sounds import save_wav
from minidiff.state import LOG_EVERY, LossLog, saved_steps
from minidiff.training import Step, processes, train


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
    * ``training.safetensors``: what ``resume=True`` goes on from;
    * ``loss.csv``: ``step,loss,lr,images_per_s`` of every tenth step, written as it goes.

    An interrupt (Ctrl-C) lets the step in progress end, writes everything, and is raised again after. What
    does not fit ``output`` is said at once, before data are drawn or read for a network that needs none.

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
        FileExistsError: not ``resume``, and ``output`` holds a run already.
        ValueError: ``resume``, and the run in ``output`` is of another network.
        KeyboardInterrupt: after the interrupted run has been saved.
    """
    output = Path(output)
    if not resume and (output / "training.safetensors").exists():
        raise FileExistsError(f"{output} holds a training run: add --resume, or choose another folder")
    before = saved_steps(output) if resume else 0
    if resume:
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
        recipe.model, batches, recipe.steps,
        lr=recipe.lr, weighting=recipe.weighting, seed=seed, resume=output if before else None,
    )  # fmt: skip

    log = LossLog(output / "loss.csv", batch_size * processes().num_processes, before)
    with _interrupts_between_steps() as interrupted:
        for step in steps:
            count = step.index + 1
            if step.is_main_process and (count % LOG_EVERY == 0 or count == recipe.steps):
                log(step.index, step.loss, step.lr)
            if count % save_every == 0 or count == recipe.steps or interrupted():
                step.save(output)
                if step.is_main_process:
                    step.ema.save_pretrained(output, torch.float16)  # half the size, same pictures
            if interrupted():
                raise KeyboardInterrupt
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


def _check_network(model: Diffusion, folder: Path) -> None:
    """Raise ValueError unless the run in ``folder`` is of the same network."""
    saved = json.loads((folder / "config.json").read_text())["net"]
    net: Any = model.net
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


@contextmanager
def _interrupts_between_steps() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a note to be read between steps; a second one acts at once.

    A step cut in half would leave weights and averages that belong to different steps.
    """
    caught = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield caught.is_set  # only the main thread is sent signals
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: types.FrameType | None) -> None:
        caught.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught.is_set
    finally:
        signal.signal(signal.SIGINT, before)
