"""What a GPU makes of minidiff, in less than ten minutes and whatever happens on the way.

    python -m benchmarks.gpu FOLDER [--limit 540]

The parts run one after the other, each in a process of its own that is stopped when its time is over, and
each leaves its numbers in FOLDER as they come; ``gpu.json`` gathers them. Nothing is fetched from anywhere.

* ``tests``: the tests that need CUDA, then all;
* ``rates``: training images a second, at batches of 128 and 512: the recipe `critters` as it is, the same
  without a CUDA graph, and a network of ``diffusers`` of like size in a plain loop;
* ``critters``: from pressing return to a trained model, and its scores;
* ``both``, ``pooled``: two critters, told by both roads or by the pooled vector alone, for as long as is
  left.

``--tiny`` runs all of it in seconds, to see that it runs; its numbers mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import minidiff as md
from benchmarks.common import spread, write_json
from minidiff import critters, training
from minidiff.critters.reader import READERS
from minidiff.data import Batches
from minidiff.device import bytes_on_device, has_bf16
from minidiff.fit import fit
from minidiff.recipes import Recipe, get_recipe
from minidiff.training import processes

ROOT = Path(__file__).parents[1]
SHARES = {"tests": 0.2, "rates": 0.17, "critters": 0.2, "both": 0.22, "pooled": 0.21}
"""The parts, and how much of the time each may take; what one leaves the others can use."""


class Part:
    """One part: its clock, its settings, and its file.

    Args:
        name: one of :data:`SHARES`.
        folder: where its file goes.
        seconds: how long it may take.
        tiny: in small, to see that it runs.
    """

    def __init__(self, name: str, folder: Path, seconds: float, tiny: bool):
        self.name, self.folder, self.tiny = name, folder, tiny
        self.seconds, self.started = seconds, time.monotonic()
        self.found: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds until it is stopped."""
        return self.seconds - (time.monotonic() - self.started)

    def keep(self, **numbers: Any) -> None:
        """Write what is known so far."""
        self.found |= numbers
        write_json(self.folder / f"{self.name}.json", self.found)


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- the parts --------------------------------------------------------------------------------------


def tests(part: Part) -> None:
    """Exit code and last line of the tests: of CUDA, then of everything."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    everything = ["tests", "-n", str(os.cpu_count() or 1), "--dist=loadfile"]
    for name, which in (("cuda", ["tests/test_cuda.py"]), ("all", everything)):
        if part.tiny and name == "all":
            continue
        done = subprocess.run(
            [*command, *which], cwd=ROOT, capture_output=True, text=True, timeout=part.left(), check=False
        )
        lines = done.stdout.strip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        part.keep(**{name: {"exit code": done.returncode, "said": lines[-1:], "failed": failed}})


def rates(part: Part) -> None:
    """Images a second in training: median, least and most of rounds in turn."""
    recipe, most = recipe_of(part, "critters", images=8192), 2 if part.tiny else 9
    device = processes().device
    images = bytes_on_device(recipe.source.images, device)
    assert isinstance(images, torch.Tensor)  # drawings are in memory
    runs: dict[tuple[str, int], Iterator[None]] = {}
    for batch in (8, 16) if part.tiny else (128, 512):

        def ours(batch: int = batch) -> Iterator[None]:
            model = recipe.build(recipe)
            batches = Batches(images, recipe.source.caption, batch)
            for _ in md.train(model, batches, 10**6, weighting=recipe.weighting):
                yield

        runs["minidiff", batch] = ours()
        runs["minidiff, no graph", batch] = without_graph(ours)
        runs["diffusers", batch] = diffusers_loop(images, batch, device, part.tiny)
    # A generator begins when it is first asked: graphs are recorded, kernels chosen.
    for run in runs.values():
        list(islice(run, 1 if part.tiny else 12))
    rounds: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for _ in range(most):
        if part.left() < 0.2 * part.seconds:
            break
        for key, run in runs.items():
            count = 1 if part.tiny else 20
            synchronize()
            start = time.monotonic()
            list(islice(run, count))
            synchronize()
            rounds[key].append(count * key[1] / (time.monotonic() - start))
            table = [
                {"loop": loop, "batch": size, "images/s": spread(found)}
                for (loop, size), found in rounds.items()
                if found
            ]
            part.keep(rates=table, peak_memory_MB=peak_memory())


def peak_memory() -> int | None:
    """Of the GPU, in MB, so far."""
    return torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None


def without_graph(run: Callable[[], Iterator[None]]) -> Iterator[None]:
    """The same training loop, which calls its step instead of replaying it."""
    loop = run()
    with mock.patch.object(training, "Graphed", lambda step: step):
        yield next(loop)  # the step is made with the first batch
    yield from loop


def diffusers_loop(images: torch.Tensor, batch: int, device: torch.device, tiny: bool) -> Iterator[None]:
    """What a user of diffusers writes, with its images and text states on the device beforehand."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    width = 32 if tiny else 64
    unet: Any = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=3, layers_per_block=1,
        block_out_channels=(width, width, 2 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=32,
    )  # fmt: skip
    unet.to(device)
    scheduler: Any = DDPMScheduler(1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=device.type == "cuda")
    states = torch.randn(batch, 16, 128, device=device)
    while True:
        rows = torch.randint(len(images), (batch,), device=images.device)
        x0 = (images[rows].to(device).float() / 127.5) - 1
        eps = torch.randn_like(x0)
        t = torch.randint(1000, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            out = unet(scheduler.add_noise(x0, eps, t), t, encoder_hidden_states=states).sample
            loss = torch.nn.functional.mse_loss(out.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def time_to_quality(part: Part) -> None:
    """The command, from pressing return to its end, and the scores of what it made."""
    folder = part.folder / "critters"
    settings = ["--batch-size", "512", "--steps", "1500", "--sample-every", "1500", "--save-every", "500"]
    if part.tiny:
        settings = ["--batch-size", "8", "--steps", "2", "--images", "128", "--size", "16", "--width", "32"]
    command = [sys.executable, "-m", "minidiff.cli", "train", "critters", "--output", str(folder), *settings]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=part.left(), check=False, cwd=ROOT)
    part.keep(
        settings=settings, seconds=time.monotonic() - start, exit_code=done.returncode,
        said=done.stderr.strip().splitlines()[-3:],
    )  # fmt: skip
    part.keep(scores=scores(folder, 1, part.tiny))


def duo(part: Part) -> None:
    """Train two critters for as long as there is, save the model, score it."""
    recipe = recipe_of(part, "critters-duo", conditioning=part.name)
    recipe.batch_size = 8 if part.tiny else 256
    score_time = 1.0 if part.tiny else 30.0
    images = bytes_on_device(recipe.source.images, processes().device)
    # How long is a step? Of another model, since this one learns by a plan that ends with its last step.
    trial = md.train(recipe.build(recipe), Batches(images, recipe.source.caption, recipe.batch_size), 10**6)
    list(islice(trial, 1 if part.tiny else 20))
    synchronize()
    start = time.monotonic()
    list(islice(trial, 1 if part.tiny else 40))
    synchronize()
    per_step = (time.monotonic() - start) / (1 if part.tiny else 40)
    trial.close()  # type: ignore[attr-defined]
    recipe.steps = 2 if part.tiny else max(100, int(0.9 * (part.left() - score_time) / per_step))
    start, losses = time.monotonic(), []
    folder = part.folder / part.name
    for step in fit(recipe, folder, sample_every=recipe.steps, save_every=max(1, recipe.steps // 4)):
        if step.index % 50 == 0:
            losses.append((step.index, step.loss))
            part.keep(steps=step.index + 1, of=recipe.steps, batch=recipe.batch_size, losses=losses)
    part.keep(steps=recipe.steps, seconds=time.monotonic() - start)
    part.keep(scores=scores(folder, 2, part.tiny))
    for state in folder.glob("training*.safetensors"):
        state.unlink()  # three times the model; nothing goes on from here


def recipe_of(part: Part, name: str, **options: Any) -> Recipe:
    """A recipe, in tiny with small pictures and a small network."""
    return get_recipe(name, **options | ({"size": 16, "width": 32, "images": 64} if part.tiny else {}))


def scores(folder: Path, count: int, tiny: bool) -> dict[str, Any]:
    """What ``minidiff evaluate`` says of the model in a folder; in tiny, of two prompts only."""
    pipe = md.TextToImage.from_pretrained(folder)
    if not tiny:
        found = critters.evaluate(pipe, count, prompts=512)
        return {name: score._asdict() for name, score in found.items()}
    scenes = [critters.Critters(2, count=count).scene(i) for i in range(2)]
    drawn = pipe([critters.prompt(scene) for scene in scenes], steps=2).tensors
    reader = critters.AttributeReader.from_pretrained(READERS[count])
    return {"everything": critters.accuracy(reader, drawn, scenes, tuple(reader.attributes))._asdict()}


PARTS: dict[str, Callable[[Part], None]] = {
    "tests": tests, "rates": rates, "critters": time_to_quality, "both": duo, "pooled": duo,
}  # fmt: skip


# --- all of them ------------------------------------------------------------------------------------


def main() -> None:
    """Run the parts, or the one that is named."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--part", choices=list(PARTS), help="run this one alone, in this process")
    parser.add_argument("--tiny", action="store_true", help="in small, to see that it runs")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        PARTS[arguments.part](Part(arguments.part, folder, arguments.limit, arguments.tiny))
        return
    started = time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    gathered: dict[str, Any] = {
        "made_by": {"command": "python -m benchmarks.gpu", "torch": torch.__version__, "device": device},
        "tiny": arguments.tiny,
    }
    names = list(SHARES)
    for number, name in enumerate(names):
        left = arguments.limit - (time.monotonic() - started)
        seconds = left * SHARES[name] / sum(SHARES[later] for later in names[number:])
        command = [sys.executable, "-m", "benchmarks.gpu", str(folder.resolve()), "--part", name]
        command += ["--limit", f"{seconds:.0f}", *(["--tiny"] if arguments.tiny else [])]
        env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        begun = time.monotonic()
        try:
            done = subprocess.run(
                command, timeout=seconds + 1, capture_output=True, text=True, check=False, cwd=ROOT, env=env
            )
            said, code = done.stderr.strip().splitlines()[-5:], done.returncode
        except subprocess.TimeoutExpired:
            said, code = [f"stopped after {seconds:.0f} s"], None
        file = folder / f"{name}.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        took = round(time.monotonic() - begun, 1)
        gathered[name] = found | {"took_s": took, "exit": code, **({"error": said} if code else {})}
        write_json(folder / "gpu.json", gathered)
        print(f"{name}: {took} s, exit {code}", flush=True)


if __name__ == "__main__":
    main()
