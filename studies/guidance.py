"""What guidance buys and what it costs: accuracy against diversity and distance, over the scale.

For each setting and each of three seeds, a number of pictures is drawn for each of eight prompts, which
state animal and hat and leave fur, hat colour and background free. Four numbers:

* accuracy: the reader sees the animal and the hat that were asked for;
* diversity: how many hat colours, and how many backgrounds, the model effectively uses for one prompt, as
  exp(entropy) of what the reader sees, mean over both and over the prompts; the data use 5 of each;
* distance: Fréchet distance to as many renders of the same animals and hats, in the reader's features;
* saturated: share of the values beyond 0.98, the mark of too much contrast.

    python studies/guidance.py                # the shipped model
    python studies/guidance.py --train 600    # small models that are still learning, one per seed
"""

import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import each_over_runs, fit, options, over_runs, small_model, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader
from minidiff.metrics import frechet_distance

SCALES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 9.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "scale 6, rescaled 0.7": {"guidance": 6.0, "rescale": 0.7},
    "scale 6, t > 0.3": {"guidance": 6.0, "interval": (0.3, 1.0)},
    "scale 6, 0.3 < t < 0.8": {"guidance": 6.0, "interval": (0.3, 0.8)},
    "scale 3, t > 0.3": {"guidance": 3.0, "interval": (0.3, 1.0)},
}
SEEDS, PROMPTS = (0, 1, 2), 8


def effective_number(values: list[Any], most: int) -> float:
    """exp(entropy) of what was seen, with Miller's correction for the number of samples, at most ``most``."""
    counts = torch.tensor(list(Counter(values).values()), dtype=torch.float64)
    share = counts / counts.sum()
    entropy = -(share * share.log()).sum() + (len(counts) - 1) / (2 * counts.sum())
    return min(float(most), float(entropy.exp()))


def asked_for(seed: int, n: int) -> tuple[list[str], list[critters.Critter]]:
    """The prompts of a seed, and what each of ``n`` pictures should show."""
    rng = random.Random(f"guidance {seed}")
    asked = [critters.sample_critter(rng) for _ in range(PROMPTS)]
    texts = [critters.prompt(critter) for critter in asked]
    return texts, [critter for critter in asked for _ in range(n // PROMPTS)]


def measure(
    pipe: md.TextToImage, reader: AttributeReader, seed: int, n: int, steps: int, settings: dict[str, Any]
) -> dict[str, float]:
    """The four numbers for one setting and one seed."""
    texts, wanted = asked_for(seed, n)
    each = n // PROMPTS
    x = pipe(texts, num_images=each, seed=1000 * seed, steps=steps, **settings).tensors
    seen = reader.read(x)
    spread = [
        effective_number([s[name] for s in seen[start : start + each]], 5)
        for start in range(0, len(seen), each)
        for name in ("hat_color", "background")
    ]
    return {
        "accuracy": critters.accuracy(reader, x, wanted).value,
        "diversity": statistics.fmean(spread),
        "distance": frechet_distance(x, renders(wanted, x.shape[-1], seed), reader).value,
        "saturated": float((x.abs() > 0.98).float().mean()),
    }


def renders(wanted: list[critters.Critter], size: int, seed: int) -> torch.Tensor:
    """Drawings of the same animals and hats, the rest by chance: (n, 3, size, size) in [-1, 1]."""
    rng, drawn = random.Random(f"renders {seed}"), []
    for critter in wanted:
        free = critters.Critter(
            critter.animal, rng.choice(critters.furs(critter.animal)), critter.hat,
            rng.choice(critters.HAT_COLORS), rng.choice(critters.BACKGROUNDS),
        )  # fmt: skip
        pixels = np.asarray(critters.draw(free, size, rng))
        drawn.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    return torch.stack(drawn).float() / 127.5 - 1


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("--model", default="critters")
    parser.add_argument("--train", type=int, help="steps of a small model per seed, not --model")
    parser.add_argument("--pictures", type=int, default=256, help="per setting and seed")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    reader = AttributeReader.from_pretrained()
    if arguments.pictures < PROMPTS or arguments.pictures % PROMPTS:
        parser.error(f"--pictures {arguments.pictures}: give a multiple of {PROMPTS}")
    if arguments.train is not None:
        clip, models = md.CLIP.from_pretrained("critters-clip"), []
        for seed in SEEDS:
            torch.manual_seed(seed)
            models.append(fit(small_model(clip.text_encoder()), arguments.train, seed)[0])
    else:
        models = [md.Diffusion.from_pretrained(arguments.model)] * len(SEEDS)
    settings = {f"scale {scale:g}": {"guidance": scale} for scale in SCALES} | VARIANTS
    rows = []
    for name, extra in settings.items():
        runs = [
            measure(md.TextToImage(model), reader, seed, arguments.pictures, arguments.steps, extra)
            for seed, model in zip(SEEDS, models, strict=True)
        ]
        row = each_over_runs(runs)
        rows.append({"name": name, **extra, **row})
        print(f"{name:24}", *(f"{k} {v['mean']:.3f}" for k, v in row.items()), flush=True)
    floor = []
    for seed, model in zip(SEEDS, models, strict=True):
        # What two sets of renders are apart, the least that can be asked for.
        _, wanted = asked_for(seed, arguments.pictures)
        assert model.shape is not None
        one, other = (renders(wanted, model.shape[-1], seed + more) for more in (100, 200))
        floor.append(frechet_distance(one, other, reader).value)
    write(
        "guidance" if arguments.train is None else "guidance_small",
        settings=vars(arguments) | {"model": Path(arguments.model).name if arguments.train is None else None},
        seeds=SEEDS,
        rows=rows,
        renders_distance=over_runs(floor),
    )


if __name__ == "__main__":
    main()
