"""How good are a trained model's pictures after so many calls? Our samplers and those of ``diffusers``.

All draw with the shipped ``critters``, the same weights, prompts, starting noise and guidance, on levels of
equal length in t. Three numbers for each:

* right: share of pictures in which the reader sees all five attributes that the prompt states;
* away: root mean square distance, in grey values of 255, to where the probability-flow ODE leads from the
  same noise: the error that is the sampler's own. The end is ``adams`` in 200 steps;
* distance: kernel distance to renders of the same critters, in the reader's features. As both sets show the
  same critters, it is below 0 for a perfect model: how far, other renders of them say.

It takes too long for ``make bench``.

    python -m benchmarks.quality [--prompts 128]
"""

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import minidiff as md
from benchmarks.common import installed, markdown, record, under
from benchmarks.samplers import CALLS, OURS, THEIRS, heun_calls, ours, theirs
from minidiff import critters
from minidiff.critters import AttributeReader, Critter
from minidiff.denoiser import Denoiser
from minidiff.metrics import kernel_distance
from minidiff.pixels import from_bytes
from minidiff.sampling import generators

GUIDANCE = 3.0
BATCH = 64
FINE = 200
FITTED_ON, EVALUATIONS, FITTED_CALLS = 8, 150, (4, 6, 8, 10)
"""Pictures and runs that :func:`minidiff.fit_levels` is given, and the numbers of steps it is asked for."""


class Guided(NamedTuple):
    """A batch of the prompts, asked as the samplers of :mod:`benchmarks.samplers` ask an exact solution."""

    denoise: Denoiser


class Asked:
    """What is asked for, half of it pairs that training never showed.

    Attributes:
        wanted: the critters.
        x: (n, 3, 64, 64), where all samplers start.
    """

    def __init__(self, model: md.Diffusion, prompts: int):
        assert model.shape is not None
        rng = random.Random("quality")
        self.wanted = [critters.sample_critter(rng, ("train", "held_out")[i % 2]) for i in range(prompts)]
        self.condition = model.encode(
            [critters.prompt(critter, tuple(critters.ATTRIBUTES)) for critter in self.wanted]
        )
        level = model.schedule(1.0)
        self.x = md.noise((prompts, *model.shape), level, generator=generators(0, prompts))
        self.model = model

    def guided(self, at: slice) -> Guided:
        """Some of the prompts."""
        condition = self.condition.take(torch.arange(len(self.x))[at])
        return Guided(md.guide(self.model.denoise, condition, GUIDANCE))

    def fitted(self, steps: int) -> Callable[[Guided, Tensor], Tensor]:
        """Adams on levels fitted to this model, on other noise and other prompts than are scored."""
        rng = random.Random("fit")
        texts = [critters.prompt(critters.sample_critter(rng)) for _ in range(FITTED_ON)]
        denoise = md.guide(self.model.denoise, self.model.encode(texts), GUIDANCE)
        x = md.noise(
            (FITTED_ON, *self.x.shape[1:]), self.model.schedule(1.0), generator=generators(10**6, FITTED_ON)
        )
        levels = md.fit_levels(denoise, x, self.model.schedule, steps, evaluations=EVALUATIONS)
        print(f"fitted, {steps} steps:", *(f"{level.t:.3f}" for level in levels), flush=True)
        return lambda part, x: md.sample(md.adams(part.denoise, x, levels))

    def draw(self, end: Callable[[Guided, Tensor], Tensor]) -> Tensor:
        """All pictures, (n, 3, 64, 64) in [-1, 1], where ``end`` leads from their noise."""
        parts = [slice(i, i + BATCH) for i in range(0, len(self.x), BATCH)]
        return torch.cat([end(self.guided(at), self.x[at]) for at in parts]).clamp(-1, 1)


def contestants() -> list[tuple[str, str, Callable[..., Tensor]]]:
    """Library, sampler, and ``end(part, x, calls)``."""
    found: list[tuple[str, str, Callable[..., Tensor]]] = [
        *(("minidiff", name, partial(ours, sampler)) for name, sampler in OURS.items()),
        ("minidiff", "Heun", heun_calls),
    ]
    if installed("diffusers"):
        found += [("diffusers", name, partial(theirs, *how)) for name, how in THEIRS.items()]
    return found


def run(
    prompts: int = 128, calls: Sequence[int] = CALLS, fine: int = FINE, fits: Sequence[int] = FITTED_CALLS
) -> dict[str, Any]:
    """All scores: so many prompts and calls, against the end of ``fine`` steps; ``fits`` of the calls also on
    fitted levels."""
    asked = Asked(md.Diffusion.from_pretrained("critters").eval(), prompts)
    reader = AttributeReader.from_pretrained()
    size = asked.x.shape[-1]
    renders, others = _renders(asked.wanted, size, "renders"), _renders(asked.wanted, size, "others")

    def scores(x: Tensor) -> dict[str, float]:
        right = critters.accuracy(reader, x.float(), asked.wanted, tuple(critters.ATTRIBUTES))
        away = (x - end).square().mean().sqrt() * 127.5
        distance = kernel_distance(x.float(), renders, reader).value
        return {"right": round(right.value, 4), "away": round(away.item(), 3), "distance": round(distance, 1)}

    end = asked.draw(lambda part, x: ours(md.adams, part, x, fine))
    rows = []
    for library, name, sampler in contestants():
        each = [scores(asked.draw(partial(_after, sampler, count))) for count in calls]
        rows.append(_row(library, name, calls, each))
        print(f"{library}: {name}", rows[-1]["right"], rows[-1]["away"], flush=True)
    if fits:
        each = [scores(asked.draw(asked.fitted(count))) for count in fits]
        rows.append(_row("minidiff", "Adams, levels fitted", fits, each))
    return {
        "settings": {"prompts": prompts, "calls": list(calls), "fine": fine, "guidance": GUIDANCE},
        "end": scores(end),
        "renders": round(kernel_distance(others, renders, reader).value, 1),
        "rows": rows,
    }


def _renders(wanted: Sequence[Critter], size: int, seed: str) -> Tensor:
    """(n, 3, size, size) in [-1, 1]."""
    rng = random.Random(seed)
    drawings = [np.asarray(critters.draw(critter, size, rng)) for critter in wanted]
    return from_bytes(torch.from_numpy(np.stack(drawings)).movedim(-1, 1))


def _row(
    library: str, sampler: str, calls: Sequence[int], each: Sequence[dict[str, float]]
) -> dict[str, Any]:
    scores = {what: [score[what] for score in each] for what in each[0]}
    return {"library": library, "sampler": sampler, "calls": list(calls), **scores}


def _after(sampler: Callable[..., Tensor], calls: int, part: Guided, x: Tensor) -> Tensor:
    return sampler(part, x, calls)


def table(result: Mapping[str, Any]) -> str:
    """One table for each of the three numbers; the best of each column in bold."""
    settings, end = result["settings"], result["end"]
    parts = []
    nearest = partial(min, key=lambda v: abs(v - result["renders"]))
    for what, title, best_of, form in (
        ("right", "all five attributes right, %", max, lambda v: f"{100 * v:.0f}"),
        ("away", "grey values away from the end", min, lambda v: f"{v:.1f}"),
        ("distance", "kernel distance to renders", nearest, lambda v: f"{v:.0f}"),
    ):
        scores = [dict(zip(row["calls"], row[what], strict=True)) for row in result["rows"]]
        best = {n: form(best_of(s[n] for s in scores if n in s)) for n in settings["calls"]}
        cells = [[form(s[n]) if n in s else "" for n in settings["calls"]] for s in scores]
        lines = [
            [
                f"{row['library']}: {row['sampler']}",
                *(f"**{cell}**" if cell == best[n] else cell for cell, n in zip(line, best, strict=True)),
            ]
            for row, line in zip(result["rows"], cells, strict=True)
        ]
        parts.append(markdown([f"{title}, after calls", *map(str, settings["calls"])], lines))
    last = (
        f"{settings['prompts']} prompts, guidance {settings['guidance']:g}. At the end, {settings['fine']} "
        f"steps of Adams, {100 * end['right']:.0f} % are right, and the kernel distance is "
        f"{end['distance']:.0f}; that of other renders of the same critters is {result['renders']:.0f}. "
    )
    return "\n".join([*parts, last + under(result)])


def main() -> None:
    """Run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    print(record("quality", run, prompts=parser.parse_args().prompts))


if __name__ == "__main__":
    main()
