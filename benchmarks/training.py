"""How fast does it train? Images a second on the CPU, beside other libraries.

Every library learns the same captioned drawings from batches of the same size, set up as its own example
sets it up, with a network of like size (the result file says how many parameters each has). Then our network
learns inside the loops and losses of the others, which tells the network from the loop. All run in turn, and
every round gives a ratio to ours.

    python -m benchmarks.training [--sizes 32 64] [--rounds 6]
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minidiff as md
from benchmarks.common import PEERS, ROUNDS, in_turn, installed, markdown, record, show, spread, under
from minidiff.critters import ATTRIBUTES
from minidiff.data import Batches
from minidiff.device import has_bf16
from minidiff.recipes import Recipe, Source, get_recipe

CPU = torch.device("cpu")
FOREVER = 10**6  # more steps than any round takes


@dataclass
class Task:
    """What all learn: critters with captions.

    Attributes:
        size: height and width in pixels.
        batch: images per step.
        images: how many are drawn.
    """

    size: int
    batch: int
    images: int = 512

    def recipe(self) -> Recipe:
        """Ours. Each contender that asks gets an untrained network of its own."""
        return get_recipe("critters", size=self.size, images=self.images)

    @cached_property
    def source(self) -> Source:
        """The drawings and captions, made once for all contenders."""
        return self.recipe().source

    def batches(self) -> Batches:
        """Images (B, 3, H, W) in [-1, 1] and their captions, without end."""
        return Batches(self.source.images, self.source.caption, self.batch)

    def encoded(self) -> Iterator[tuple[Tensor, md.Condition]]:
        """The same, with captions as states of the recipe's text encoder, which is frozen. They are made
        anew for each batch, as a caption is."""
        text = md.CLIP.from_pretrained("critters-clip").text_encoder()
        for x0, captions in self.batches():
            with torch.no_grad():
                condition = text(text.ids(captions))
            yield x0, condition

    @property
    def width(self) -> int:
        """Width of these states."""
        return md.CLIP.from_pretrained("critters-clip").text_encoder().dim


@dataclass
class Running:
    """A training run that waits for its next step.

    Attributes:
        net: the network.
        steps: takes a step and gives its loss.
        losses: of the steps so far.
    """

    net: nn.Module
    steps: Iterator[float]
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Take the next."""
        self.losses.append(next(self.steps))


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        name: in the table.
        library: whose loop it is; a name of :data:`PEERS`, or "minidiff".
        ours: whether our network is in it.
        text: how the text enters.
        start: sets it up.
    """

    name: str
    library: str
    ours: bool
    text: str
    start: Callable[[Task], Running]


# --- ours ---------------------------------------------------------------------------------------


def minidiff_run(task: Task, precision: Any = "auto") -> Running:
    """The recipe as ``minidiff train critters`` runs it, with this task's batch size, and with AdamW: the
    others take that, or Adam, too."""
    recipe = task.recipe()
    steps = md.train(
        recipe.model, task.batches(), FOREVER,
        lr=1e-3, optimizer="adamw", weighting=recipe.weighting, precision=precision,
    )  # fmt: skip
    return Running(recipe.model.net, (step.loss for step in steps))


class OurNetwork(nn.Module):
    """Our network for the loops of others, in the precision that ours runs in. How they call it says a
    subclass for each.

    Args:
        task: what it learns.
    """

    def __init__(self, task: Task):
        super().__init__()
        self.net = task.recipe().model.net
        self.bf16 = has_bf16(CPU)

    @staticmethod
    def time(ratio: Tensor) -> Tensor:
        """The time (B,) in [0, 1] at which our schedule has this sigma/alpha (B,)."""
        return ratio.atan() * (2 / torch.pi)

    def at(self, x: Tensor, t: Tensor, condition: md.Condition) -> Tensor:
        """The output for noisy images (B, 3, H, W) at times (B,) in [0, 1], float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out: Tensor = self.net(x, t, condition)
        return out.float()


# --- diffusers ----------------------------------------------------------------------------------


def diffusers_unet(task: Task, patch: int = 1) -> nn.Module:
    """A ``UNet2DConditionModel`` of about our size. It halves the picture down to 8 pixels, and attends to
    itself and to the text at 16 and 8, as is usual; or it works on patches, at 16 pixels, as ours does."""
    from diffusers import UNet2DConditionModel

    plain = ("DownBlock2D", "UpBlock2D")
    attend = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    channels: tuple[int, ...]
    if patch > 1:
        channels, blocks = (64, 64, 96), [plain, attend, attend]
    elif task.size <= 32:
        channels, blocks = (32, 64, 128), [plain, attend, attend]
    else:
        channels, blocks = (32, 64, 64, 128), [plain, plain, attend, attend]
    net: nn.Module = UNet2DConditionModel(
        sample_size=task.size // patch, in_channels=3 * patch**2, out_channels=3 * patch**2,
        layers_per_block=1, block_out_channels=channels, cross_attention_dim=task.width,
        down_block_types=tuple(down for down, _ in blocks),
        up_block_types=tuple(up for _, up in reversed(blocks)),
    )  # fmt: skip
    return net


def diffusers_loop(
    task: Task, net: nn.Module, call: Callable[[Tensor, Tensor, md.Condition], Tensor], bf16: bool
) -> Iterator[float]:
    """A step as in their example ``train_text_to_image.py``, whose averaged weights are an option, off."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=1e-2)
    net.train()
    for x0, condition in task.encoded():
        eps = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),))
        x_t = scheduler.add_noise(x0, eps, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = call(x_t, t, condition)
        loss = F.mse_loss(out.float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def diffusers_run(task: Task, bf16: bool = False, patch: int = 1) -> Running:
    """Theirs, in float32 or under autocast."""
    net: Any = diffusers_unet(task, patch)

    def call(x: Tensor, t: Tensor, condition: md.Condition) -> Tensor:
        text = {"encoder_hidden_states": condition.tokens, "encoder_attention_mask": condition.mask}
        out = net(F.pixel_unshuffle(x, patch), t, **text).sample
        return F.pixel_shuffle(out, patch)

    return Running(net, diffusers_loop(task, net, call, bf16))


def ours_in_diffusers(task: Task) -> Running:
    """Our network in their loop."""
    net = OurNetwork(task)
    return Running(net, diffusers_loop(task, net, lambda x, t, c: net.at(x, (t + 1) / 1000, c), bf16=False))


# --- denoising-diffusion-pytorch ----------------------------------------------------------------


def ddp_loop(task: Task, net: nn.Module, batches: Iterator[tuple[Tensor, Any]]) -> Iterator[float]:
    """A step as in their ``Trainer``, which itself knows no conditions; images in [0, 1]."""
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion
    from ema_pytorch import EMA

    diffusion: Any = GaussianDiffusion(net, image_size=task.size)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10)
    diffusion.train()
    for x0, condition in batches:
        loss = diffusion((x0 + 1) / 2, classes=condition)
        loss.backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        yield loss.item()


def ddp_run(task: Task) -> Running:
    """Their U-Net with classes: none of theirs for pictures reads text. The class is the animal."""
    from denoising_diffusion_pytorch.classifier_free_guidance import Unet

    animals = ATTRIBUTES["animal"]

    def label(caption: str) -> int:
        said = [number for number, animal in enumerate(animals) if animal in caption.split()]
        return said[0] if said else len(animals)

    labelled = ((x0, torch.tensor([label(text) for text in captions])) for x0, captions in task.batches())
    net = Unet(dim=32, dim_mults=(1, 2, 2, 4), num_classes=len(animals) + 1, cond_drop_prob=0.1)
    return Running(net, ddp_loop(task, net, labelled))


def ours_in_ddp(task: Task) -> Running:
    """Our network in their loop; their GaussianDiffusion hands conditions through as they are."""

    class Ours(OurNetwork):
        channels = out_dim = 3
        random_or_learned_sinusoidal_cond = False

        def forward(self, x: Tensor, t: Tensor, classes: Any) -> Tensor:
            return self.at(x, (t + 1) / 1000, classes)

    net = Ours(task)
    return Running(net, ddp_loop(task, net, task.encoded()))


# --- smalldiffusion -----------------------------------------------------------------------------


def smalldiffusion_loop(net: nn.Module, batches: Iterator[tuple[Tensor, Any]]) -> Iterator[float]:
    """Their own ``training_loop``."""
    from accelerate import Accelerator
    from smalldiffusion import ScheduleDDPM, training_loop

    accelerator = Accelerator(cpu=True)
    loop = training_loop(batches, net, ScheduleDDPM(), accelerator, epochs=1, conditional=True)
    return (step.loss.item() for step in loop)


def smalldiffusion_run(task: Task) -> Running:
    """Their U-Net. Its embedding of conditions may be any module: here a linear map of the pooled text."""
    from smalldiffusion import Scaled, Unet

    kind: Any = Scaled(Unet)
    channels = 32
    text = nn.Linear(task.width, 4 * channels)
    net: nn.Module = kind(task.size, 3, 3, ch=channels, ch_mult=(1, 2, 4), cond_embed=text)
    pooled = ((x0, condition.pooled) for x0, condition in task.encoded())
    return Running(net, smalldiffusion_loop(net, pooled))


def ours_in_smalldiffusion(task: Task) -> Running:
    """Our network in their loop: x0 + sigma·eps comes in, scaled by them, and eps goes out."""
    from smalldiffusion import ModelMixin, Scaled

    class Ours(OurNetwork, ModelMixin):
        def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return self.at(x, self.time(sigma.flatten()), cond)

    kind: Any = Scaled(Ours)
    net: nn.Module = kind(task)
    return Running(net, smalldiffusion_loop(net, task.encoded()))


# --- azula --------------------------------------------------------------------------------------


def azula_loop(backbone: nn.Module, batches: Iterator[tuple[Tensor, Any]]) -> Iterator[float]:
    """The loop of their README."""
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule

    denoiser: Any = KarrasDenoiser(backbone=backbone, schedule=VPSchedule())
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    denoiser.train()
    for x0, condition in batches:
        loss = denoiser.loss(x0, torch.rand(len(x0)), condition=condition)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


class AzulaBackbone(nn.Module):
    """Their U-Net, which leaves to the user how time and text become one vector.

    Args:
        width: of the pooled text.
    """

    def __init__(self, width: int):
        super().__init__()
        from azula.nn.layers import SineEncoding
        from azula.nn.unet import UNet

        self.time = nn.Sequential(SineEncoding(128), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128))
        self.text = nn.Linear(width, 128)
        self.unet = UNet(
            3, 3, hid_channels=(32, 64, 128), hid_blocks=(2, 2, 3), norm="group", mod_features=128
        )

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """As their denoiser calls it: images (B, 3, H, W), log sigma/alpha (B,), pooled text (B, D)."""
        out: Tensor = self.unet(x, self.time(t) + self.text(condition))
        return out


def azula_run(task: Task) -> Running:
    """Their U-Net; the pooled text enters as the time does."""
    net = AzulaBackbone(task.width)
    return Running(net, azula_loop(net, ((x0, condition.pooled) for x0, condition in task.encoded())))


def ours_in_azula(task: Task) -> Running:
    """Our network in their loop."""

    class Ours(OurNetwork):
        def forward(self, x: Tensor, log_ratio: Tensor, condition: Any) -> Tensor:
            return self.at(x, self.time(log_ratio.exp()), condition)

    net = Ours(task)
    return Running(net, azula_loop(net, task.encoded()))


# --- all of them --------------------------------------------------------------------------------

TOKENS, POOLED, CLASSES = "tokens", "pooled", "class only"


def contenders(bf16: bool) -> list[Contender]:
    """All, ours first.

    Args:
        bf16: whether the processor computes in bfloat16, so that float32 is not the only choice.
    """
    also = [
        Contender("minidiff, float32", "minidiff", True, "tokens, pooled", lambda t: minidiff_run(t, "fp32")),
        Contender("diffusers, bfloat16", "diffusers", False, TOKENS, lambda t: diffusers_run(t, True)),
    ]
    return [
        Contender("minidiff", "minidiff", True, "tokens, pooled", minidiff_run),
        *(also if bf16 else []),
        Contender("diffusers", "diffusers", False, TOKENS, diffusers_run),
        Contender(
            "diffusers, on patches", "diffusers", False, TOKENS,
            lambda t: diffusers_run(t, bf16, patch=t.size // 16),
        ),
        Contender(
            "denoising-diffusion-pytorch", "denoising-diffusion-pytorch", False, CLASSES, ddp_run
        ),
        Contender("smalldiffusion", "smalldiffusion", False, POOLED, smalldiffusion_run),
        Contender("azula", "azula", False, POOLED, azula_run),
        *(
            Contender(f"our network, loop of {library}", library, True, "tokens, pooled", start)
            for library, start in zip(
                PEERS, (ours_in_diffusers, ours_in_ddp, ours_in_smalldiffusion, ours_in_azula), strict=True
            )
        ),
    ]  # fmt: skip


def watch(net: nn.Module) -> list[str]:
    """A list, into which goes the dtype that the first convolution of a network next answers in."""
    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    seen: list[str] = []

    def look(module: nn.Module, given: Any, out: Tensor) -> None:
        seen.append(str(out.dtype).removeprefix("torch."))
        handle.remove()

    handle = first.register_forward_hook(look)
    return seen


def measure(task: Task, chosen: Sequence[Contender], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """The rows of one size; the first contender is what the others are compared with."""
    running: dict[str, Running] = {}
    dtypes: dict[str, list[str]] = {}
    for contender in chosen:
        torch.manual_seed(0)
        one = running[contender.name] = contender.start(task)
        dtypes[contender.name] = watch(one.net)
    took = in_turn({name: one.step for name, one in running.items()}, rounds, seconds)
    ours = took[chosen[0].name]
    rows = []
    for contender in chosen:
        one, seconds_per_step = running[contender.name], took[contender.name]
        few = max(len(one.losses) // 4, 1)
        first, last = (statistics.fmean(part) for part in (one.losses[:few], one.losses[-few:]))
        rows.append(
            {
                "size": task.size,
                "name": contender.name,
                "library": contender.library,
                "our_network": contender.ours,
                "text": contender.text,
                "parameters": sum(p.numel() for p in one.net.parameters() if p.requires_grad),
                "computes_in": dtypes[contender.name][0],
                "images_per_s": spread([task.batch / value for value in seconds_per_step]),
                "ours_is_faster": spread([a / b for a, b in zip(seconds_per_step, ours, strict=True)]),
                "steps": len(one.losses),
                "loss": {"first": round(first, 4), "last": round(last, 4)},
            }
        )
    return rows


def run(
    *,
    sizes: Sequence[int] = (32, 64),
    batch: int = 16,
    rounds: int = ROUNDS,
    seconds: float = 1.0,
    images: int = 512,
) -> dict[str, Any]:
    """Measure.

    Args:
        sizes: heights and widths in pixels.
        batch: images per step, the same for all.
        rounds: turns of each contender.
        seconds: a turn ends with the first step after so long.
        images: how many drawings they learn from.

    Returns:
        ``settings``; ``rows``, for each size and contender its images per second, how many times as fast ours
        was in the same round, parameters, the dtype it computed in, and the mean loss of the first and of the
        last quarter of its steps; ``skipped``, what was left out and why.

    Raises:
        ValueError: there is an accelerator: these are figures of the CPU.
    """
    if torch.accelerator.is_available():
        raise ValueError("an accelerator is here: hide it (CUDA_VISIBLE_DEVICES=) to measure the CPU")
    bf16 = has_bf16(CPU)
    everyone = contenders(bf16)
    here = [c for c in everyone if c.library not in PEERS or installed(c.library)]
    skipped = [f"{library} is not installed" for library in PEERS if not installed(library)]
    if not bf16:
        skipped.append("bfloat16: this processor does not compute in it")
    rows = []
    for size in sizes:
        rows += measure(Task(size, batch, images), here, rounds, seconds)
    settings = {"batch": batch, "rounds": rounds, "seconds": seconds, "images": images}
    return {"settings": settings, "rows": rows, "skipped": skipped}


def table(result: Mapping[str, Any]) -> str:
    """A table for each size."""
    header = ["set-up", "text", "parameters", "computes in", "images per second", "minidiff is × as fast"]
    text = ""
    for size in dict.fromkeys(row["size"] for row in result["rows"]):
        rows = [
            [
                row["name"], row["text"], f"{row['parameters'] / 1e6:.1f} M", row["computes_in"],
                show(row["images_per_s"]), show(row["ours_is_faster"]),
            ]
            for row in result["rows"] if row["size"] == size
        ]  # fmt: skip
        text += f"{size}×{size} pixels:\n\n" + markdown(header, rows) + "\n"
    settings = result["settings"]
    left_out = "".join(f"Left out: {line}. " for line in result["skipped"])
    return f"{text}Batch {settings['batch']}, rounds: {settings['rounds']}. {left_out}{under(result)}"


def main() -> None:
    """Run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(record("training", run, **vars(parser.parse_args())))


if __name__ == "__main__":
    main()
