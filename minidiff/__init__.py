"""minidiff: diffusion models, small and exact.

The modules follow the chapters of the book: :mod:`~minidiff.forward`, :mod:`~minidiff.schedule`,
:mod:`~minidiff.denoiser`, :mod:`~minidiff.training`, :mod:`~minidiff.sampling`,
:mod:`~minidiff.guidance`, :mod:`~minidiff.text` and :mod:`~minidiff.alignment`. What they define for users
is also found here.
"""

from minidiff import data, exact, likelihood, metrics, plots
from minidiff.alignment import CLIP, Alignment
from minidiff.denoiser import MLP, Condition, Denoiser, Diffusion, DiT, UNet
from minidiff.doctor import doctor
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
from minidiff.guidance import clip, gradient_guide, guide, threshold
from minidiff.interop import from_diffusers
from minidiff.pipeline import TextToImage
from minidiff.sampling import State, ddim, ddpm, dpmpp_2m, generators, heun, noise, sample
from minidiff.schedule import (
    VP,
    Betas,
    Cosine,
    Flow,
    Karras,
    Linear,
    Schedule,
    Shifted,
    Sigmoid,
)
from minidiff.text import TextEncoder
from minidiff.training import EMA, Step, loss, train

__version__ = "0.1.0"

__all__ = [
    "CLIP", "EMA", "MLP", "VP", "Alignment", "Betas", "Condition", "Cosine", "Denoiser", "DiT", "Diffusion",
    "Flow", "Gaussian", "Karras", "Linear", "NoiseLevel", "Prediction", "Schedule", "Shifted", "Sigmoid",
    "State", "Step", "TextEncoder", "TextToImage", "UNet", "clip", "data", "ddim", "ddpm", "diffuse",
    "doctor", "dpmpp_2m", "exact", "from_diffusers", "from_target", "generators", "gradient_guide", "guide",
    "heun", "likelihood", "loss", "metrics", "noise", "plots", "posterior", "sample", "threshold",
    "to_target", "train", "transition",
]  # fmt: skip
