"""The attribute reader: a small network that says what a picture of a critter shows.

Captions of critters are exactly true, so a classifier trained on the renderer can score a text-to-image
model: did the picture show what the prompt asked for? The reader sees every animal-hat pair, held-out
ones too, or it would be blind where it matters; its own error on fresh renders bounds what its scores
can mean.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minidiff.data.batches import Batches
from minidiff.data.critters import ATTRIBUTES, Critter, Critters, labels

SHIPPED = Path(__file__).parents[1] / "checkpoints" / "critters-reader"


class AttributeReader(nn.Module):
    """Convolutions down to 4x4, one hidden layer, and one linear head per attribute.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        c_in = 3
        for c_out in (width, 2 * width, 4 * width, 4 * width):  # 64 -> 32 -> 16 -> 8 -> 4
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                nn.GroupNorm(8, c_out),
                nn.SiLU(),
            ]
            c_in = c_out
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * width, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(v)) for name, v in ATTRIBUTES.items()})
        self.num_features = 128  # how torchmetrics asks for the width of forward's output

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 128) of images (B, 3, H, W) in [-1, 1]; other sizes are brought to 64x64."""
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
        numbers = {name: logits.argmax(1).tolist() for name, logits in self.logits(x).items()}
        return [
            {name: ATTRIBUTES[name][numbers[name][i]] for name in ATTRIBUTES} for i in range(len(x))
        ]

    def correct(
        self, x: Tensor, critters: Sequence[Critter], attributes: Sequence[str] = ("animal", "hat")
    ) -> list[bool]:
        """For each image whether all the named attributes read as they should.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            critters: what was asked for, B of them.
            attributes: names out of :data:`~minidiff.data.critters.ATTRIBUTES`.
        """
        return [
            all(seen[name] == getattr(critter, name) for name in attributes)
            for seen, critter in zip(self.read(x), critters, strict=True)
        ]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and reader.safetensors, each replaced whole."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format": "minidiff-reader-1", "width": self.width}
        unfinished = folder / ".unfinished"
        unfinished.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(unfinished, folder / "config.json")
        unfinished.write_bytes(save(self.state_dict()))
        os.replace(unfinished, folder / "reader.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str] = SHIPPED) -> "AttributeReader":
        """The reader in ``folder``; without one, the reader shipped with minidiff.

        Raises:
            FileNotFoundError: the folder holds no reader.
        """
        folder = Path(folder)
        if not (folder / "reader.safetensors").is_file():
            raise FileNotFoundError(
                f"{folder} holds no reader: `minidiff train critters-reader` makes one"
            )
        reader = cls(json.loads((folder / "config.json").read_text())["width"])
        reader.load_state_dict(load_file(folder / "reader.safetensors"))
        return reader.eval().requires_grad_(False)


def train_reader(
    reader: AttributeReader,
    steps: int = 3000,
    *,
    images: int = 40_000,
    batch_size: int = 128,
    seed: int = 1,
) -> Iterator[float]:
    """Train the reader on fresh renders of all pairs, yielding the loss of each step.

    Half of the pictures get a little noise or blur, because a model's samples are never as crisp as
    the renderer's.

    Args:
        reader: trained in place.
        steps: optimizer steps.
        images: renders to train on.
        batch_size: images per step.
        seed: of renders, shuffles and noise.
    """
    data = Critters(images, split="all", seed=seed)
    rendering = data.render()
    truth = [labels(critter) for critter in rendering.critters]
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    batches = iter(
        Batches(rendering.images, lambda index, epoch: str(index), batch_size, seed=seed)
    )
    for _ in range(steps):
        x, numbers = next(batches)
        strength = torch.rand(len(x), 1, 1, 1, generator=generator)
        noisy = x + 0.15 * strength * torch.randn(x.shape, generator=generator)
        blurred = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        kind = torch.randint(4, (len(x), 1, 1, 1), generator=generator)
        x = torch.where(kind == 0, noisy, torch.where(kind == 1, blurred, x))
        target = {n: torch.tensor([truth[int(i)][n] for i in numbers]) for n in ATTRIBUTES}
        logits = reader.logits(x)
        loss = sum(F.cross_entropy(logits[name], target[name]) for name in ATTRIBUTES)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
