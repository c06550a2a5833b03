"""Point sets in the plane: data that fit into a picture as a whole.

A sample is a point (2,), so a whole distribution is one scatter plot and a network for it trains in
seconds. Every set but the ring is a function ``(n, generator) -> (n, 2)``; the ring is a Gaussian
mixture, whose denoiser is known exactly. All are centred near 0, and the two coordinates together
have a variance of about 1 each, so that one noise schedule serves all of them (and images, too).

    x0 = points.cat_in_a_hat(4000, torch.Generator().manual_seed(0))
"""

import math
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minidiff.exact import GaussianMixture


def two_moons(n: int, generator: torch.Generator | None = None, noise: float = 0.08) -> Tensor:
    """Two half circles, each reaching into the other.

    Args:
        n: number of points.
        generator: source of randomness on the CPU; None for torch's global one.
        noise: standard deviation across the line, in the units of the result.

    Returns:
        (n, 2) float32.
    """
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return torch.stack([x, y], 1) / 0.705 + noise * torch.randn(n, 2, generator=generator)


def spiral(n: int, generator: torch.Generator | None = None, noise: float = 0.06) -> Tensor:
    """A spiral of two turns (the Swiss roll seen from its side), equally dense along its length.

    Arguments and result as in :func:`two_moons`.
    """
    # The radius grows with the angle, and so does the length of a turn: hence the square root.
    low, high = math.pi, 5 * math.pi
    angle = (low**2 + (high**2 - low**2) * torch.rand(n, generator=generator)).sqrt()
    x0 = angle[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    x0 = (x0 - torch.tensor([-0.16, 2.0])) / 7.9  # in the middle, and of variance 1
    return x0 + noise * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator | None = None) -> Tensor:
    """The black squares of a 4 x 4 board; its edges and gaps blur first when a sampler is wrong.

    Arguments as in :func:`two_moons`; (n, 2) float32.
    """
    square = torch.randint(8, (n,), generator=generator)
    row = square // 2
    column = 2 * (square % 2) + row % 2
    corner = torch.stack([column, row], 1) - 2.0
    return (corner + torch.rand(n, 2, generator=generator)) * math.sqrt(3) / 2


def ring_of_gaussians(modes: int = 8, std: float = 0.15) -> GaussianMixture:
    """Equal Gaussians on a circle around 0, as an exact mixture: ``ring_of_gaussians().sample(n)``.

    Args:
        modes: number of Gaussians, >= 1.
        std: standard deviation of each, in [0, 1).

    Returns:
        GaussianMixture over (2,) with variance 1 per coordinate (for ``modes`` >= 3).

    Raises:
        ValueError: an argument is out of range.
    """
    if modes < 1:
        raise ValueError(f"modes = {modes}: a ring needs at least 1")
    if not 0 <= std < 1:
        raise ValueError(f"std = {std:g} is outside [0, 1)")
    angle = 2 * math.pi * torch.arange(modes) / modes
    radius = math.sqrt(2 * (1 - std**2))  # between the means and within them: radius²/2 + std² = 1
    return GaussianMixture(radius * torch.stack([angle.cos(), angle.sin()], 1), std)


def cat_in_a_hat(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Points spread evenly over a cat that wears a top hat. Arguments as above; (n, 2) float32."""
    pixels, scale = _cat_pixels()
    chosen = torch.randint(len(pixels), (n,), generator=generator)
    return (pixels[chosen] + torch.rand(n, 2, generator=generator) - 0.5) / scale


@cache
def _cat_pixels() -> tuple[Tensor, float]:
    """Where the drawing is filled, (P, 2) pixels around their centre, y up, and their spread."""
    picture = Image.new("1", (400, 440))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((58, 214, 342, 430), fill=1)  # head
    for side in (-1, 1):  # left and right, mirrored about x = 200
        ear = [(140, 300), (148, 126), (62, 236)]
        draw.polygon([(200 + side * x, y) for x, y in ear], fill=1)
        inner = [(124, 238), (132, 172), (92, 226)]
        draw.polygon([(200 + side * x, y) for x, y in inner], fill=0)
        for end in (318, 354, 390):  # whiskers
            start = (200 + side * 100, 354 + (end - 354) // 3)
            draw.line([start, (200 + side * 200, end)], fill=1, width=8)
        eye = 200 + side * 62
        draw.ellipse((eye - 36, 262, eye + 36, 322), fill=0)
        draw.ellipse((eye - 12, 264, eye + 12, 320), fill=1)  # slit
        cheek = 200 + side * 28
        draw.arc((cheek - 30, 352, cheek + 30, 396), 10, 170, fill=0, width=9)  # mouth
    draw.polygon([(174, 336), (226, 336), (200, 362)], fill=0)  # nose
    draw.rounded_rectangle((112, 174, 288, 200), 13, fill=1)  # brim
    draw.polygon([(132, 10), (268, 10), (254, 180), (146, 180)], fill=1)
    draw.rectangle((120, 136, 280, 158), fill=0)  # band
    rows, columns = np.nonzero(np.asarray(picture))
    pixels = torch.tensor(np.stack([columns, -rows], 1), dtype=torch.float32)
    pixels = pixels - pixels.mean(0)
    return pixels, pixels.square().mean().sqrt().item()
