"""Does a model draw new pictures, or those it learned from?

A small model of Fashion-MNIST learns from 8 pictures, on purpose, until it knows them. For it, for the
shipped model and for test pictures, the distance of 500 pictures to the nearest training picture is taken, in
pixels and in the features of the reader that ``quality.py reader`` trains. The errors of the guess of x0, at
five levels, are those on pictures that were and were not trained on.

    python studies/memory.py few
    python studies/memory.py measure
"""

from typing import Any

import numpy as np
import torch
from common import RESULTS, options, write
from quality import READER, RUNS, pictures, read
from torch import Tensor

import minidiff as md
from minidiff.critters import AttributeReader
from minidiff.data import Batches, fashion_mnist
from minidiff.data.fashion import CAPTIONS
from minidiff.pixels import from_bytes, save_grid, to_bytes
from minidiff.recipes import Options, text_to_image

FEW, DRAWN, BATCH, TIMES = 8, 500, 32, (0.1, 0.3, 0.5, 0.7, 0.9)


def train(steps: int) -> None:
    """The model that learns from a few, into runs/quality."""
    data = fashion_mnist()
    torch.manual_seed(0)
    images = data.images[:FEW].repeat(BATCH // FEW, 1, 1, 1)  # a batch shows each several times
    captions = data.captions[:FEW] * (BATCH // FEW)
    model = text_to_image(CAPTIONS, (1, 32, 32), Options(width=32))
    batches = Batches(images, captions, BATCH, seed=0)
    for step in md.train(model, batches, steps, weighting="snr_plus_one", seed=0):
        if step.index % 100 == 99:
            print(f"step {step.index + 1}, loss {step.loss:.3f}", flush=True)
    step.ema.save_pretrained(RUNS / "few", torch.float16)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each of x (n, F) to the nearest of y (m, F), and which that is."""
    found = [torch.cdist(part, y).min(1) for part in x.float().split(100)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


@torch.no_grad()
def errors(model: md.Diffusion, images: Tensor, labels: Tensor) -> list[float]:
    """Mean squared error of the guess of x0 at each of TIMES."""
    x0, condition = from_bytes(images), model.encode([CAPTIONS[i] for i in labels])
    found = []
    for t in TIMES:
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        guess = model.denoise(md.diffuse(x0, eps, model.schedule(t)), model.schedule(t), condition).x0
        found.append(float((guess - x0).square().mean()))
    return found


def measure(shipped: str) -> None:
    """Distances and errors of all, and a sheet of what the memoriser draws beside what it was shown."""
    reader, data = AttributeReader.from_pretrained(READER), fashion_mnist()
    test, test_labels = pictures("test")
    features = read(reader, data.images)[0]
    pixels = from_bytes(data.images).flatten(1)
    rows: dict[str, dict[str, Any]] = {}
    for name in ("few", shipped, "test"):
        n = FEW if name == "few" else len(data.images)
        if name == "test":
            images = test[:DRAWN]
            rows[name] = {}
        else:
            model = md.Diffusion.from_pretrained(RUNS / name if name == "few" else name)
            labels = data.labels[:n][torch.arange(DRAWN) % n]
            prompts = [CAPTIONS[i] for i in labels]
            images = to_bytes(md.TextToImage(model)(prompts, steps=20, guidance=1.0, seed=1).tensors)
            held = errors(model, test[:256], test_labels[:256])
            rows[name] = {"trained on": n, "test error": held}
            rows[name]["train error"] = errors(model, data.images[:n][:256], data.labels[:n][:256])
        space = {
            "features": (read(reader, images)[0], features),
            "pixels": (from_bytes(images).flatten(1), pixels),
        }
        for kind, (x, y) in space.items():
            distance, index = nearest(x, y[:n])
            rows[name][kind] = [round(d, 3) for d in distance.tolist()]
            if name == "few" and kind == "features":
                pair = torch.stack([images[:8], data.images[index[:8]]]).flatten(0, 1)
                save_grid(pair, RESULTS / "memory.png", ncols=8)
        if name == "few":  # how near would pictures be that it did not see?
            rows["test, against few"] = {
                kind: [round(d, 3) for d in nearest(x, y[:n])[0].tolist()]
                for kind, (x, y) in {
                    "features": (read(reader, test[:DRAWN])[0], features),
                    "pixels": (from_bytes(test[:DRAWN]).flatten(1), pixels),
                }.items()
            }
        print(name, {k: float(np.median(v)) for k, v in rows[name].items() if k in space}, flush=True)
    write("memory", times=TIMES, rows=rows)


def main() -> None:
    """Train, or measure."""
    parser = options(__doc__)
    parser.add_argument("part", choices=("few", "measure"))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--model", default="fashion-mnist")
    arguments = parser.parse_args()
    if arguments.part == "measure":
        measure(arguments.model)
    else:
        train(arguments.steps)


if __name__ == "__main__":
    main()
