"""Where should the text enter? Pooled vector, tokens, or both; in a U-Net and in a transformer.

Six models, three seeds each, learn from the same critters at 32x32 for the same number of steps. All read
the captions with the same frozen encoder, the text tower of critters-clip. Then each is asked for critters
by all five attributes: seen and held-out pairs of animal and hat. Captions that state five things are where
one vector gets crowded.

    python studies/mechanisms.py [--steps 400]
"""

import random

import torch
from common import each_over_runs, fit, options, small_model, so_far, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader

SEEDS = (0, 1, 2)
EVERYTHING = tuple(critters.ATTRIBUTES)


def score(model: md.Diffusion, reader: AttributeReader, seed: int, n: int) -> dict[str, float]:
    """Shares of pictures that show what was asked for."""
    pipe, shares = md.TextToImage(model), {}
    for split in ("train", "held_out"):
        rng = random.Random(f"mechanisms {seed} {split}")
        wanted = [critters.sample_critter(rng, split) for _ in range(n)]
        x = pipe([critters.prompt(c, EVERYTHING) for c in wanted], seed=1000 * seed).tensors
        for what, names in (("pair", ("animal", "hat")), ("all", EVERYTHING)):
            shares[f"{split} {what}"] = critters.accuracy(reader, x, wanted, names).value
    return shares


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prompts", type=int, default=128, help="pictures per split and run")
    arguments = parser.parse_args()
    reader, clip = AttributeReader.from_pretrained(), md.CLIP.from_pretrained("critters-clip")
    rows = so_far("mechanisms", vars(arguments))
    for network in ("UNet", "DiT"):
        for conditioning in ("pooled", "tokens", "both"):
            if any((r["network"], r["conditioning"]) == (network, conditioning) for r in rows):
                continue
            runs = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                model = small_model(clip.text_encoder(), network, conditioning)
                model, _ = fit(model, arguments.steps, seed)
                runs.append(score(model, reader, seed, arguments.prompts))
                print(network, conditioning, seed, runs[-1], flush=True)
            row = each_over_runs(runs)
            size = sum(p.numel() for p in model.net.parameters())
            described = {"network": network, "conditioning": conditioning, "parameters": size}
            rows.append(described | row)
            write("mechanisms", settings=vars(arguments), seeds=SEEDS, rows=rows)


if __name__ == "__main__":
    main()
