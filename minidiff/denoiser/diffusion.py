"""A diffusion model: a network, and what its inputs and outputs mean (chapter 3)."""

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, get_args

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minidiff.denoiser.dit import DiT
from minidiff.denoiser.layers import Condition
from minidiff.denoiser.mlp import MLP
from minidiff.denoiser.unet import UNet
from minidiff.files import fill_folder, locate
from minidiff.forward import (
    SIGMA_DATA,
    NoiseLevel,
    Prediction,
    Target,
    broadcast,
    from_target,
)
from minidiff.schedule import Schedule, schedule_from_config

NETWORKS: dict[str, Any] = {"UNet": UNet, "DiT": DiT, "MLP": MLP}


class Denoiser(Protocol):
    """Anything that can guess what is behind a noisy sample; all that a sampler knows."""

    def __call__(self, x_t: Tensor, level: NoiseLevel, /) -> Prediction: ...


class Diffusion(nn.Module):
    """A network together with the schedule it is trained on and the target it predicts.

    Args:
        net: ``net(x, t, condition)`` -> tensor shaped like ``x``.
        schedule: which noise levels it is trained on.
        target: what its output means: "eps", "x0", "v", "flow" or "edm".
        text: turns captions into conditions (:class:`minidiff.text.TextEncoder`); None for a model
            that takes :class:`Condition` tensors, or none.
        shape: shape of one sample, (C, H, W), for those who draw without data at hand; None if open.

    Raises:
        ValueError: the target is unknown.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target = "eps",
        text: nn.Module | None = None,
        shape: Sequence[int] | None = None,
    ):
        super().__init__()
        if target not in get_args(Target):
            raise ValueError(
                f"unknown target {target!r}: choose one of {', '.join(get_args(Target))}"
            )
        self.net, self.schedule, self.target, self.text = net, schedule, target, text
        self.shape = None if shape is None else tuple(shape)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def encode(self, captions: Sequence[str]) -> Condition:
        """The conditions that the captions stand for, one per caption.

        Raises:
            ValueError: the model has no text encoder.
        """
        if self.text is None:
            raise ValueError(f"this model has no text encoder, so it cannot follow {captions!r}")
        return self.text(captions)

    def forward(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | Sequence[str] | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """The network's raw output, for training.

        The input is brought to unit variance, c_in of Karras et al. 2022, eq. 7. Data are taken to have
        variance 1, for target "edm" that paper's 0.25; a schedule with alpha² + sigma² = 1 and another
        target then changes nothing.

        Args:
            x_t: noisy samples, (B, ...).
            level: their levels, () or (B,).
            condition: what each sample shows: tensors, captions, or None.
            drop: (B,) bool, samples whose condition is withheld.

        Returns:
            Tensor shaped like ``x_t``, in the dtype that the network computes in.
        """
        if isinstance(condition, Condition):
            encoded: Condition | None = condition.to(next(self.net.parameters()))
        else:
            encoded = None if condition is None else self.encode(condition)
        if encoded is not None:
            encoded = encoded.expand(len(x_t))
            if drop is not None:
                encoded = encoded.drop(drop)
        data_std = SIGMA_DATA if self.target == "edm" else 1.0
        scale = (level.alpha**2 * data_std**2 + level.sigma**2).rsqrt()
        x = (broadcast(scale, x_t) * x_t).to(next(self.net.parameters()))  # its dtype and device
        t = level.t.to(x.device, torch.float32).expand(len(x))  # () or (B,) -> (B,)
        return self.net(x, t, encoded)

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | Sequence[str] | None = None,
    ) -> Prediction:
        """The clean sample and the noise the network sees in ``x_t``.

        Args:
            x_t: noisy samples, (B, ...), any floating dtype, on any device.
            level: their level, () or (B,).
            condition: what each sample should show, or None.

        Returns:
            Prediction with tensors of the shape and dtype of ``x_t``, where ``x_t`` is.
        """
        out = self(x_t, level, condition)
        return from_target(out.to(x_t), x_t, level, self.target)

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
    ) -> None:
        """Write config.json, model.safetensors and, with a text encoder, its tokenizer.

        A new folder holds a whole model or none. In an old one the files are replaced one by one, each
        whole; files of other names stay.

        Args:
            folder: where to; made if missing.
            dtype: store weights so (torch.float16 halves the size); None as they are.

        Raises:
            ValueError: the network is not one of this library's, so no config could rebuild it.
        """
        name = type(self.net).__name__
        if NETWORKS.get(name) is not type(self.net):
            raise ValueError(
                f"cannot describe a {name} in config.json (known: {', '.join(NETWORKS)}): "
                "save its state_dict() with safetensors instead"
            )
        config = {
            "format": "minidiff-1",
            "net": {"name": name, **self.net.config},  # type: ignore[dict-item]
            "schedule": self.schedule.config(),
            "target": self.target,
            "shape": self.shape,
            "text": None if self.text is None else self.text.config(),  # type: ignore[operator]
        }
        # Copies: T5 has its embedding table under two names, and safetensors refuses shared memory.
        state = {
            key: value.to(dtype, copy=True).contiguous() for key, value in self.state_dict().items()
        }
        with fill_folder(folder) as scratch:
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            # Not save_file: its files can be read by their owner alone.
            (scratch / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
            if self.text is not None:
                self.text.save_tokenizer(scratch)  # type: ignore[operator]

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> "Diffusion":
        """A saved model, ready to sample: in eval mode, weights in float32.

        Args:
            name: a model shipped with minidiff ("critters"), a folder, or a Hugging Face hub id.
            device: where to put it; None for the CPU.

        Raises:
            FileNotFoundError: no such model, or the folder holds none.
            ValueError: the folder's config.json is not one of this library's.
        """
        folder = locate(name)
        try:
            config = json.loads((folder / "config.json").read_text())
            net, schedule = dict(config["net"]), schedule_from_config(config["schedule"])
            network = NETWORKS[net.pop("name")](**net)
            target, shape, encoder = config["target"], config["shape"], config["text"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder / 'config.json'} is not a minidiff model: {error}"
            ) from error
        text = None
        if encoder is not None:
            from minidiff.text import TextEncoder  # a later chapter, needed by text models alone

            text = TextEncoder.from_config(encoder, folder)
        model = cls(network, schedule, target, text, shape)
        state = load_file(folder / "model.safetensors")
        model.load_state_dict({key: _float32(value) for key, value in state.items()})
        return model.to(device or "cpu").eval().requires_grad_(False)


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
