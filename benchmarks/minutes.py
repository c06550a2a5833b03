"""What does a model draw after eight minutes of training on two cores? Ours, and two other libraries'.

The other libraries learn the recipe's captioned drawings for so many minutes, set up by
:mod:`benchmarks.training` as their examples set them up; the time to draw the pictures is not counted. One
caption in ten is left out, as ours are, so that guidance has something to compare with. Then the attribute
reader scores all alike: pairs of animal and hat that were seen and that were not, 20 steps of
DPM-Solver++ 2M, guidance 3. Our rows are the logs in ``benchmarks/records``: 400 steps of
``minidiff train critters``, which take about five minutes, the drawing of the pictures among them.

It takes too long for ``make bench``.

    python -m benchmarks.minutes [--minutes 8] [--prompts 128]
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import minidiff as md
from benchmarks.common import installed, markdown, record, under
from benchmarks.training import CPU, Running, Task, azula_run, diffusers_run
from minidiff.critters import evaluate
from minidiff.device import has_bf16
from minidiff.recipes import DRAWINGS

RECORDS = Path(__file__).parent / "records"
BATCH = 16  # the default of diffusers' example; azula's README names none
DROPOUT = 0.1  # the recipe's
SCORES = ("seen: animal and hat", "held-out: animal and hat", "held-out: all attributes")


@dataclass
class Dropping(Task):
    """The task with captions left out now and then."""

    def encoded(self) -> Iterator[tuple[Tensor, md.Condition]]:
        """As :meth:`Task.encoded`; what is left out is a condition that holds nothing."""
        for x0, condition in super().encoded():
            yield x0, condition.drop(torch.rand(len(x0)) < DROPOUT)


class FromDiffusers(nn.Module):
    """A ``UNet2DConditionModel``, called as our networks are.

    Args:
        net: it. Its timestep 0 is the first step of the chain, our t = 1/1000.
        bf16: whether under autocast, as it was trained.
    """

    def __init__(self, net: nn.Module, bf16: bool):
        super().__init__()
        self.net, self.bf16 = net, bf16

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition) -> Tensor:
        """The noise in x (B, 3, H, W) at t (B,) in [0, 1], float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            out = self.net(
                x, 1000 * t - 1,
                encoder_hidden_states=condition.tokens, encoder_attention_mask=condition.mask,
            )  # fmt: skip
        return torch.as_tensor(out.sample).float()


class FromAzula(nn.Module):
    """The backbone of a ``KarrasDenoiser``, called as our networks are.

    Args:
        backbone: it. It is told the noise by log sigma/alpha, which it has seen up to :attr:`most`.
        schedule: of the t that this module is called with.
    """

    most = -math.log(1e-3)
    """Their schedule ends at alpha = 0.001."""

    def __init__(self, backbone: nn.Module, schedule: md.Schedule):
        super().__init__()
        self.backbone, self.schedule = backbone, schedule

    def forward(self, x: Tensor, t: Tensor, condition: md.Condition) -> Tensor:
        """x0 (B, 3, H, W) for x of unit variance, mixed by alpha and sigma of t (B,) with squares that add
        up to 1: their c_skip·x + c_out·output is then alpha·x + sigma·output."""
        log_ratio = (-0.5 * self.schedule(t).log_snr).clamp(-self.most, self.most).to(x.dtype)
        sigma, alpha = (torch.sigmoid(sign * 2 * log_ratio).sqrt()[:, None, None, None] for sign in (1, -1))
        out: Tensor = self.backbone(x, log_ratio, condition.pooled)
        return alpha * x + sigma * out


def as_model(task: Task, library: str, net: nn.Module) -> md.Diffusion:
    """What was trained, with the encoder it was trained with, for our samplers and our scores."""
    encoder = md.CLIP.from_pretrained("critters-clip").text_encoder()
    shape = (3, task.size, task.size)
    if library == "diffusers":
        return md.Diffusion(FromDiffusers(net, has_bf16(CPU)), md.Linear(), "eps", encoder, shape).eval()
    return md.Diffusion(FromAzula(net, md.Cosine()), md.Cosine(), "x0", encoder, shape).eval()


STARTS: Mapping[str, Callable[[Task], Running]] = {
    "diffusers": lambda task: diffusers_run(task, bf16=has_bf16(CPU)),
    "azula": azula_run,
}
"""The two whose networks read text and learn fastest in :mod:`benchmarks.training`."""


def train_for(running: Running, seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Take steps until so many seconds have passed since the first began; the seconds it took."""
    began = clock()
    while (passed := clock() - began) < seconds:
        running.step()
    return passed


def run(minutes: float = 8, prompts: int = 128, size: int = 64, images: int = DRAWINGS) -> dict[str, Any]:
    """All rows: so many minutes of training on so many drawings, so many prompts for each split."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for file in sorted(RECORDS.glob("cpu-critters-muon-*.json")):
        log = json.loads(file.read_text())
        scores = {name: log["scores"][name] for name in SCORES}
        name = f"minidiff, seed {log['seed']}"
        rows.append(
            {"name": name, "seconds": log["seconds_to_train"], "images": log["images"], "scores": scores}
        )
    for library, start in STARTS.items():
        if not installed(library):
            skipped.append(f"{library} is not installed")
            continue
        torch.manual_seed(0)
        task = Dropping(size, BATCH, images)
        _ = task.source  # drawn before the clock starts
        running = start(task)
        took = train_for(running, 60 * minutes)
        running.net.eval()
        with torch.no_grad():
            found = evaluate(md.TextToImage(as_model(task, library, running.net)), prompts=prompts)
        scores = {name: found[name]._asdict() for name in SCORES}
        learned = BATCH * len(running.losses)
        rows.append({"name": library, "seconds": round(took, 1), "images": learned, "scores": scores})
        print(rows[-1], flush=True)
    return {"settings": {"minutes": minutes, "prompts": prompts}, "rows": rows, "skipped": skipped}


def table(result: Mapping[str, Any]) -> str:
    """A row for each run: how long, how many pictures, and the shares with their intervals."""
    lines = []
    for row in result["rows"]:
        minutes, seconds = divmod(round(row["seconds"]), 60)
        shares = [
            f"{100 * s['value']:.0f} % [{100 * s['low']:.0f}, {100 * s['high']:.0f}]"
            for s in (row["scores"][name] for name in SCORES)
        ]
        lines.append([row["name"], f"{minutes}:{seconds:02d}", f"{row['images']:,}", *shares])
    header = ["set-up", "to train", "images learned from", *SCORES]
    return "\n".join([markdown(header, lines), under(result)])


def main() -> None:
    """Run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--prompts", type=int, default=128)
    asked = parser.parse_args()
    print(record("minutes", run, minutes=asked.minutes, prompts=asked.prompts))


if __name__ == "__main__":
    main()
