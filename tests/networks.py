"""Small networks of every kind, and conditions for them, for the tests of chapter 3."""

import pytest
import torch
from torch import Tensor, nn

import minidiff as md

D, T = 8, 5  # width and length of the conditions here
NETWORKS = {
    "UNet": lambda condition_dim=D: md.UNet(
        2, 32, (1, 2), blocks=1, patch=2, attention=(1,), condition_dim=condition_dim
    ),
    "DiT": lambda condition_dim=D: md.DiT(2, 64, depth=2, patch=2, condition_dim=condition_dim),
    "MLP": lambda condition_dim=D: md.MLP(3, 32, depth=2, condition_dim=condition_dim),
}
SHAPES = {"UNet": (2, 4, 8), "DiT": (2, 4, 8), "MLP": (3,)}
all_networks = pytest.mark.parametrize("name", NETWORKS)
image_networks = pytest.mark.parametrize("name", ["UNet", "DiT"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(net: nn.Module) -> nn.Module:
    """As after some training: no parameter is zero any more. float64, so that only mathematics counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.double().eval()


def batch(name: str, n: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    return randn(n, *SHAPES[name], seed=seed), torch.linspace(0.1, 0.9, n, dtype=torch.float64)


def condition(n: int = 3, seed: int = 5) -> md.Condition:
    mask = torch.arange(T) < torch.tensor([3, 5, 1])[torch.arange(n) % 3, None]  # lengths 3, 5, 1
    return md.Condition(randn(n, T, D, seed=seed), mask, randn(n, D, seed=seed + 1))


def trained(name: str, schedule: md.Schedule | None = None, target: str = "v") -> md.Diffusion:
    net = perturbed(NETWORKS[name]()).float()
    return md.Diffusion(net, schedule or md.Cosine(), target, shape=SHAPES[name])  # type: ignore[arg-type]
