"""Short training runs, for the tests of chapter 4."""

import torch
from torch import Tensor, nn

import minidiff as md


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 64, *shape: int, seed: int = 7) -> Tensor:
    shape = shape or (3,)
    return torch.randn(n, *shape, generator=generator(seed), dtype=torch.float64)


class Guess(md.Diffusion):
    """A model whose guess of x0 is a fixed function of x_t, whatever its target; remembers its inputs."""

    def __init__(self, schedule, target="eps", guess=lambda x_t: torch.tanh(3 * x_t), offset=0.0):
        super().__init__(nn.Linear(1, 1), schedule, target)
        self.guess, self.offset = guess, offset

    def forward(self, x_t, level, condition=None):
        self.x_t, self.level, self.condition = x_t, level, condition
        alpha, sigma = (part.reshape(-1, *[1] * (x_t.ndim - 1)) for part in (level.alpha, level.sigma))
        self.x0 = self.guess(x_t)
        eps = (x_t - alpha * self.x0) / sigma
        return md.to_target(self.x0, eps, level, self.target) + self.offset


def weights_of(model: nn.Module) -> Tensor:
    """All in one, on the CPU, wherever training has moved the model."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()]).cpu()


def fresh(target: str = "eps", condition_dim: int | None = None, seed: int = 3) -> md.Diffusion:
    torch.manual_seed(seed)
    return md.Diffusion(md.MLP(2, 32, 2, condition_dim=condition_dim), md.Cosine(), target)  # type: ignore[arg-type]


def short(model: md.Diffusion, steps: int = 6, batches: object = None, **kwargs: object) -> list[md.Step]:
    settings = {"precision": "fp32", "warmup": 2, "lr": 0.01, **kwargs}
    return list(md.train(model, batches or [data(8, 2).float()], steps, **settings))  # type: ignore[arg-type]


def words(n: int) -> md.Condition:
    """Conditions of one token each, so that a dropped one has no token."""
    return md.Condition(torch.ones(n, 1, 1), torch.ones(n, 1, dtype=torch.bool), torch.ones(n, 1))
