"""The attribute reader: a small network that says what a picture of a critter, or of two, shows.

Captions of critters are exactly true, so a classifier trained on the renderer can score a text-to-image
model: did the picture show what the prompt asked for? The reader sees every animal-hat pair, held-out
ones too, or it would be blind where it matters; its own error on fresh renders bounds what its scores
can mean. One reader looks at single critters, another at scenes of two, where it also says when it sees
one critter only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from minidiff.critters.data import Critters
from minidiff.critters.drawing import draw
from minidiff.critters.scene import ATTRIBUTES, NOBODY, OWN, PAIR_ATTRIBUTES, labels
from minidiff.data.batches import Batches
from minidiff.files import SHIPPED, StrPath, fill_folder, load_weights, open_weights

READERS = {1: "critters-reader", 2: "critters-duo-reader"}
"""The readers that come with minidiff, by the number of critters they read."""
IGNORED = -100
"""The label of an attribute that a picture does not have: what cross-entropy leaves out."""


class AttributeReader(nn.Module):
    """Convolutions down to 4x4, one hidden layer, and one linear head per attribute.

    Args:
        width: channels of the first layer.
        attributes: the values of each attribute: those of a critter, or
            :data:`~minidiff.critters.scene.PAIR_ATTRIBUTES`.
        features: width of the hidden layer.
    """

    def __init__(
        self, width: int = 32, attributes: Mapping[str, Sequence[str]] = ATTRIBUTES, features: int = 128
    ):
        super().__init__()
        self.width = width
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        self.num_features = features  # how torchmetrics asks for the width of forward's output
        layers: list[nn.Module] = []
        c_in = 3
        for c_out in (width, 2 * width, 4 * width, 4 * width):  # 64 -> 32 -> 16 -> 8 -> 4
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.SiLU()]
            c_in = c_out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, features), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(v)) for name, v in self.attributes.items()})

    @property
    def count(self) -> int:
        """How many critters it looks for, 1 or 2."""
        return 2 if "relation" in self.attributes else 1

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [-1, 1]; other sizes are brought to
        64x64."""
        if x.shape[2:] != (64, 64):
            x = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        return self.trunk(x)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """For each attribute the logits (B, number of its values)."""
        features = self(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, x: Tensor) -> list[dict[str, str]]:
        """For each of B images (B, 3, H, W) in [-1, 1] the most likely value of every attribute."""
        read = []
        for part in x.split(256):  # the first layer's output is many times larger than the images
            numbers = {n: logits.argmax(1).tolist() for n, logits in self.logits(part).items()}
            read += [
                {name: values[numbers[name][i]] for name, values in self.attributes.items()}
                for i in range(len(part))
            ]
        return read

    def save_pretrained(self, folder: StrPath, dtype: torch.dtype | None = None) -> None:
        """Write config.json and reader.safetensors, each whole; weights in ``dtype`` or as they are."""
        config = {"format": "minidiff-reader-1", "width": self.width, "features": self.num_features}
        config |= {"attributes": self.attributes}
        with fill_folder(folder) as scratch:
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (scratch / "reader.safetensors").write_bytes(
                save({key: value.to(dtype) for key, value in self.state_dict().items()})
            )

    @classmethod
    def from_pretrained(cls, name: StrPath = READERS[1]) -> "AttributeReader":
        """A trained reader, in eval mode.

        Args:
            name: a folder, or one of :data:`READERS`.

        Raises:
            FileNotFoundError: the folder holds no reader.
        """
        folder = Path(name) if Path(name).exists() else SHIPPED / name
        if not (folder / "reader.safetensors").is_file():
            raise FileNotFoundError(
                f"{name} holds no reader: `minidiff train critters-reader` makes one, "
                "and critters-duo-reader one for two critters"
            )
        with open_weights(folder / "reader.safetensors") as handle:
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        config = json.loads((folder / "config.json").read_text())
        reader = cls(config["width"], config.get("attributes", ATTRIBUTES), config.get("features", 128))
        load_weights(reader, state)
        return reader.eval().requires_grad_(False)


class _SomeIncomplete(Critters):
    """Scenes of two of which every eighth lacks a critter."""

    def missing(self, index: int) -> Literal["first", "second"] | None:
        if index % 8:
            return None
        return "first" if index % 16 else "second"

    def image(self, index: int) -> Image.Image:
        rng = self.chance(index, "picture")
        return draw(self.scene(index), self.size, rng, without=self.missing(index))

    def labels(self, index: int) -> dict[str, int]:
        """What is left is the first, and the second is nobody."""
        numbers, missing = labels(self.scene(index)), self.missing(index)
        if missing is None:
            return numbers
        left = "second" if missing == "first" else "first"
        alone = dict.fromkeys(numbers, IGNORED)
        alone |= {f"first_{name}": numbers[f"{left}_{name}"] for name in OWN}
        alone["background"] = numbers["background"]
        alone["second_animal"] = PAIR_ATTRIBUTES["second_animal"].index(NOBODY)
        return alone


def degrade(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, C, H, W) of which a quarter got some noise and a quarter some blur: a model's samples
    are never as crisp as the renderer's."""
    strength = torch.rand(len(x), 1, 1, 1, generator=generator)
    noisy = x + 0.15 * strength * torch.randn(x.shape, generator=generator)
    blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    kind = torch.randint(4, (len(x), 1, 1, 1), generator=generator)
    return torch.where(kind == 0, noisy, torch.where(kind == 1, blurred, x))


def train_reader(
    reader: AttributeReader, steps: int = 1500, *, images: int = 40_000, batch_size: int = 128, seed: int = 1
) -> Iterator[float]:
    """Train a reader on fresh renders of all pairs, yielding the loss of each step.

    Half of the pictures are made worse by :func:`degrade`. Of the scenes that a reader of two sees, one
    of eight lacks a critter.

    Args:
        reader: trained in place; its attributes say whether it reads one critter or two.
        steps: optimizer steps.
        images: renders to train on.
        batch_size: images per step.
        seed: of renders, shuffles and noise.
    """
    if reader.count == 1:
        rendering = Critters(images, split="all", seed=seed).render()
        pixels, truth = rendering.images, [labels(critter) for critter in rendering.scenes]
    else:
        data = _SomeIncomplete(images, split="all", seed=seed, count=2)
        pixels, truth = data.images(), [data.labels(index) for index in range(images)]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    batches = iter(Batches(pixels, truth, batch_size, seed=seed))
    for _ in range(steps):
        x, rows = next(batches)
        x = degrade(x, generator)
        target = {n: torch.tensor([row[n] for row in rows]) for n in reader.attributes}
        logits = reader.logits(x)
        loss = sum(
            F.cross_entropy(logits[name], target[name], ignore_index=IGNORED) for name in reader.attributes
        )
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
