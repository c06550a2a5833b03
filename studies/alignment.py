"""What does an alignment term in the training loss buy, at equal training time?

The term is 1 - cosine between the guess of x0 and the caption in CLIP's space (minidiff.alignment). It
costs a pass through CLIP's picture tower, forward and back, so a model that trains with it makes fewer
steps in the same time. Three seeds, 32x32: without the term; with it; and, to tell the price from the
effect, without it for as few steps. Beside them the same score as gradient at sampling time.

    python studies/alignment.py [--steps 400]
"""

import random
import statistics
from typing import Any

import torch
from common import each_over_runs, fit, options, over_runs, small_model, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader, Critters
from minidiff.metrics import frechet_distance
from minidiff.text import CLIP, Alignment

SEEDS = (0, 1, 2)
EVERYTHING = tuple(critters.ATTRIBUTES)


def score(
    model: md.Diffusion, reader: AttributeReader, clip: CLIP, seed: int, n: int, pull: float = 0.0
) -> dict[str, float]:
    """Accuracy, distance and CLIP score of ``n`` pictures of prompts that state everything.

    ``pull`` is the scale of gradient guidance by CLIP's cosine, on top of guidance 3.
    """
    rng = random.Random(f"alignment {seed}")
    wanted = [critters.sample_critter(rng, "all") for _ in range(n)]
    texts = [critters.prompt(c, EVERYTHING) for c in wanted]
    levels, parts = model.schedule.levels(20), []
    assert model.shape is not None
    for start in range(0, n, 64):
        asked = texts[start : start + 64]
        denoise = md.guide(model.denoise, model.encode(asked), 3.0)
        if pull:
            denoise = md.gradient_guide(denoise, Alignment(clip).score(asked), pull)
        random_numbers = md.generators(1000 * seed + start, len(asked))
        x = md.noise((len(asked), *model.shape), levels[0], generator=random_numbers)
        parts.append(md.sample(md.dpmpp_2m(md.clamp(denoise), x, levels)).float().clamp(-1, 1))
    x = torch.cat(parts)
    real = Critters(n, x.shape[-1], "all", seed=2**30 + seed).images().float() / 127.5 - 1
    with torch.no_grad():
        clip_score = torch.cat([clip.similarity(x[i : i + 64], texts[i : i + 64]) for i in range(0, n, 64)])
    return {
        "pair": critters.accuracy(reader, x, wanted).value,
        "all": critters.accuracy(reader, x, wanted, EVERYTHING).value,
        "distance": frechet_distance(x, real, reader).value,
        "CLIP score": float(clip_score.mean()),
    }


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="without the term")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.5])
    parser.add_argument("--pulls", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--prompts", type=int, default=256, help="pictures per run")
    arguments = parser.parse_args()
    reader, clip = AttributeReader.from_pretrained(), CLIP.from_pretrained("critters-clip")

    def train(steps: int, seed: int, weight: float) -> tuple[md.Diffusion, float]:
        torch.manual_seed(seed)
        model = small_model(clip.text_encoder())
        term = Alignment(clip, weight) if weight else None
        return fit(model, steps, seed, alignment=term)

    # How many steps take as long with the term: measured in turns, because the machine's speed drifts.
    train(5, 0, 0.0)
    timed = [(train(20, 0, 0.0)[1], train(20, 0, 0.1)[1]) for _ in range(5)]
    ratio = statistics.median(aligned / plain for plain, aligned in timed)
    fewer = round(arguments.steps / ratio)
    print(f"{arguments.steps} steps without the term take as long as {fewer} with it", flush=True)
    plan: dict[str, tuple[int, float]] = {
        "without": (arguments.steps, 0.0),
        "without, fewer steps": (fewer, 0.0),
        **{f"with, weight {weight:g}": (fewer, weight) for weight in arguments.weights},
    }
    rows: list[dict[str, Any]] = []
    for name, (steps, weight) in plan.items():
        variants: dict[float, list[dict[str, float]]] = {0.0: []}
        if name == "without":
            variants |= {pull: [] for pull in arguments.pulls}
        times = []
        for seed in SEEDS:
            model, seconds = train(steps, seed, weight)
            times.append(seconds)
            for pull, runs in variants.items():
                runs.append(score(model, reader, clip, seed, arguments.prompts, pull))
                print(f"{name}, pull {pull:g}, seed {seed}: {seconds:.0f} s {runs[-1]}", flush=True)
        for pull, runs in variants.items():
            row = each_over_runs(runs)
            rows.append(
                {
                    "name": name,
                    "steps": steps,
                    "weight": weight,
                    "pull": pull,
                    "seconds": over_runs(times),
                    **row,
                }
            )
        write(
            "alignment", settings=vars(arguments), seeds=SEEDS,
            seconds_of_20_steps=timed, time_ratio=ratio, rows=rows,
        )  # fmt: skip


if __name__ == "__main__":
    main()
