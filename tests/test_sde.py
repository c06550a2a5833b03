"""Short steps against the differential equations they tend to (chapter 5)."""

import math

import pytest
import torch
from torch import Tensor

import minidiff as md
from minidiff.exact import GaussianMixture
from minidiff.schedule import Schedule

F64 = torch.float64
MIXTURE = GaussianMixture(
    torch.tensor([[-0.6, 0.5], [1.6, 0.9], [0.7, -1.2]], dtype=F64),
    torch.tensor([[0.25, 0.5], [0.4, 0.25], [0.3, 0.3]], dtype=F64),
    torch.tensor([0.5, 0.2, 0.3], dtype=F64),
)
SCHEDULES = [md.Cosine(), md.VP(), md.Sigmoid(), md.Karras(), md.Flow()]


def drift_and_noise(schedule: Schedule, t: float) -> tuple[Tensor, Tensor]:
    """f = d log alpha / dt and g² = -sigma² d log SNR / dt, by automatic differentiation."""
    time = torch.tensor(t, dtype=F64, requires_grad=True)
    level = schedule(time)
    f = torch.zeros((), dtype=F64)
    if level.alpha.requires_grad:  # not where alpha is 1 throughout
        (f,) = torch.autograd.grad(level.alpha.log(), time, retain_graph=True)
    (speed,) = torch.autograd.grad(level.log_snr, time)
    return f, -(level.sigma.detach() ** 2) * speed


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_a_short_step_forward_is_drift_and_noise(schedule, t):
    f, g2 = drift_and_noise(schedule, t)
    h = 1e-6
    step = md.transition(torch.ones(1, dtype=F64), schedule(t), schedule(t + h))
    torch.testing.assert_close((step.mean[0] - 1) / h, f, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.std**2 / h, g2, rtol=1e-4, atol=0)


def test_drift_and_noise_of_the_cosine_by_hand():
    """alpha = cos u and sigma = sin u with u = pi t / 2: f = -(pi/2) tan u and g² = pi tan u."""
    f, g2 = drift_and_noise(md.Cosine(offset=0), 0.3)
    tan = math.tan(0.15 * math.pi)
    assert f.item() == pytest.approx(-math.pi / 2 * tan)
    assert g2.item() == pytest.approx(math.pi * tan)


def test_the_density_obeys_fokker_planck():
    """dp/dt + div(f x p) - g² Laplace(p) / 2 = 0, for the cosine; and not with another noise."""
    generator = torch.Generator().manual_seed(0)
    x = (1.5 * torch.randn(200, 2, generator=generator, dtype=F64)).requires_grad_()
    t = torch.linspace(0.1, 0.9, 200, dtype=F64).requires_grad_()
    angle = math.pi / 2 * t
    density = MIXTURE.log_density(x, md.NoiseLevel(t, angle.cos(), angle.sin())).exp()  # (200,)
    (growth,) = torch.autograd.grad(density.sum(), t, retain_graph=True)

    def divergence(field: Tensor) -> Tensor:
        parts = [
            torch.autograd.grad(field[:, i].sum(), x, retain_graph=True, create_graph=True)[0][:, i]
            for i in range(2)
        ]
        return torch.stack(parts).sum(0)

    (slope,) = torch.autograd.grad(density.sum(), x, retain_graph=True, create_graph=True)
    f, g2 = -math.pi / 2 * angle.tan(), math.pi * angle.tan()
    carried, spread = -divergence(f[:, None] * x * density[:, None]), divergence(slope) / 2
    assert growth.abs().max() > 0.1
    torch.testing.assert_close(growth, carried + g2 * spread, rtol=1e-8, atol=1e-11)
    assert (growth - carried - 1.1 * g2 * spread).abs().max() > 0.01


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_short_step_back_is_drift_and_noise(schedule, eta):
    """dx = [f x - (1 + eta²) g² score / 2] dt + eta g dW, backwards: Song et al. 2021b, eq. 6 at eta = 1 and
    eq. 13 at eta = 0. The score is the mixture's own, not the guess of eps."""
    t, h = 0.5, 1e-5
    f, g2 = drift_and_noise(schedule, t)
    level_t, level_s = schedule(t), schedule(t - h)
    scale = (level_t.alpha**2 + level_t.sigma**2).sqrt()
    x = scale * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    ends, draws = [], []
    for seed in (1, 2):
        random = torch.Generator().manual_seed(seed)
        ends.append(md.sample(md.ddim(MIXTURE.denoise, x, [level_t, level_s], eta=eta, generator=random)))
        draws.append(torch.randn(50, 2, generator=torch.Generator().manual_seed(seed)).double())
    fresh = ((ends[0] - ends[1]) / (draws[0] - draws[1])).median()
    assert fresh.item() ** 2 / h == pytest.approx(eta**2 * g2.item(), rel=1e-3, abs=1e-9)
    drift = (ends[0] - fresh * draws[0] - x) / -h
    wanted = f * x - (1 + eta**2) / 2 * g2 * MIXTURE.score(x, level_t)
    torch.testing.assert_close(drift, wanted, rtol=1e-2, atol=1e-3 * wanted.abs().max().item())
