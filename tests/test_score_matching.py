"""Score matching: the three ways to write one and the same distance (chapter 3)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import minidiff as md
from minidiff.exact import GaussianMixture
from minidiff.loss import Draws

F64 = torch.float64
MIXTURE = GaussianMixture(torch.tensor([[-1.1], [0.2], [1.3]]), torch.tensor([0.1, 0.3, 0.2]))
GUESSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: 0 * x,
    "one Gaussian": lambda x: -x,
    "a wave": lambda x: torch.sin(3 * x) - x / 2,
}


@pytest.fixture(params=[0.15, 0.5, 0.9])
def level(request: pytest.FixtureRequest) -> md.NoiseLevel:
    return md.Cosine()(request.param)


def to_the_truth(guess: Callable[[Tensor], Tensor], level: md.NoiseLevel) -> tuple[Tensor, Tensor, Tensor]:
    """E ||guess - score||² on a grid of x_t, with the grid and its probabilities."""
    x = torch.linspace(-8, 8, 40_001, dtype=F64)[:, None]
    share = MIXTURE.log_density(x, level).softmax(0)[:, None]
    return (share * (guess(x) - MIXTURE.score(x, level)) ** 2).sum(), x, share


@pytest.mark.parametrize("name", GUESSES)
def test_hyvarinen_needs_no_truth(name, level):
    """E ||s||² + 2 div s differs from the distance to the true score by what no guess can change."""
    guess = GUESSES[name]
    distance, x, share = to_the_truth(guess, level)
    x.requires_grad_()
    s = guess(x)
    (divergence,) = torch.autograd.grad(s.sum(), x)
    free_of_truth = (share * (s.detach() ** 2 + 2 * divergence)).sum()
    constant = (share * MIXTURE.score(x.detach(), level) ** 2).sum()
    torch.testing.assert_close(free_of_truth + constant, distance, rtol=1e-6, atol=1e-8)


class Net(nn.Module):
    """Predicts the noise that belongs to a guess of the score."""

    def __init__(self, guess: Callable[[Tensor], Tensor], level: md.NoiseLevel) -> None:
        super().__init__()
        self.guess, self.level = guess, level
        self.unused = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor, t: Tensor, condition: None = None) -> Tensor:
        return -self.level.sigma * self.guess(x)


def test_squared_error_of_noise_is_score_matching(level):
    """The loss of a network for eps, over sigma², is the distance of -eps/sigma to the true score, up to a
    constant: between any two networks both differ by the same. x0 and eps take equally likely values."""
    normal = torch.special.ndtri((torch.arange(240, dtype=F64) + 0.5) / 240)[:, None]
    normal = normal / normal.square().mean().sqrt()  # quantiles cut the tails
    x0 = (MIXTURE.means + MIXTURE.stds * normal.T).reshape(-1, 1)  # (720, 1): the components weigh the same
    x0, eps = x0.repeat_interleave(len(normal), 0), normal.repeat(len(x0), 1)
    distances, losses = [], []
    for guess in GUESSES.values():
        distances.append(to_the_truth(guess, level)[0])
        model = md.Diffusion(Net(guess, level), md.Cosine(), target="eps")
        with torch.no_grad():
            losses.append(md.loss(model, x0, draws=Draws(level, eps, None)).double())
    for i in (1, 2):
        gained = (losses[i] - losses[0]) / level.sigma**2
        torch.testing.assert_close(gained, distances[i] - distances[0], rtol=0.005, atol=0.005)
        assert abs(gained) > 0.05


def test_the_constant_is_the_variance_that_is_left_of_the_noise(level):
    """With the true score as guess the distance is 0, and the loss is E Var[eps | x_t]."""
    generator = torch.Generator().manual_seed(0)
    x0 = MIXTURE.sample(200_000, generator).double()
    eps = torch.randn(x0.shape, generator=generator, dtype=F64)
    model = md.Diffusion(Net(lambda x: MIXTURE.score(x, level), level), md.Cosine(), target="eps")
    with torch.no_grad():
        found = md.loss(model, x0, draws=Draws(level, eps, None)).double()
    _, x, share = to_the_truth(lambda x: x, level)
    mean_square = (share * MIXTURE.denoise(x, level).eps ** 2).sum()
    torch.testing.assert_close(found, 1 - mean_square, rtol=0.02, atol=0.002)  # Var[eps] = 1 splits in two
