"""minidiff: diffusion models, small and exact.

The modules follow the chapters of the book: :mod:`~minidiff.forward`, :mod:`~minidiff.schedule`,
:mod:`~minidiff.denoiser`, :mod:`~minidiff.training`, :mod:`~minidiff.sampling`,
:mod:`~minidiff.guidance` and :mod:`~minidiff.text`. What they define for users is also found here.
"""

from minidiff import data, exact, metrics, plots
from minidiff.denoiser import MLP, Condition, Denoiser, Diffusion, DiT, UNet
from minidiff.forward import (
    Gaussian,
    NoiseLevel,
    Prediction,
    diffuse,
    from_target,
    posterior,
    to_target,
    transition,
)
from minidiff.guidance import clip, guide
from minidiff.pipeline import TextToImage
from minidiff.sampling import State, ddim, ddpm, dpmpp_2m, generators, heun, noise, sample
from minidiff.schedule import Cosine, Flow, Karras, Linear, Schedule, Sigmoid
from minidiff.text import TextEncoder
from minidiff.training import EMA, Step, loss, train

__version__ = "0.1.0"

__all__ = [
    "EMA", "MLP", "Condition", "Cosine", "Denoiser", "DiT", "Diffusion", "Flow", "Gaussian", "Karras",
    "Linear", "NoiseLevel", "Prediction", "Schedule", "Sigmoid", "State", "Step", "TextEncoder",
    "TextToImage", "UNet", "clip", "data", "ddim", "ddpm", "diffuse", "dpmpp_2m", "exact",
    "from_target", "generators", "guide", "heun", "loss", "metrics", "noise", "plots", "posterior",
    "sample", "to_target", "train", "transition",
]  # fmt: skip
