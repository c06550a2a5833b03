"""Networks that tell data from noise, and the model that wraps them (chapter 3)."""

from minidiff.denoiser.diffusion import Denoiser, Diffusion
from minidiff.denoiser.dit import DiT
from minidiff.denoiser.layers import Conditioning
from minidiff.denoiser.mlp import MLP
from minidiff.denoiser.unet import UNet
from minidiff.denoiser.waves import WaveUNet

__all__ = ["MLP", "Conditioning", "Denoiser", "DiT", "Diffusion", "UNet", "WaveUNet"]
