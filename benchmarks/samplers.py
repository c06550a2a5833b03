"""How far from the exact answer does a sampler end, after so many calls? Ours and those of ``diffusers``.

All start from the same points of noise and ask the same denoiser, that of a Gaussian mixture, which is known
exactly. The right end of each path is where the probability-flow ODE leads, solved in 3,000 steps of Heun's
method. What is measured is the distance to it: its mean over 2,000 points, and its median, since a few points
near a watershed that end in another mode weigh heavily in the mean.

Both libraries walk the cosine schedule in steps of equal length in t, ending at sigma = 0 (``diffusers``
calls that "trailing"). Their other spacings start from the largest sigma of the table, which this schedule
sends to infinity, and give nan there.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

import minidiff as md
from benchmarks.common import markdown, record, under
from minidiff.data import points
from minidiff.exact import GaussianMixture

CALLS = (4, 6, 8, 10, 15, 20, 50)
SCHEDULE = md.Cosine()
FITTED_ON = 300
"""Points of noise that :func:`minidiff.fit_levels` is given."""
OURS: dict[str, Callable[..., Any]] = {"DDIM": md.ddim, "DPM-Solver++ 2M": md.dpmpp_2m, "Adams": md.adams}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
    "UniPC, order 2": ("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "UniPC, order 3": ("UniPCMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "zero"}),
    "DEIS, order 2": ("DEISMultistepScheduler", {"solver_order": 2}),
    "DEIS, order 3": ("DEISMultistepScheduler", {"solver_order": 3}),
}


class Denoises(Protocol):
    """An exact solution, or what stands for one: all that a sampler asks of it."""

    @property
    def denoise(self) -> md.Denoiser:
        """The denoiser."""


def problems() -> dict[str, GaussianMixture]:
    """The distributions: twelve Gaussians in eight dimensions, and the ring of the book."""
    means = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"12 Gaussians in 8 dimensions": GaussianMixture(means, 0.25), "ring": points.ring_of_gaussians()}


def ours(sampler: Callable[..., Any], oracle: Denoises, x: Tensor, steps: int) -> Tensor:
    """Where a sampler of this library ends."""
    return md.sample(sampler(oracle.denoise, x, SCHEDULE.levels(steps)))


def heun_calls(oracle: Denoises, x: Tensor, calls: int) -> Tensor:
    """Heun's method with so many calls: two a step, but for the first, from pure noise, and the last."""
    return ours(md.heun, oracle, x, (calls + 2) // 2)


def fitted(oracle: GaussianMixture, x: Tensor, steps: int) -> Tensor:
    """Where Adams ends on levels that were fitted to the denoiser, on other noise than ``x``."""
    generator = torch.Generator().manual_seed(2)
    other = torch.randn(FITTED_ON, *x.shape[1:], generator=generator, dtype=x.dtype)
    levels = md.fit_levels(oracle.denoise, other, SCHEDULE, steps)
    return md.sample(md.adams(oracle.denoise, x, levels))


def theirs(kind: str, settings: dict[str, Any], oracle: Denoises, x: Tensor, steps: int) -> Tensor:
    """Where a scheduler of diffusers ends; the denoiser is asked at the level that the scheduler is at."""
    import diffusers

    config = SCHEDULE.to_diffusers("x0").config
    scheduler = getattr(diffusers, kind).from_config(config, timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        ratio = scheduler.sigmas[i].double()  # sigma/alpha
        alpha = (1 + ratio**2).rsqrt()
        time = SCHEDULE.time(-2 * ratio.log())  # what a network is told; theirs count it in a table
        x0 = oracle.denoise(x, md.NoiseLevel(time, alpha, ratio * alpha)).x0
        x = scheduler.step(x0, t, x).prev_sample
    return x


def run(n: int = 2000, calls: tuple[int, ...] = CALLS, fine: int = 3000) -> dict[str, Any]:
    """All errors: ``n`` points, so many calls each, against a solution in ``fine`` steps."""
    rows = []
    for problem, oracle in problems().items():
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, *oracle.shape, generator=generator, dtype=torch.float64)
        end = ours(md.heun, oracle, x, fine)
        contestants: list[tuple[str, str, Callable[[int], Tensor]]] = [
            *(("minidiff", name, partial(ours, sampler, oracle, x)) for name, sampler in OURS.items()),
            ("minidiff", "Heun", partial(heun_calls, oracle, x)),
            ("minidiff", "Adams, levels fitted", partial(fitted, oracle, x)),
            *(("diffusers", name, partial(theirs, *how, oracle, x)) for name, how in THEIRS.items()),
        ]
        for library, name, end_of in contestants:
            errors = [(end_of(count) - end).norm(dim=1) for count in calls]
            rows.append({
                "problem": problem, "library": library, "sampler": name, "calls": list(calls),
                "mean": [round(error.mean().item(), 5) for error in errors],
                "median": [round(error.median().item(), 5) for error in errors],
            })  # fmt: skip
    return {"settings": {"points": n, "calls": list(calls), "fine": fine}, "rows": rows}


def errors(result: Mapping[str, Any], problem: str, what: str) -> str:
    """The "mean" or "median" errors of one problem in Markdown; the best of each column in bold."""
    rows = [row for row in result["rows"] if row["problem"] == problem]
    calls = result["settings"]["calls"]
    best = [min(row[what][i] for row in rows) for i in range(len(calls))]
    lines = [
        [
            f"{row['library']}: {row['sampler']}",
            *(f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(row[what], best, strict=True)),
        ]
        for row in rows
    ]
    return markdown([f"{problem}: {what} error after calls", *map(str, calls)], lines)


def table(result: Mapping[str, Any]) -> str:
    """Mean and median errors of all problems."""
    names = dict.fromkeys(row["problem"] for row in result["rows"])
    parts = [errors(result, problem, what) for problem in names for what in ("mean", "median")]
    return "\n".join([*parts, f"{result['settings']['points']} points. " + under(result)])


def main() -> None:
    """Run and write the file."""
    print(record("samplers", run))


if __name__ == "__main__":
    main()
