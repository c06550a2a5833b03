"""What does a sampler cost besides its network? Ours and the schedulers of ``diffusers``.

The network is one that gives back a tensor it holds, so what is timed is all the rest of a run: the noise
levels or timesteps, what is done to the network's input and output, the step itself. It is also given as a
share of what the shipped network takes for the calls of such a step, without guidance.

    python -m benchmarks.overhead [--rounds 10]
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import minidiff as md
from benchmarks.common import in_turn, installed, markdown, record, show, spread, under
from minidiff.sampling import SAMPLERS

PROMPT = "a cat in a top hat"


class Stored(nn.Module):
    """A network that costs nothing: it gives back the tensor it was made with, and counts its calls."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer, self.calls = nn.Parameter(answer, requires_grad=False), 0

    def forward(self, *ignored: Any) -> Tensor:
        """The stored tensor."""
        self.calls += 1
        return self.answer


def ours(name: str, net: Stored, x: Tensor, steps: int) -> Callable[[], Tensor]:
    """A run of one of our samplers, from the choice of levels to the last sample."""
    model, sampler = md.Diffusion(net, md.Cosine(), target="x0"), SAMPLERS[name]
    x = x.double()  # what md.noise gives
    return lambda: md.sample(sampler(model.denoise, x, model.schedule.levels(steps)))


def theirs(scheduler: Any, net: Stored, x: Tensor, steps: int) -> Callable[[], Tensor]:
    """A run with a scheduler of diffusers, as their pipelines write it."""

    @torch.no_grad()
    def whole() -> Tensor:
        scheduler.set_timesteps(steps)
        sample = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = net(scheduler.scale_model_input(sample, t), t)
            sample = scheduler.step(eps, t, sample).prev_sample
        return sample

    return whole


def schedulers() -> dict[str, Any]:
    """The schedulers of diffusers, as they are without arguments, by the names of the table."""
    if not installed("diffusers"):
        return {}
    import diffusers

    return {
        "DDPM": diffusers.DDPMScheduler(),
        "DDIM": diffusers.DDIMScheduler(),
        "Heun": diffusers.HeunDiscreteScheduler(),
        "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(),
        "UniPC": diffusers.UniPCMultistepScheduler(),
    }


def run(
    *, steps: int = 20, batch: int = 4, size: int = 64, rounds: int = 10, seconds: float = 0.3
) -> dict[str, Any]:
    """Measure.

    Args:
        steps: steps of a run.
        batch: samples in it.
        size: their height and width in pixels.
        rounds: runs of each contender, in turn.
        seconds: length of a turn.

    Returns:
        ``settings``; ``network``, seconds of one call of the shipped network; ``rows``, for each sampler its
        seconds per step besides the network, its calls of the network per step, and its cost as a share of
        the time of these calls.
    """
    random = torch.Generator().manual_seed(0)
    x, answer = (torch.randn(batch, 3, size, size, generator=random) for _ in range(2))
    nets: dict[tuple[str, str], Stored] = {}
    contenders: dict[tuple[str, str], Callable[[], object]] = {}
    for name in SAMPLERS:
        net = nets["minidiff", name] = Stored(answer.clamp(-1, 1))
        contenders["minidiff", name] = ours(name, net, x, steps)
    for name, scheduler in schedulers().items():
        net = nets["diffusers", name] = Stored(answer)
        contenders["diffusers", name] = theirs(scheduler, net, x, steps)
    calls = {}
    for key, whole in contenders.items():
        whole()
        calls[key] = nets[key].calls / steps

    shipped = md.TextToImage.from_pretrained("critters").model
    condition = shipped.encode([PROMPT] * batch)
    level = shipped.schedule(0.5)

    @torch.no_grad()
    def network() -> Tensor:
        return shipped(x, level, condition)

    took = in_turn(
        {"": network, **{" ".join(key): whole for key, whole in contenders.items()}}, rounds, seconds
    )
    rows = []
    for key in contenders:
        step = [whole / steps for whole in took[" ".join(key)]]
        share = [a / (calls[key] * b) for a, b in zip(step, took[""], strict=True)]
        rows.append(
            {
                "library": key[0],
                "sampler": key[1],
                "calls_per_step": calls[key],
                "seconds_per_step": spread(step),
                "share_of_network": spread(share),
            }
        )
    settings = {"steps": steps, "batch": batch, "size": size, "rounds": rounds, "seconds": seconds}
    return {"settings": settings, "network": {"seconds_per_call": spread(took[""])}, "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """The rows in milliseconds and percent, and what the network takes."""
    rows = [
        [
            f"{row['library']}, {row['sampler']}",
            f"{row['calls_per_step']:g}",
            show(row["seconds_per_step"], 1e-3),
            show(row["share_of_network"], 1e-2),
        ]
        for row in result["rows"]
    ]
    header = ["sampler", "network calls per step", "ms per step besides them", "% of their time"]
    settings, network = result["settings"], result["network"]["seconds_per_call"]
    return (
        markdown(header, rows)
        + f"\nOne call of the shipped network takes {show(network, 1e-3)} ms. Batch {settings['batch']}, "
        f"{settings['size']}×{settings['size']} pixels, {settings['steps']} steps, "
        f"rounds: {settings['rounds']}. " + under(result)
    )


def main() -> None:
    """Run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    print(record("overhead", run, **vars(parser.parse_args())))


if __name__ == "__main__":
    main()
