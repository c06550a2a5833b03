"""What guidance buys and what it costs: accuracy against diversity and distance, over the scale.

For each setting and each of three seeds, pictures are drawn for random prompts that state animal and hat
and leave fur, hat colour and background free. Three numbers:

* accuracy: the reader sees the animal and the hat that were asked for;
* diversity: how many hat colours and backgrounds the model effectively uses where the prompt leaves
  them free, as exp(entropy) of what the reader sees; the data use all 5 x 5, so 25 is the most;
* distance: Fréchet distance to as many renders of the same critters, in the reader's features.

    python studies/guidance.py [--model critters] [--prompts 256]
"""

import argparse
import random
from collections import Counter
from typing import Any

import torch
from common import over_runs, write

import minidiff as md
from minidiff.data import AttributeReader, Critters, critters
from minidiff.metrics import frechet_distance

SCALES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 9.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "scale 6, rescaled 0.7": {"guidance": 6.0, "rescale": 0.7},
    "scale 6, t > 0.3": {"guidance": 6.0, "interval": (0.3, 1.0)},
    "scale 6, 0.3 < t < 0.8": {"guidance": 6.0, "interval": (0.3, 0.8)},
    "scale 3, t > 0.3": {"guidance": 3.0, "interval": (0.3, 1.0)},
}
SEEDS = (0, 1, 2)


def effective_number(values: list[Any], most: int) -> float:
    """exp(entropy) of what was seen, with Miller's correction for the number of samples, at most ``most``."""
    counts = torch.tensor(list(Counter(values).values()), dtype=torch.float64)
    share = counts / counts.sum()
    entropy = -(share * share.log()).sum() + (len(counts) - 1) / (2 * counts.sum())
    return min(float(most), float(entropy.exp()))


def measure(
    pipe: md.TextToImage, reader: AttributeReader, seed: int, n: int, **settings: Any
) -> dict[str, float]:
    """The three numbers for one setting and one seed."""
    rng = random.Random(f"guidance {seed}")
    wanted = [critters.sample(rng) for _ in range(n)]
    x = pipe([critters.prompt(c) for c in wanted], seed=1000 * seed, **settings).tensors
    seen = reader.read(x)
    right = sum(
        s["animal"] == c.animal and s["hat"] == c.hat for s, c in zip(seen, wanted, strict=True)
    )
    real = Critters(n, x.shape[-1], seed=2**30 + seed).images().float() / 127.5 - 1
    free = [(s["hat_color"], s["background"]) for s in seen]
    return {
        "accuracy": right / n,
        "diversity": effective_number(free, 25),
        "distance": frechet_distance(x, real, reader).value,
        "saturated": float((x.abs() > 0.98).float().mean()),
    }


def main() -> None:
    """Run the study and write its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="critters")
    parser.add_argument("--prompts", type=int, default=256, help="pictures per setting and seed")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    pipe, reader = (
        md.TextToImage.from_pretrained(arguments.model),
        AttributeReader.from_pretrained(),
    )
    settings = {f"scale {scale:g}": {"guidance": scale} for scale in SCALES} | VARIANTS
    rows = []
    for name, extra in settings.items():
        runs = [
            measure(pipe, reader, seed, arguments.prompts, steps=arguments.steps, **extra)
            for seed in SEEDS
        ]
        row = {what: over_runs([run[what] for run in runs]) for what in runs[0]}
        rows.append({"name": name, **extra, **row})
        print(f"{name:24}", *(f"{k} {v['mean']:.3f}" for k, v in row.items()), flush=True)
    renders = [
        Critters(2 * arguments.prompts, 64, seed=2**30 + 10 + seed).images().float() / 127.5 - 1
        for seed in SEEDS
    ]
    floor = over_runs(
        [
            frechet_distance(x[: arguments.prompts], x[arguments.prompts :], reader).value
            for x in renders
        ]
    )
    write("guidance", settings=vars(arguments), seeds=SEEDS, rows=rows, renders_distance=floor)


if __name__ == "__main__":
    main()
