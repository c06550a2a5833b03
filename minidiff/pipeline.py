"""Text to image in one call."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from minidiff.denoiser import Condition, Diffusion
from minidiff.guidance import clip, guide
from minidiff.sampling import SAMPLERS, Sampler, generators, noise, sample


class Images(NamedTuple):
    """What :class:`TextToImage` drew.

    Attributes:
        images: PIL images, num_images for the first prompt, then for the second, and so on.
        tensors: the same, (B, C, H, W) float32 in [-1, 1], on the CPU.
    """

    images: list[Image.Image]
    tensors: Tensor


class TextToImage:
    """A text-conditioned model with a sampler and guidance around it.

    Args:
        model: a :class:`~minidiff.denoiser.Diffusion` with a text encoder.

    Raises:
        ValueError: the model has no text encoder.
    """

    def __init__(self, model: Diffusion):
        if model.text is None:
            raise ValueError("this model has no text encoder, so it cannot follow a prompt")
        self.model = model

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> "TextToImage":
        """Load a model that is shipped ("critters"), in a folder, or on the Hugging Face hub.

        Args:
            name: which.
            device: where to put it; None for a GPU if there is one, else the CPU.

        Raises:
            FileNotFoundError: no such model.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(Diffusion.from_pretrained(name, device))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images: int = 1,
        steps: int = 20,
        guidance: float = 3.0,
        negative: str | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        sampler: str = "dpmpp_2m",
        size: tuple[int, int] | None = None,
        batch_size: int = 64,
    ) -> Images:
        """Draw images.

        Image i of the result (counted over all prompts) is made from the seed ``seed + i`` alone: it is
        the same whatever else is drawn beside it.

        Args:
            prompt: what to draw; the empty prompt draws anything. A list draws each.
            num_images: images per prompt.
            steps: sampling steps.
            guidance: guidance scale; 1 is none.
            negative: what to stay away from.
            interval: times between which guidance acts, see :func:`~minidiff.guidance.guide`.
            seed: the same seed gives the same images.
            sampler: "dpmpp_2m", "heun", "ddim" or "ddpm".
            size: (height, width); None for the size the model was trained on.
            batch_size: images drawn together; only memory and speed depend on it.

        Raises:
            ValueError: a number is out of range, the sampler unknown, or the model of no known size.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for name, value in (
            ("num_images", num_images),
            ("steps", steps),
            ("batch_size", batch_size),
        ):
            if value < 1:
                raise ValueError(f"{name} = {value}: use at least 1")
        if not prompts:
            raise ValueError("no prompt: give a string, or a list with at least one")
        run = _sampler(sampler)
        shape = self._shape(size)
        model, count = self.model, len(prompts) * num_images
        condition = model.encode(prompts)
        other = None if negative is None else model.encode([negative])
        levels = model.schedule.levels(steps)
        parts = []
        for start in range(0, count, batch_size):
            numbers = range(start, min(start + batch_size, count))
            asked = Condition(*(part[[i // num_images for i in numbers]] for part in condition))
            denoise = clip(guide(model.denoise, asked, guidance, other, interval))
            random = generators(seed + start, len(numbers))
            x = noise((len(numbers), *shape), levels[0], generator=random, device=model.device)
            extra = {"generator": random} if sampler == "ddpm" else {}
            parts.append(sample(run(denoise, x, levels, **extra)).float().cpu())
        tensors = torch.cat(parts).clamp(-1, 1)
        return Images([to_pil(image) for image in tensors], tensors)

    def _shape(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        if self.model.shape is None:
            raise ValueError(
                "the model does not say the shape of its images: set model.shape = (C, H, W)"
            )
        return self.model.shape if size is None else (self.model.shape[0], *size)


def to_pil(image: Tensor) -> Image.Image:
    """One image (1 or 3, H, W) in [-1, 1] as a PIL image of the same size."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(
        pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    )


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
