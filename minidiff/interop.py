"""The way in from the ``diffusers`` library.

:func:`from_diffusers` makes a model of one of their networks and the scheduler it was trained with, so that
every sampler, guidance, training run and test of this library works with models people already have::

    unet = UNet2DModel.from_pretrained(...)
    model = from_diffusers(unet, DDPMScheduler.from_pretrained(...))
    x = noise((4, 3, 32, 32), model.schedule(1.0))
    x0 = sample(dpmpp_2m(model.denoise, x, model.schedule.levels(20)))

Three families of schedulers cover what is in use: chains of betas (DDPM and all that carry its table,
whatever sampler they stand for), flow matching, and EDM. Their timestep i of a chain is our time
(i + 1)/T: they count the first noisy level as 0, we count clean data as 0.

The way out is a method: :meth:`Diffusion.to_diffusers <minidiff.denoiser.Diffusion.to_diffusers>`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.condition import Condition
from minidiff.denoiser import Diffusion
from minidiff.forward import SIGMA_DATA, NoiseLevel, Target, broadcast
from minidiff.schedule import PREDICTION_TYPES, Betas, Chain, Flow, Karras, Shifted

TARGETS: dict[str, Target] = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}  # type: ignore[misc]
TARGETS["flow_prediction"] = "flow"


class DiffusersModel(Diffusion):
    """A network of ``diffusers`` as a model of this library; made by :func:`from_diffusers`.

    It is trained (:func:`minidiff.train`), examined (:func:`minidiff.doctor`) and sampled like any other.
    ``model.net`` is the network itself, and its ``save_pretrained`` writes it as theirs.
    """

    def ids(self, values: Any) -> Any:
        """Conditions as the network takes them: they pass as they are, unless there is an encoder."""
        return values if self.encoder is None else super().ids(values)

    def forward(
        self, x_t: Tensor, level: NoiseLevel, condition: Condition | Tensor | Mapping[str, Any] | None = None
    ) -> Tensor:
        """The network's raw output, without a learned variance if it has one.

        Args:
            x_t: (B, ...) noisy samples, for latent models latents.
            level: of this model's schedule, shape () or (B,).
            condition: a mapping is handed to the network as keyword arguments, as it is. A tensor
                (B, T, D) or a :class:`~minidiff.condition.Condition`, with its mask, becomes
                ``encoder_hidden_states``; a tensor (B,) of integers ``class_labels``. One, (1, ...),
                serves all samples. None passes nothing.

        Returns:
            Tensor shaped like ``x_t``, in the network's dtype.
        """
        first = next(self.net.parameters())
        x, t = x_t, level.t.to(first.device, torch.float32).expand(len(x_t))
        sigma = level.sigma.to(first.device, torch.float32).expand(len(x_t))
        if isinstance(self.schedule, Karras):
            x = x_t * broadcast((level.sigma**2 + SIGMA_DATA**2).rsqrt(), x_t)  # c_in
            time = sigma.log() / 4  # c_noise
        elif self.target == "flow":
            time = sigma * 1000
        else:
            steps = len(self.schedule.betas) if isinstance(self.schedule, Chain) else 1000
            time = (t * steps - 1).clamp(min=0)
        if isinstance(condition, Condition):
            condition = condition.expand(len(x_t))
        elif isinstance(condition, Tensor) and len(condition) == 1:  # one condition for all samples
            condition = condition.expand(len(x_t), *condition.shape[1:])
        arguments = _arguments(condition, first)
        out = self.net(x.to(first.device, first.dtype), timestep=time, **arguments)
        out = out.sample if hasattr(out, "sample") else out[0]
        if out.shape[1] == 2 * x_t.shape[1]:  # mean and variance (Nichol & Dhariwal 2021)
            out = out.chunk(2, dim=1)[0]
        result: Tensor = out
        return result


def from_diffusers(net: nn.Module, scheduler: Any) -> DiffusersModel:
    """A model made of a ``diffusers`` network and the scheduler it was trained with.

    The network may be a ``UNet2DModel``, a ``UNet2DConditionModel``, a ``DiTTransformer2DModel``, or any
    other that is called ``net(x, timestep=..., **condition)``. It is put into eval mode.

    Args:
        net: the network.
        scheduler: any of their schedulers with a table of betas, flow sigmas, or EDM's range.

    Raises:
        ValueError: the scheduler is of another kind or shifts by image size, or its prediction type is
            unknown.
    """
    config, size = scheduler.config, getattr(net, "config", {})
    side = size.get("sample_size")
    shape = (size["in_channels"], side, side) if isinstance(side, int) else None
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    net.eval()
    if name.startswith("EDM"):
        if prediction != "epsilon" or abs(config.sigma_data - SIGMA_DATA) > 1e-9:
            raise ValueError(
                f"{name} with prediction_type {prediction!r} and sigma_data {config.sigma_data:g}: only "
                f"'epsilon' and {SIGMA_DATA:g} are known here"
            )
        return DiffusersModel(net, Karras(config.sigma_min, config.sigma_max, config.rho), "edm", shape=shape)
    if name.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name} shifts by image size (use_dynamic_shifting): work out the shift of your size and "
                "give DiffusersModel(net, Shifted(Flow(), shift), 'flow')"
            )
        shift = float(config.get("shift") or 1.0)
        return DiffusersModel(net, Flow() if shift == 1 else Shifted(Flow(), shift), "flow", shape=shape)
    if prediction not in TARGETS:
        known = ", ".join(TARGETS)
        raise ValueError(f"{name} has prediction_type {prediction!r}: known are {known}")
    if getattr(scheduler, "betas", None) is None:
        raise ValueError(f"{name} has no table of betas, and is neither flow matching nor EDM")
    schedule = Betas(tuple(scheduler.betas.double().tolist()))
    return DiffusersModel(net, schedule, TARGETS[prediction], shape=shape)


def _arguments(condition: Condition | Tensor | Mapping[str, Any] | None, like: Tensor) -> dict[str, Any]:
    """The condition as keyword arguments of the network; tensors go to its device and dtype."""
    if condition is None:
        return {}
    if isinstance(condition, Condition):
        mask = condition.mask.to(like.device)
        return {"encoder_hidden_states": condition.tokens.to(like), "encoder_attention_mask": mask}
    if isinstance(condition, Tensor):
        if condition.is_floating_point():
            return {"encoder_hidden_states": condition.to(like)}
        return {"class_labels": condition.to(like.device)}
    return dict(condition)
