"""minidiff: diffusion models, small and exact.

The modules follow the chapters of the book: :mod:`~minidiff.forward`, :mod:`~minidiff.schedule`,
:mod:`~minidiff.condition`, :mod:`~minidiff.denoiser`, :mod:`~minidiff.loss`, :mod:`~minidiff.training`,
:mod:`~minidiff.sampling`, :mod:`~minidiff.guidance` and :mod:`~minidiff.text`. What they define for users
is also found here.

Names that need a large library (transformers, accelerate, torchvision, matplotlib) are imported when they
are first asked for, so that ``import minidiff`` takes little longer than ``import torch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minidiff import exact, likelihood, pixels, sounds
from minidiff.condition import Condition, Encoder, LabelEncoder
from minidiff.denoiser import MLP, Denoiser, Diffusion, DiT, UNet, WaveUNet
from minidiff.doctor import doctor
from minidiff.forward import NoiseLevel, Prediction, diffuse, from_target, posterior, to_target, transition
from minidiff.guidance import clamp, gradient_guide, guide, threshold
from minidiff.interop import from_diffusers
from minidiff.loss import loss
from minidiff.pipeline import TextToImage, TextToSound
from minidiff.sampling import State, adams, ddim, ddpm, dpmpp_2m, fit_levels, generators, heun, noise, sample
from minidiff.schedule import VP, Betas, Cosine, Flow, Karras, Linear, Schedule, Shifted, Sigmoid

if TYPE_CHECKING:
    from minidiff import critters, data, metrics, plots, tones
    from minidiff.step import EMA
    from minidiff.text import CLIP, Alignment, TextEncoder
    from minidiff.training import Step, train

__version__ = "0.1.0"

_MODULES = ("critters", "data", "metrics", "plots", "tones")
_HOMES = {  # the module each name is in
    "CLIP": "text", "Alignment": "text", "TextEncoder": "text",
    "EMA": "step", "Step": "training", "train": "training",
}  # fmt: skip

__all__ = [
    "CLIP", "EMA", "MLP", "VP", "Alignment", "Betas", "Condition", "Cosine", "Denoiser", "DiT",
    "Diffusion", "Encoder", "Flow", "Karras", "LabelEncoder", "Linear", "NoiseLevel", "Prediction",
    "Schedule", "Shifted", "Sigmoid", "State", "Step", "TextEncoder", "TextToImage", "TextToSound", "UNet",
    "WaveUNet", "adams",
    "clamp", "critters", "data", "ddim", "ddpm", "diffuse", "doctor", "dpmpp_2m", "exact",
    "fit_levels", "from_diffusers", "from_target", "generators", "gradient_guide", "guide", "heun",
    "likelihood", "loss", "metrics", "noise", "pixels", "plots", "posterior", "sample", "sounds", "threshold",
    "to_target", "tones", "train", "transition",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What was not imported yet (PEP 562); Python asks here for names it does not find."""
    if name in _MODULES:
        return import_module(f"minidiff.{name}")
    if name in _HOMES:
        globals()[name] = value = getattr(import_module(f"minidiff.{_HOMES[name]}"), name)
        return value
    raise AttributeError(f"module 'minidiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
