"""Which time's data does a model draw, when its data change while it learns?

A small model learns critters at 32x32. First all of them wear crowns. Then wizard hats come in, a little
more in every step, until there is nothing else. Half of the captions do not mention the hat, so what a
prompt without a hat draws tells which share of wizard hats the weights believe in. It is read off for the
weights as they are and for averages of several decays, a few times on the way. In the end the model goes on
with wizard hats alone, or with some of the old pictures among the new ones, and is asked for a crown.

    python studies/drift.py
"""

import copy
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import SIZE, options, small_model, write

import minidiff as md
from minidiff import critters
from minidiff.critters import AttributeReader, Critters

OLD, NEW = "crown", "wizard hat"
ANIMALS = ("cat", "bear", "pig", "frog", "panda", "fox")  # those that the training split shows in both hats
BATCH = 64


def pools(images: int) -> dict[str, tuple[torch.Tensor, list[critters.Critter]]]:
    """Pictures and scenes of each of the two hats, drawn once."""
    data = Critters(images, SIZE)
    found: dict[str, tuple[torch.Tensor, list[critters.Critter]]] = {}
    for hat in (OLD, NEW):
        scenes = [(i, data.scene(i)) for i in range(images)]
        kept = [(i, s) for i, s in scenes if isinstance(s, critters.Critter) and s.hat == hat]
        kept = [(i, s) for i, s in kept if s.animal in ANIMALS]
        pixels = torch.stack([data[i][0] for i, _ in kept])  # (n, 3, SIZE, SIZE) in [-1, 1]
        found[hat] = pixels, [s for _, s in kept]
    return found


def batches(
    pool: dict[str, tuple[torch.Tensor, list[critters.Critter]]], share: Callable[[int], float], first: int
) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Batch k holds new hats with the chance ``share(k)``; every other caption leaves the hat out."""
    for k in itertools.count(first):
        rng = random.Random(f"drift {k}")
        x0, captions = [], []
        for i in range(BATCH):
            pixels, scenes = pool[NEW if rng.random() < share(k) else OLD]
            j = rng.randrange(len(scenes))
            x0.append(pixels[j])
            said = ("animal", "hat") if i % 2 else ("animal",)
            captions.append(critters.prompt(scenes[j], said))
        yield torch.stack(x0), captions


def learn(
    model: md.Diffusion,
    optimizer: torch.optim.Optimizer,
    averages: dict[float, md.EMA],
    stream: Iterator[tuple[torch.Tensor, list[str]]],
    steps: range,
) -> None:
    """Some steps of training; every average takes its share after each."""
    generator = torch.Generator()
    for k in steps:
        x0, captions = next(stream)
        generator.manual_seed(k)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (k + 1) / 100)
        loss = md.loss(
            model, x0, captions, weighting="snr_plus_one", condition_dropout=0.1, generator=generator
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for decay, average in averages.items():
            average.mix(model, 1 - min(decay, (1 + k) / (10 + k)))
        if k % 100 == 99:
            print(f"  step {k + 1}, loss {loss.item():.3f}", file=sys.stderr, flush=True)


def drawn(model: Any, reader: AttributeReader, n: int, hat: str | None) -> dict[str, int]:
    """Of ``n`` pictures, with a hat in the prompt or none, how many wear each of the two hats."""
    prompts = []
    for i in range(n):
        animal = ANIMALS[i % len(ANIMALS)]
        scene = critters.Critter(animal, critters.furs(animal)[0], hat or OLD, "red", "white")
        prompts.append(critters.prompt(scene, ("animal", "hat") if hat else ("animal",)))
    model.eval()
    x = md.TextToImage(model)(prompts, steps=15, guidance=1.0, seed=0).tensors
    model.train()
    hats = [seen["hat"] for seen in reader.read(x)]
    return {"n": n, OLD: hats.count(OLD), NEW: hats.count(NEW)}


def main() -> None:
    """Run the study and write its file."""
    parser = options(__doc__)
    parser.add_argument("--before", type=int, default=500, help="steps with crowns only")
    parser.add_argument("--ramp", type=int, default=900, help="steps in which wizard hats come in")
    parser.add_argument("--after", type=int, default=250, help="steps after the change, in two ways")
    parser.add_argument("--images", type=int, default=9000)
    parser.add_argument("--pictures", type=int, default=192, help="drawn per measurement")
    arguments = parser.parse_args()
    before, ramp, n = arguments.before, arguments.ramp, arguments.pictures
    reader, pool = AttributeReader.from_pretrained(), pools(arguments.images)
    print({hat: len(scenes) for hat, (_, scenes) in pool.items()}, flush=True)
    torch.manual_seed(0)
    model = small_model(md.TextEncoder.from_captions([*critters.vocabulary(), ","]))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    averages = {decay: md.EMA(model) for decay in (0.9, 0.99, 0.995, 0.998)}

    def share(k: int) -> float:
        return min(1.0, max(0.0, (k - before) / ramp))

    rows, done, expected = [], 0, dict.fromkeys(averages, 0.0)  # the same averages, of the share itself
    for stop in (before, *(before + ramp * part // 6 for part in (3, 4, 5, 6))):
        learn(model, optimizer, averages, batches(pool, share, done), range(done, stop))
        for k in range(done, stop):
            for decay, value in expected.items():
                kept = min(decay, (1 + k) / (10 + k))
                expected[decay] = kept * value + (1 - kept) * share(k)
        done = stop
        row = {"step": stop, "data": share(stop - 1), "ramp": ramp, "raw": drawn(model, reader, n, None)}
        for decay, average in averages.items():
            found = drawn(average.module, reader, n, None)
            row[str(decay)] = found | {"average of the data": expected[decay]}
        rows.append(row)
        print(row, flush=True)
        write("drift", settings=vars(arguments), old=OLD, new=NEW, rows=rows)

    asked = {"at the end of the change": drawn(averages[0.99].module, reader, n, OLD)}
    state = copy.deepcopy((model, optimizer.state_dict(), averages[0.99]))
    for name, new in (("new pictures only", 1.0), ("a quarter old pictures", 0.75)):
        model, moments, average = copy.deepcopy(state)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        optimizer.load_state_dict(moments)
        stream = batches(pool, lambda k, new=new: new, done)  # type: ignore[misc]
        learn(model, optimizer, {0.99: average}, stream, range(done, done + arguments.after))
        asked[name] = drawn(average.module, reader, n, OLD)
        print(name, asked[name], flush=True)
    write("drift", settings=vars(arguments), old=OLD, new=NEW, rows=rows, asked_for_old=asked)


if __name__ == "__main__":
    main()
