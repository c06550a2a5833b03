"""A diffusion model: a network, and what its inputs and outputs mean (chapter 3)."""

import json
import math
import reprlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minidiff.checks import whole
from minidiff.condition import Condition, Encoder, LabelEncoder
from minidiff.denoiser.dit import DiT
from minidiff.denoiser.mlp import MLP
from minidiff.denoiser.unet import UNet
from minidiff.denoiser.waves import WaveUNet
from minidiff.device import pick_device
from minidiff.files import (
    Shapes,
    StrPath,
    at_most,
    difference,
    fill_folder,
    first_line,
    load_weights,
    locate,
    open_weights,
    shapes_in,
    todays_name,
    weights,
)
from minidiff.forward import SIGMA_DATA, NoiseLevel, Prediction, Target, broadcast, from_target
from minidiff.schedule import Chain, Karras, Schedule, schedule_from_config

NETWORKS: dict[str, Any] = {"UNet": UNet, "DiT": DiT, "MLP": MLP, "WaveUNet": WaveUNet}
"""The networks that a saved model names; any other is given to :meth:`Diffusion.from_pretrained`."""


MOST_NUMBERS = 2**26
"""As many numbers may a sample hold, such as 4096x4096 pixels in 4 channels."""


class Denoiser(Protocol):
    """Anything that can guess what is behind a noisy sample; all that a sampler knows."""

    def __call__(self, x_t: Tensor, level: NoiseLevel, /) -> Prediction: ...


class Diffusion(nn.Module):
    """A network together with the schedule it is trained on and the target it predicts.

    Args:
        net: ``net(x, t, condition)`` -> tensor shaped like ``x``, with x (B, ...), t (B,) in [0, 1], and a
            :class:`~minidiff.condition.Condition` or None. Any module of yours will do.
        schedule: which noise levels it is trained on.
        target: what its output means: "eps", "x0", "v", "flow" or "edm".
        encoder: makes conditions of captions (:class:`minidiff.text.TextEncoder`), of labels
            (:class:`minidiff.condition.LabelEncoder`), or of what your own reads; None for a model that is
            given conditions, or none.
        shape: shape of one sample, (C, H, W), for those who draw without data at hand; None if open.

    Raises:
        ValueError: the target is unknown, the shape is none, or the encoder is no module with ``ids`` and
            ``dim``.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        target: Target = "eps",
        encoder: Encoder | None = None,
        shape: Sequence[int] | None = None,
    ):
        super().__init__()
        if target not in get_args(Target):
            raise ValueError(f"unknown target {target!r}: choose one of {', '.join(get_args(Target))}")
        if not (encoder is None or (isinstance(encoder, nn.Module) and hasattr(encoder, "ids"))):
            raise ValueError(
                f"encoder = {type(encoder).__name__}: give a torch module with ids(values), forward(ids) "
                "and dim"
            )
        self.net, self.schedule, self.target, self.encoder = net, schedule, target, encoder
        self.shape = None if shape is None else tuple(whole("shape: a side", side) for side in shape)
        if math.prod(self.shape or ()) > MOST_NUMBERS:
            raise ValueError(f"shape = {self.shape}: a sample may hold {MOST_NUMBERS:,} numbers at most")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def ids(self, values: Any) -> Any:
        """The door: captions, labels, or what else the encoder reads, as whole numbers (B, ...) on the CPU.

        None, conditions, and for a model without an encoder tensors, pass as they are.

        Raises:
            ValueError: there is no encoder to read the values, or it cannot read them.
        """
        if values is None or isinstance(values, Condition):
            return values
        if self.encoder is not None:
            return self.encoder.ids(values)
        if isinstance(values, Tensor):
            return values
        raise ValueError(
            f"this model has no encoder, so it cannot follow {reprlib.repr(values)}: give "
            "Diffusion(..., encoder=TextEncoder or LabelEncoder), or batches without conditions"
        )

    def encode(self, values: Any) -> Any:
        """The conditions that captions, labels or their numbers stand for, one each.

        Args:
            values: what the encoder reads, or numbers from :meth:`ids`. None and conditions pass as they
                are, and so do, in a model without an encoder, tensors.

        Returns:
            A :class:`~minidiff.condition.Condition` for what an encoder has read.

        Raises:
            ValueError: there is no encoder to read the values, or it cannot read them.
        """
        numbers = values if isinstance(values, Tensor) else self.ids(values)
        if self.encoder is None or not isinstance(numbers, Tensor):
            return numbers
        return self.encoder(numbers)

    def forward(self, x_t: Tensor, level: NoiseLevel, condition: Condition | Tensor | None = None) -> Tensor:
        """The network's raw output, for training.

        The input is brought to unit variance, c_in of Karras et al. 2022, eq. 7. Data are taken to have
        variance 1, for target "edm" that paper's 0.25; a schedule with alpha² + sigma² = 1 and another
        target then changes nothing.

        Args:
            x_t: noisy samples, (B, ...).
            level: their levels, () or (B,).
            condition: what each sample shows, from :meth:`encode`; one serves all samples. A network of your
                own may take a tensor instead.

        Returns:
            Tensor shaped like ``x_t``, in the dtype that the network computes in.

        Raises:
            ValueError: the condition is not encoded, or there are neither one nor as many as samples.
        """
        like = next(self.net.parameters())
        if isinstance(condition, Condition):
            condition = condition.to(like).expand(len(x_t))
        elif isinstance(condition, str | list | tuple):
            raise ValueError(
                f"condition = {reprlib.repr(condition)} is not encoded: give model.encode(...) of it"
            )
        data_std = SIGMA_DATA if self.target == "edm" else 1.0
        scale = (level.alpha**2 * data_std**2 + level.sigma**2).rsqrt()
        x = (broadcast(scale, x_t) * x_t).to(like)  # its dtype and device
        t = level.t.to(x.device, torch.float32).expand(len(x))  # () or (B,) -> (B,)
        return self.net(x, t, condition)

    def denoise(
        self, x_t: Tensor, level: NoiseLevel, condition: Condition | Tensor | None = None
    ) -> Prediction:
        """The clean sample and the noise the network sees in ``x_t``.

        Args:
            x_t: noisy samples, (B, ...), any floating dtype, on any device.
            level: their level, () or (B,).
            condition: what each sample should show, from :meth:`encode`, or None.

        Returns:
            Prediction with tensors of the shape and dtype of ``x_t``, where ``x_t`` is.
        """
        out = self(x_t, level, condition)
        return from_target(out.to(x_t), x_t, level, self.target)

    def save_pretrained(self, folder: StrPath, dtype: torch.dtype | None = None) -> None:
        """Write config.json, model.safetensors and, with a text encoder, its tokenizer.

        A new folder holds a whole model or none. In an old one the files are replaced one by one, each
        whole; files of other names stay. Of a network or an encoder that is not one of this library's the
        folder holds the weights and the name; :meth:`from_pretrained` must then be given one.

        Args:
            folder: where to; made if missing.
            dtype: store weights so (torch.float16 halves the size); None as they are.
        """
        encoder: Any = self.encoder
        config = {
            "format": "minidiff-2",
            "model": type(self).__name__,
            "net": _describe(self.net),
            "schedule": self.schedule.config(),
            "target": self.target,
            "shape": self.shape,
            "encoder": None if encoder is None else _describe(encoder),
        }
        # Copies: T5 has its embedding table under two names, and safetensors refuses shared memory.
        state = {k: v.to(dtype, copy=True).contiguous() for k, v in weights(self).items()}
        with fill_folder(folder) as scratch:
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            # Not save_file: its files can be read by their owner alone.
            (scratch / "model.safetensors").write_bytes(save(state, {"format": "pt"}))
            if hasattr(encoder, "save_tokenizer"):
                encoder.save_tokenizer(scratch)

    @classmethod
    def from_pretrained(
        cls,
        name: StrPath,
        device: torch.device | str | None = None,
        *,
        net: nn.Module | None = None,
        encoder: Encoder | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "Diffusion":
        """A saved model, ready to sample: in eval mode, weights in float32.

        Args:
            name: a model shipped with minidiff ("critters"), a folder, or a Hugging Face hub id.
            device: where to put it; None for the CPU.
            net: a network of your own to load the weights into, for models saved with one.
            encoder: the same for an encoder of your own.
            revision: of a hub id: branch, tag or commit.
            token: for private repositories on the hub; None for the one you are logged in with.

        Raises:
            FileNotFoundError: no such model, or the folder holds none.
            ValueError: the folder's config.json is not one of this library's, the model has a network or an
                encoder of another library and none is given, the weights cannot be read, do not fit or are
                not all finite, or there is no such device. Nothing that a folder holds is run, and nothing
                is built before the shapes in its weights' header were compared.
        """
        to = pick_device(device)
        folder = locate(name, revision=revision, token=token)
        file, other = folder / "config.json", f"{folder} holds other weights than this network has"
        with open_weights(folder / "model.safetensors") as handle:
            shapes = {todays_name(key): shape for key, shape in shapes_in(handle).items()}
            try:
                config = read_config(file)
                if (kind := config.get("model", "Diffusion")) != cls.__name__:
                    raise ValueError(f"{folder} holds a {kind}: load it with {kind}.from_pretrained")
                with at_most(2 * len(shapes) + 64), torch.device("meta"):  # shapes without memory
                    draft = _parts(config, file, net, encoder)
                for part, given in zip(("net", "encoder"), (net, encoder), strict=True):
                    if given is None and (wrong := _misfit(part, draft[part], shapes)):
                        raise ValueError(f"{other}: {wrong}")
                parts = _parts(config, file, net, encoder)
                schedule = schedule_from_config(config["schedule"])
                model = cls(parts["net"], schedule, config["target"], parts["encoder"], config["shape"])
            except Exception as error:  # what a stranger's numbers can raise has no end
                reason = first_line(error)
                known = isinstance(error, ValueError) and reason.startswith(str(folder))
                raise ValueError(reason if known else f"{file} is not a minidiff model: {reason}") from error
            state = {key: _float32(handle.get_tensor(key)) for key in handle.keys()}  # noqa: SIM118
        for key, value in state.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(
                    f"{folder} holds weights that are no numbers (NaN or infinity), first in {key}: take an "
                    "earlier save"
                )
        try:
            load_weights(model, state)
        except ValueError as error:
            raise ValueError(f"{other}: {error}") from error
        return model.float().to(to).eval().requires_grad_(False)

    def to_diffusers(self, steps: int = 1000, condition: Condition | None = None) -> tuple[nn.Module, Any]:
        """Network and scheduler for a pipeline of the ``diffusers`` library::

            pipe = diffusers.DDPMPipeline(*model.to_diffusers())

        The scheduler knows what the network predicts. It is the one that
        :meth:`Schedule.to_diffusers <minidiff.schedule.Schedule.to_diffusers>` makes.

        Args:
            steps: length of the scheduler's table, for schedules that are no chain themselves.
            condition: what to draw, one for all or one per image; None for anything.

        Returns:
            (unet, scheduler). The network shares its weights with this model.

        Raises:
            ImportError: ``diffusers`` is not installed.
            ValueError: ``shape`` is None, or diffusers has no scheduler for this schedule and target.
        """
        steps = len(self.schedule.betas) if isinstance(self.schedule, Chain) else steps
        scheduler = self.schedule.to_diffusers(self.target, steps)
        return _AsUNet(self, steps, condition), scheduler

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a minidiff model",
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face hub.

        Args:
            repo_id: "name/model"; made if missing.
            private: whether a new repository is.
            token: None for the one you are logged in with.
            revision: branch to push to; None for main.
            commit_message: what the commit says.

        Returns:
            Where the commit can be looked at.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the hub refused.
        """
        # Its PyTorchModelHubMixin would load the hub's client with this library, and can tell neither a
        # schedule nor a tokenizer from an argument.
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit)


class _AsUNet(nn.Module):
    """A model, called as the pipelines of ``diffusers`` call a ``UNet2DModel``: with their timesteps, and
    with the input scaled as their schedulers do."""

    def __init__(self, model: Diffusion, steps: int, condition: Condition | None):
        super().__init__()
        if model.shape is None:
            raise ValueError("the model does not say the shape of its images: set model.shape = (C, H, W)")
        self.model, self.steps, self.condition = model, steps, condition
        self.config = SimpleNamespace(in_channels=model.shape[0], sample_size=model.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def forward(self, sample: Tensor, timestep: Tensor | float, **ignored: Any) -> SimpleNamespace:
        schedule, time = self.model.schedule, torch.as_tensor(timestep, dtype=torch.float64).cpu()
        if isinstance(schedule, Karras):
            level = schedule(schedule.time(-8 * time))  # their time is log(sigma) / 4
            sample = sample * (level.sigma**2 + SIGMA_DATA**2).sqrt().to(sample)  # undoes their c_in
        elif self.model.target == "flow":
            sigma = time / self.steps
            level = schedule(schedule.time(2 * (torch.log1p(-sigma) - sigma.log())))
        else:
            level = schedule((time + 1) / self.steps)
        out = self.model(sample, level, self.condition)
        return SimpleNamespace(sample=out.to(sample))


def _describe(part: Any) -> dict[str, Any]:
    """Name and arguments of a network or encoder; of one that is not this library's, the name alone.

    A compiled module goes by the name of what was compiled.
    """
    part = getattr(part, "_orig_mod", part)
    kind = type(part)
    if not kind.__module__.startswith("minidiff."):
        return {"name": f"{kind.__module__}.{kind.__qualname__}"}
    return {"name": kind.__name__, **(part.config() if callable(part.config) else part.config)}


def read_config(file: Path) -> dict[str, Any]:
    """What a model's config.json says, in today's format.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or not one of this library's.
    """
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = isinstance(config, dict) and config["format"] in ("minidiff-1", "minidiff-2")
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is not a minidiff model: {first_line(error)}") from error
    if not known:
        raise ValueError(f"{file} is not a minidiff model, or one of a later version of minidiff")
    if config["format"] == "minidiff-1":
        config["encoder"] = config.pop("text")
        if config["encoder"] is not None:
            config["encoder"]["name"] = "TextEncoder"
    return config


def _parts(config: dict[str, Any], file: Path, net: Any, encoder: Any) -> dict[str, Any]:
    """Network and encoder: those given, else those that the file describes, untrained."""
    if net is None:
        net = network_from_config(config["net"], file)
    if encoder is None and config["encoder"] is not None:
        encoder = _encoder(config["encoder"], file)
    return {"net": net, "encoder": encoder}


def _misfit(part: str, module: nn.Module | None, shapes: Shapes) -> str | None:
    """What a part of a model needs and a file, by the shapes in it, has not; None if it has all."""
    needed = {} if module is None else {f"{part}.{k}": v.shape for k, v in weights(module).items()}
    return difference(needed, {k: v for k, v in shapes.items() if k in needed})


def network_from_config(config: dict[str, Any], file: Path) -> nn.Module:
    """The untrained network that ``config`` describes; ``file`` is where it stands, for the message.

    Raises:
        ValueError: it is a network of the caller's own, of which the file has the name only.
    """
    arguments = dict(config)
    name = arguments.pop("name")
    if name not in NETWORKS:
        short = name.split(".")[-1]
        raise ValueError(
            f"{file}: saved with a network of your own, {name}: give from_pretrained(..., net={short}(...))"
        )
    if "places" in arguments:  # as the first format had it
        arguments["positions"] = arguments.pop("places")
    return cast(nn.Module, NETWORKS[name](**arguments))


def _encoder(config: dict[str, Any], file: Path) -> Encoder:
    name = config["name"]
    if name == "TextEncoder":
        from minidiff.text import TextEncoder  # brings transformers, which only text models need

        return TextEncoder.from_config(config, file.parent)
    if name == "LabelEncoder":
        return LabelEncoder(config["num_classes"], config["dim"])
    short = name.split(".")[-1]
    raise ValueError(
        f"{file}: saved with an encoder of your own, {name}: give from_pretrained(..., encoder={short}(...))"
    )


def _float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
