"""Text to image, and text to sound, in one call."""

import math
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from minidiff.checks import seed_number, whole
from minidiff.denoiser import Diffusion
from minidiff.device import default_device
from minidiff.files import StrPath
from minidiff.forward import TINY
from minidiff.guidance import clamp, guide
from minidiff.pixels import to_bytes, to_pil
from minidiff.sampling import SAMPLERS, generators, noise
from minidiff.sounds import RATE, to_int16

BATCH = 64
"""So many samples are drawn together, if nothing else is asked for."""
PART = 64 * BATCH
"""So many prompts are read together; of many more, the reading would take minutes, and memory, before the
first sample."""


class Images(NamedTuple):
    """What :class:`TextToImage` drew.

    Attributes:
        images: PIL images, num_images for the first prompt, then for the second, and so on.
        tensors: the same, (B, C, H, W) float32 in [-1, 1], on the CPU.
    """

    images: list[Image.Image]
    tensors: Tensor


class Sounds(NamedTuple):
    """What :class:`TextToSound` played.

    Attributes:
        sounds: arrays (L,) float32 in [-1, 1], num_sounds for the first prompt, then for the second, and so
            on. tensors: the same, (B, 1, L), on the CPU; :func:`minidiff.sounds.save_wav` writes them.
        rate: samples a second.
    """

    sounds: list[NDArray[np.float32]]
    tensors: Tensor
    rate: int


class TextToImage:
    """A text-conditioned model with a sampler and guidance around it.

    Args:
        model: a :class:`~minidiff.denoiser.Diffusion` with a text encoder.

    Raises:
        ValueError: the model has no text encoder, or it does not draw images but plays sounds.
    """

    axes = 3
    """Of what is drawn: (C, H, W)."""

    usual_guidance = 3.0
    """Guidance scale of a call that names none."""

    progress: Callable[..., AbstractContextManager[Any]] | None = None
    """What shows how far a call is, such as ``pipe.progress = tqdm.auto.tqdm``; None for nothing. It is
    called with ``total``, ``desc`` and ``unit``, and what it gives has ``update()``, called after each
    sampling step of each batch."""

    def __init__(self, model: Diffusion):
        if model.encoder is None:
            raise ValueError("this model has no text encoder, so it cannot follow a prompt")
        if model.shape is not None and len(model.shape) != self.axes:
            other = {2: "sounds: use TextToSound", 3: "images: use TextToImage"}.get(len(model.shape))
            raise ValueError(f"this model makes {other or f'samples of shape {tuple(model.shape)}'}")
        self.model = model

    @classmethod
    def from_pretrained(cls, name: StrPath, device: torch.device | str | None = None, **options: Any) -> Self:
        """Load a model that is shipped ("critters", "tones"), in a folder, or on the Hugging Face hub.

        Args:
            name: which.
            device: where to put it; None for a GPU if there is one, else the CPU.
            options: ``net``, ``encoder``, ``revision`` and ``token``, as
                :meth:`Diffusion.from_pretrained <minidiff.denoiser.Diffusion.from_pretrained>` takes them.

        Raises:
            FileNotFoundError: no such model.
            ValueError: it cannot be rebuilt, has no text encoder, or makes something else.
        """
        return cls(Diffusion.from_pretrained(name, device or default_device(), **options))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        steps: int = 20,
        guidance: float = 3.0,
        negative: str | Sequence[str] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        seed: int = 0,
        sampler: str = "dpmpp_2m",
        size: tuple[int, int] | None = None,
        batch_size: int = BATCH,
    ) -> Images:
        """Draw images.

        Image i of the result (counted over all prompts) is made from the seed ``seed + i`` alone: it is
        the same whatever else is drawn beside it.

        Args:
            prompt: what to draw. A list draws each. A prompt without a word that the model knows, such
                as the empty one, draws anything, with a warning.
            num_images: images per prompt.
            steps: sampling steps.
            guidance: guidance scale; 1 is none.
            negative: what to stay away from: for all images, or in a list for each prompt ("" for
                nothing in particular).
            interval: times between which guidance acts, see :func:`~minidiff.guidance.guide`.
            rescale: 0 to 1, how much of the contrast that guidance adds is taken back, see there.
            seed: the same seed gives the same images.
            sampler: "dpmpp_2m", "adams", "heun", "ddim" or "ddpm".
            size: (height, width); None for the size the model was trained on.
            batch_size: images drawn together; only memory and speed depend on it.

        Raises:
            ValueError: a number is out of range, a prompt not a string, the sampler unknown, the model of
                no known size, or there are neither one negative prompt nor as many as prompts.

        Warns:
            UserWarning: words are not known, or too many; nothing is left of a prompt.
        """
        tensors = self._make(
            prompt, num_images, steps, guidance, negative, interval, rescale, seed, sampler, size, batch_size
        )
        return Images([to_pil(image) for image in tensors], tensors)

    def _make(
        self,
        prompt: str | Sequence[str],
        number: int,
        steps: int,
        guidance: float,
        negative: str | Sequence[str] | None,
        interval: tuple[float, float],
        rescale: float,
        seed: int,
        sampler: str,
        size: tuple[int, ...] | None,
        batch_size: int,
        name: str = "num_images",
    ) -> Tensor:
        """Samples (B, ...) in [-1, 1], as :meth:`__call__` has it; ``name`` is that of the ``number``."""
        prompts = _strings("prompt", prompt)
        negatives = [] if negative is None else _strings("negative", negative)
        number, steps = whole(name, number), whole("steps", steps)
        batch_size = whole("batch_size", batch_size)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance = {guidance}: give a finite number; 1 is none")
        if not prompts:
            raise ValueError("no prompt: give a string, or a list with at least one")
        if not isinstance(negative, str | None) and len(negatives) != len(prompts):
            raise ValueError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts: "
                "give one string for all, or a list with one for each"
            )
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        model, count = self.model, len(prompts) * number
        seed = seed_number(seed, count)
        if model.shape is None:
            wanted = "images: set model.shape = (C, H, W)"
            if self.axes == 2:
                wanted = "sounds: set model.shape = (1, L)"
            raise ValueError(f"the model does not say the shape of its {wanted}")
        if size is not None and not (isinstance(size, Sequence) and len(size) == len(model.shape) - 1):
            raise ValueError(
                f"size = {size!r}: give {'(height, width)' if len(model.shape) == 3 else '(length,)'}"
            )
        shape = model.shape if size is None else (model.shape[0], *(whole("size", side) for side in size))
        ids, avoided = model.ids(prompts), model.ids(negatives) if negatives else None
        # At alpha = 0 the noise does not tell x0: such a model starts where a trace of data is left.
        blind = model.target == "eps" and model.schedule(1.0).alpha < TINY
        levels = model.schedule.levels(steps, "log_snr" if blind else "uniform")
        starts = range(0, count, batch_size)
        parts: list[Tensor] = []
        warned: list[str] = []
        show = self.progress or _Silent
        with show(total=len(starts) * steps, desc=_counted(self, count), unit="step") as bar:
            for start in starts:
                numbers = range(start, min(start + batch_size, count))
                # The prompts of these samples alone: the states of a million prompts would fill the memory.
                some = slice(start // number, numbers[-1] // number + 1)
                rows = [i // number - some.start for i in numbers]
                condition = model.encode(ids[some])
                told = condition.mask.any(1).tolist()
                empty = [p for p, any_token in zip(prompts[some], told, strict=True) if not any_token]
                if empty and empty != warned:
                    warnings.warn(
                        f"nothing to follow in {reprlib.repr(empty)}: drawn without a prompt", stacklevel=4
                    )  # the caller is beyond __call__ and its torch.no_grad
                    warned = empty
                other = None
                if avoided is not None:
                    other = model.encode(avoided[some] if len(avoided) > 1 else avoided)
                    other = other.expand(len(told)).take(rows)
                guided = guide(model.denoise, condition.take(rows), guidance, other, interval, rescale)
                denoise = clamp(guided)
                random = generators(seed + start, len(numbers))
                x = noise((len(numbers), *shape), levels[0], generator=random, device=model.device)
                extra = {"generator": random} if sampler == "ddpm" else {}
                for state in SAMPLERS[sampler](denoise, x, levels, **extra):
                    x = state.x
                    bar.update()
                parts.append(x.float().cpu())
        return torch.cat(parts).clamp_(-1, 1)


class TextToSound(TextToImage):
    """The same for a model that plays sounds, samples of shape (1, L).

    For example::

        pipe = TextToSound.from_pretrained("tones")
        played = pipe("a low bell, then a high flute")
        save_wav(played.tensors, "bell.wav")

    Args:
        model: a :class:`~minidiff.denoiser.Diffusion` with a text encoder.

    Raises:
        ValueError: the model has no text encoder, or it does not play sounds.
    """

    axes = 2

    usual_guidance = 2.0  # at which the shipped model is right more often than at 3

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        *,
        num_sounds: int = 1,
        steps: int = 20,
        guidance: float = 2.0,
        negative: str | Sequence[str] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        rescale: float = 0.0,
        seed: int = 0,
        sampler: str = "dpmpp_2m",
        batch_size: int = BATCH,
    ) -> Sounds:
        """Play sounds; everything but the usual guidance is as :class:`TextToImage` has it.

        Raises:
            ValueError: as for images.

        Warns:
            UserWarning: as for images.
        """
        tensors = self._make(
            prompt, num_sounds, steps, guidance, negative, interval, rescale, seed, sampler, None, batch_size,
            "num_sounds",
        )  # fmt: skip
        return Sounds(list(tensors[:, 0].numpy()), tensors, RATE)


def draw_many(
    pipe: TextToImage, prompt: str, number: int, *, seed: int = 0, steps: int = 20, **how: Any
) -> Tensor:
    """Samples of one prompt as they are stored, drawn :data:`BATCH` at a time and with one bar for all.

    They are those that ``pipe`` draws at once, since each depends on its own seed alone; but while a sample
    is drawn it takes many times its bytes.

    Args:
        pipe: what draws; its ``progress`` shows the bar.
        prompt: of all samples.
        number: how many.
        seed: of the first; the next has ``seed + 1``.
        steps: sampling steps.
        how: what else the pipeline takes.

    Returns:
        (number, C, H, W) uint8, or sounds (number, 1, L) int16.

    Raises:
        ValueError: as the pipeline does.
    """
    seed, starts = seed_number(seed, number), range(0, number, BATCH)
    sounds = isinstance(pipe, TextToSound)
    name, store = ("num_sounds", to_int16) if sounds else ("num_images", to_bytes)
    parts = []
    with _one_bar(pipe, number, len(starts) * steps):
        for start in starts:
            few: dict[str, Any] = {name: min(BATCH, number - start), "batch_size": BATCH}
            parts.append(store(pipe(prompt, seed=seed + start, steps=steps, **few, **how).tensors))
    return torch.cat(parts)


def draw_each(
    pipe: TextToImage, prompts: Iterable[str], number: int, *, seed: int = 0, steps: int = 20, **how: Any
) -> Iterator[Tensor]:
    """One sample for each of many prompts, in parts of :data:`PART`, and with one bar for all.

    They are those that ``pipe`` draws of all the prompts at once. But no prompt is asked for, and none read,
    before the samples before its part have been handed over: so the first step is made at once, and what is
    not kept of a part takes no memory.

    Args:
        pipe: what draws; its ``progress`` shows the bar.
        prompts: at least ``number`` strings, made as they are asked for if they come from an iterator.
        number: how many are drawn.
        seed: of the first; the next has ``seed + 1``.
        steps: sampling steps.
        how: what else the pipeline takes.

    Yields:
        (at most PART, C, H, W) float32 in [-1, 1], or sounds (at most PART, 1, L), on the CPU.

    Raises:
        ValueError: as the pipeline does.
    """
    number, prompts = whole("number", number), iter(prompts)
    seed = seed_number(seed, number)
    with _one_bar(pipe, number, -(-number // BATCH) * steps):
        for start in range(0, number, PART):
            some = list(islice(prompts, min(PART, number - start)))
            yield pipe(some, seed=seed + start, steps=steps, batch_size=BATCH, **how).tensors


@contextmanager
def _one_bar(pipe: TextToImage, number: int, total: int) -> Iterator[None]:
    """One bar of ``total`` updates for all calls of the pipeline meanwhile."""
    before = pipe.progress
    try:
        with (before or _Silent)(total=total, desc=_counted(pipe, number), unit="step") as bar:
            pipe.progress = lambda **_: nullcontext(bar)
            yield
    finally:
        pipe.progress = before


def _counted(pipe: TextToImage, number: int) -> str:
    """Such as "1,000 images"."""
    return f"{number:,} {'image' if pipe.axes == 3 else 'sound'}" + "s" * (number > 1)


def pipeline(model: Diffusion) -> TextToImage:
    """The model with what it makes around it: :class:`TextToSound` for samples (1, L), else
    :class:`TextToImage`."""
    sound = model.shape is not None and len(model.shape) == TextToSound.axes
    return TextToSound(model) if sound else TextToImage(model)


class _Silent(AbstractContextManager["_Silent"]):
    """No progress."""

    def __init__(self, **options: Any):
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def update(self) -> None:
        pass


def _strings(name: str, value: object) -> list[str]:
    """One string or several, as a list."""
    several = isinstance(value, Iterable) and not isinstance(value, str)
    values: list[Any] = list(value) if several else [value]  # type: ignore[call-overload]
    for one in values:
        if not isinstance(one, str):
            raise ValueError(
                f"{name} {reprlib.repr(one)} is no string: give one string, or a list of strings"
            )
    return values
