"""What the studies share: a small set-up that trains in minutes, averages over runs, result files.

A study is a script that answers one question of the book with numbers. It writes one JSON file into
``notebooks/results``, and the chapter quotes that file: nothing is retyped.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import minidiff as md
from minidiff.critters import Critters
from minidiff.data import Batches
from minidiff.denoiser import Conditioning
from minidiff.files import write_whole
from minidiff.text import Alignment

RESULTS = Path(__file__).parents[1] / "notebooks" / "results"
SIZE, PATCH, BATCH = 32, 4, 64  # a quarter of the recipe's patches, half of its batch


def small_model(
    text: md.TextEncoder, network: str = "UNet", conditioning: Conditioning = "both", size: int = SIZE
) -> md.Diffusion:
    """The recipe's model for smaller pictures; result files say how many parameters each network has."""
    if network == "UNet":
        net: torch.nn.Module = md.UNet(patch=PATCH, condition_dim=text.dim, conditioning=conditioning)
    else:
        net = md.DiT(width=192, depth=6, patch=PATCH, condition_dim=text.dim, conditioning=conditioning)
    return md.Diffusion(net, md.Cosine(), target="x0", encoder=text, shape=(3, size, size))


@functools.cache
def pictures(n: int, size: int, seed: int) -> torch.Tensor:
    """(n, 3, size, size) uint8, drawn once however many models learn from them."""
    return Critters(n, size, seed=seed).images()


def fit(
    model: md.Diffusion,
    steps: int,
    seed: int,
    *,
    images: int = 20_000,
    fixed_captions: bool = False,
    alignment: Alignment | None = None,
) -> tuple[md.Diffusion, float]:
    """Train with the recipe's weighting and return the averaged model and the seconds it took."""
    assert model.shape is not None
    data = Critters(images, model.shape[-1], seed=seed)
    captions = data.captions() if fixed_captions else data.caption
    batches = Batches(pictures(images, model.shape[-1], seed), captions, BATCH, seed=seed)
    began = time.perf_counter()
    for step in md.train(model, batches, steps, weighting="snr_plus_one", seed=seed, alignment=alignment):
        if step.index % 100 == 99:
            print(f"  step {step.index + 1}, loss {step.loss:.3f}", file=sys.stderr, flush=True)
    return step.ema, time.perf_counter() - began


def over_runs(values: Sequence[float]) -> dict[str, Any]:
    """Mean of independent runs with its 95 % interval (Student's t), and the runs themselves."""
    mean = statistics.fmean(values)
    half = 0.0
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "runs": list(values)}


def each_over_runs(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """:func:`over_runs` of every number that the runs measured."""
    return {what: over_runs([run[what] for run in runs]) for what in runs[0]}


def options(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of the study, line by line."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)


def so_far(name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of ``NAME.json`` if measured with these settings: a study that was stopped goes on."""
    file = RESULTS / f"{name}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    return list(earlier["rows"]) if earlier.get("settings") == settings else []


def write(name: str, **content: Any) -> None:
    """Write ``notebooks/results/NAME.json``, whole or not at all."""
    # Where things lie on this machine is nobody else's business.
    said = [f"PATH/TO/{Path(a).name}" if Path(a).is_absolute() else a for a in sys.argv[1:]]
    made_by = {
        "command": " ".join(["python", f"studies/{Path(sys.argv[0]).name}", *said]),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    with write_whole(RESULTS / f"{name}.json") as unfinished:
        unfinished.write_text(json.dumps({"made_by": made_by, **content}, indent=1) + "\n")
    print(RESULTS / f"{name}.json")
