"""The way out to the ``diffusers`` library, and back.

:func:`to_diffusers` writes a schedule of ours as a scheduler of theirs. :func:`from_diffusers` makes a
denoiser of one of their networks and the scheduler it was trained with, so that every sampler, guidance
and test of this library runs on models people already have::

    unet = UNet2DModel.from_pretrained(...)
    model = from_diffusers(unet, DDPMScheduler.from_pretrained(...))
    x = noise((4, 3, 32, 32), model.schedule(1.0))
    x0 = sample(dpmpp_2m(model.denoise, x, model.schedule.levels(20)))

Three families of schedulers cover what is in use: chains of betas (DDPM and all that carry its table,
whatever sampler they stand for), flow matching, and EDM. Their timestep i of a chain is our time
(i + 1)/T: they count the first noisy level as 0, we count clean data as 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.denoiser import Condition
from minidiff.forward import SIGMA_DATA, NoiseLevel, Prediction, Target, broadcast, from_target
from minidiff.schedule import Betas, Chain, Flow, Karras, Linear, Schedule, Shifted

PREDICTION_TYPES: dict[str, Target] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


def to_diffusers(schedule: Schedule, target: str = "eps", steps: int = 1000) -> Any:
    """A ``diffusers`` scheduler with the noise levels of ``schedule``.

    ``Flow`` (also shifted) becomes a ``FlowMatchEulerDiscreteScheduler``, ``Karras`` an
    ``EDMEulerScheduler``; every other schedule a ``DDPMScheduler`` with a table of betas, from which
    ``DDIMScheduler.from_config(scheduler.config)`` and the like make other samplers. Its last beta is at
    most 0.999, so a schedule that ends in pure noise comes close to it only.

    Args:
        schedule: any schedule of this library.
        target: what the network predicts, for chains: "eps", "x0" or "v".
        steps: length of the table, for schedules that are no chain themselves.

    Raises:
        ImportError: ``diffusers`` is not installed.
        ValueError: diffusers has no name for the target, or it does not go with the schedule.
    """
    import diffusers

    base: Any = schedule
    shift = 1.0
    while isinstance(base, Shifted):
        base, shift = base.base, shift * base.shift
    if isinstance(base, Flow):
        if target not in ("eps", "flow"):  # "eps" is the default of the argument
            raise ValueError(f"target {target!r}: a flow scheduler means velocities, 'flow'")
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps, shift=shift)
    if isinstance(schedule, Karras):
        if target not in ("eps", "edm"):
            raise ValueError(f"target {target!r}: an EDM scheduler means EDM's mixture, 'edm'")
        return diffusers.EDMEulerScheduler(
            sigma_min=schedule.sigma_min, sigma_max=schedule.sigma_max, rho=schedule.rho,
            sigma_data=SIGMA_DATA, num_train_timesteps=steps,
        )  # fmt: skip
    names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items() if ours != "flow"}
    if target not in names:
        raise ValueError(f"target {target!r}: their chains know {', '.join(names)}")
    middle = schedule(0.5)
    if abs(middle.alpha**2 + middle.sigma**2 - 1) > 1e-6:
        raise ValueError(f"{schedule} has no betas: alpha² + sigma² is not 1")
    chain = {"num_train_timesteps": steps, "prediction_type": names[target], "clip_sample": False}
    if isinstance(schedule, Linear) and not schedule.zero_terminal_snr:
        chain |= {"num_train_timesteps": schedule.steps, "beta_schedule": "linear"}
        chain |= {"beta_start": schedule.beta_min, "beta_end": schedule.beta_max}
        return diffusers.DDPMScheduler(**chain)
    steps = len(schedule.betas) if isinstance(schedule, Chain) else steps
    alpha_bar = schedule(torch.arange(steps + 1, dtype=torch.float64) / steps).alpha ** 2
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    chain |= {"num_train_timesteps": steps, "trained_betas": betas.clamp(max=0.999).tolist()}
    return diffusers.DDPMScheduler(**chain)


class DiffusersModel:
    """A network of ``diffusers`` as a denoiser; made by :func:`from_diffusers`.

    Attributes:
        net: the network.
        schedule: the noise levels it was trained on; its levels are the ones to sample along.
        target: what its output means.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, target: Target):
        self.net, self.schedule, self.target = net, schedule, target

    def denoise(
        self,
        x_t: Tensor,
        level: NoiseLevel,
        condition: Condition | Tensor | Mapping[str, Any] | None = None,
    ) -> Prediction:
        """The clean sample and the noise that the network sees in ``x_t``.

        Args:
            x_t: (B, ...) noisy samples, for latent models latents.
            level: of this model's schedule, shape () or (B,).
            condition: a mapping is handed to the network as keyword arguments, as it is. A tensor
                (B, T, D) or a :class:`~minidiff.denoiser.Condition`, with its mask, becomes
                ``encoder_hidden_states``; a tensor (B,) of integers ``class_labels``. One, (1, ...),
                serves all samples. None passes nothing.

        Returns:
            Prediction shaped and typed like ``x_t``.
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
        return from_target(out.to(x_t), x_t, level, self.target)


def from_diffusers(net: nn.Module, scheduler: Any) -> DiffusersModel:
    """A denoiser made of a ``diffusers`` network and the scheduler it was trained with.

    The network may be a ``UNet2DModel``, a ``UNet2DConditionModel``, a ``DiTTransformer2DModel``, or any
    other that is called ``net(x, timestep=..., **condition)``. It is put into eval mode.

    Args:
        net: the network.
        scheduler: any of their schedulers with a table of betas, flow sigmas, or EDM's range.

    Raises:
        ValueError: the scheduler is of another kind or shifts by image size, or its prediction type is
            unknown.
    """
    config = scheduler.config
    name, prediction = type(scheduler).__name__, config.get("prediction_type", "epsilon")
    net.eval()
    if name.startswith("EDM"):
        if prediction != "epsilon" or abs(config.sigma_data - SIGMA_DATA) > 1e-9:
            raise ValueError(
                f"{name} with prediction_type {prediction!r} and sigma_data {config.sigma_data:g}: only "
                f"'epsilon' and {SIGMA_DATA:g} are known here"
            )
        return DiffusersModel(net, Karras(config.sigma_min, config.sigma_max, config.rho), "edm")
    if name.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name} shifts by image size (use_dynamic_shifting): work out the shift of your size and "
                "give DiffusersModel(net, Shifted(Flow(), shift), 'flow')"
            )
        shift = float(config.get("shift") or 1.0)
        return DiffusersModel(net, Flow() if shift == 1 else Shifted(Flow(), shift), "flow")
    if prediction not in PREDICTION_TYPES:
        known = ", ".join(PREDICTION_TYPES)
        raise ValueError(f"{name} has prediction_type {prediction!r}: known are {known}")
    if getattr(scheduler, "betas", None) is None:
        raise ValueError(f"{name} has no table of betas, and is neither flow matching nor EDM")
    schedule = Betas(tuple(scheduler.betas.double().tolist()))
    return DiffusersModel(net, schedule, PREDICTION_TYPES[prediction])


def _arguments(
    condition: Condition | Tensor | Mapping[str, Any] | None, like: Tensor
) -> dict[str, Any]:
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
