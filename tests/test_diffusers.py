"""The same arithmetic as diffusers, where both do the same thing.

The samplers of both libraries walk along the same noise levels with the same analytic network. Our
level after i of T steps is diffusers' timestep i - 1 (it counts from 0, and "no noise" is not in its
table). diffusers keeps its tables in float32; where it lets us, they are replaced by the same numbers
in float64, so that the comparison is tight.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from helpers import point_mass, two_peaks
from torch import Tensor

import minidiff as md
from minidiff.forward import posterior_std

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, about numpy

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
STEPS = (1, 7, 13, 20, 50)
NETWORK = two_peaks(0.4)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def float64(scheduler):
    """The scheduler with its table of alpha_bar in float64."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.betas, scheduler.alphas = betas, 1 - betas
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, number(1.0))
    return scheduler


def exact_sigmas(scheduler, levels: list[md.NoiseLevel]) -> None:
    """Its table of sigma/alpha in float64, from our levels: the same numbers with more digits."""
    ours = torch.stack([level.sigma / level.alpha for level in levels])
    torch.testing.assert_close(scheduler.sigmas.double(), ours, rtol=2e-4, atol=1e-6)
    scheduler.sigmas = ours


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-5 of their size. The steps of some schedulers are float32 inside."""
    return bool((ours - theirs).norm() <= 1e-5 * theirs.norm())


def trailing(n: int) -> list[int]:
    """n timesteps of 0..999 from the last one down; the spacing of Lin et al. 2024, table 2."""
    return [round(t) - 1 for t in np.arange(1000, 0, -1000 / n)]


def levels_at(timesteps: list[int]) -> list[md.NoiseLevel]:
    """Our levels for these timesteps, ending at clean data."""
    return [md.Linear()(number((t + 1) / 1000)) for t in timesteps] + [md.Linear()(number(0.0))]


def start(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- schedules -------------------------------------------------------------------------------------


def test_linear_is_ddpms_table():
    """Theirs is a product of float32 numbers: 1000 factors, each off by up to 6e-8."""
    level = md.Linear()((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    theirs = DDPMScheduler(**BETAS).alphas_cumprod.double()
    torch.testing.assert_close(level.alpha**2, theirs, rtol=3e-5, atol=0)
    theirs = float64(DDPMScheduler(**BETAS)).alphas_cumprod
    torch.testing.assert_close(level.alpha**2, theirs, rtol=1e-12, atol=0)


def test_cosine_is_squaredcos_cap_v2():
    """They define it by betas clipped at 0.999; the clip touches the last beta alone, which the product
    up to step 999 does not hold."""
    level = md.Cosine()((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert (scheduler.betas[:-1] < 0.999).all()
    torch.testing.assert_close(
        level.alpha[:-1] ** 2, scheduler.alphas_cumprod[:-1].double(), rtol=3e-4, atol=1e-9
    )


def test_zero_terminal_snr_is_their_rescaling():
    """Their alpha at the end is 0; ours is 1e-10, whose logarithm exists."""
    level = md.Linear(zero_terminal_snr=True)((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    theirs = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(level.alpha**2, theirs, rtol=1e-9, atol=1e-19)


@pytest.mark.parametrize("n", STEPS)
def test_trailing_spacing(n):
    scheduler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    ours = [round(level.t.item() * 1000) - 1 for level in md.Linear().levels(n, "trailing")[:-1]]
    assert ours == scheduler.timesteps.tolist()


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted_flow(n, shift):
    """Their grid before the shift ends at 1/1000 and not at 0; given ours, the shift is the same."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, n + 1)[:-1])
    ours = torch.stack([level.sigma for level in md.Shifted(md.Flow(), shift).levels(n)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 7, 20, 50])
def test_karras_is_edms_schedule(n):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(n)
    ours = torch.stack([level.sigma for level in md.Karras().levels(n)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-5, atol=0)


def test_adding_noise_is_diffuse():
    timesteps = torch.tensor([0, 1, 499, 999])
    x0, eps = start(4, 2, 3), start(4, 2, 3).flip(0)
    ours = md.diffuse(x0, eps, md.Linear()((timesteps + 1).double() / 1000))
    theirs = float64(DDPMScheduler(**BETAS)).add_noise(x0, eps, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_v_is_their_velocity():
    timesteps = torch.tensor([0, 1, 499, 999])
    x0, eps = start(4, 2, 3), start(4, 2, 3).flip(0)
    ours = md.to_target(x0, eps, md.Linear()((timesteps + 1).double() / 1000), "v")
    theirs = float64(DDPMScheduler(**BETAS)).get_velocity(x0, eps, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# --- DDPM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 2, 10, 500, 998, 999])
def test_posterior_variance_is_fixed_small(t):
    """Their "fixed_small" is beta tilde, our posterior; "fixed_large" is beta, our transition."""
    small = float64(DDPMScheduler(**BETAS, variance_type="fixed_small"))
    large = float64(DDPMScheduler(**BETAS, variance_type="fixed_large"))
    level, before = (md.Linear()(number((k + 1) / 1000)) for k in (t, t - 1))
    torch.testing.assert_close(posterior_std(level, before) ** 2, small._get_variance(t), rtol=1e-9, atol=0)
    step = md.transition(torch.zeros(1, dtype=torch.float64), before, level)
    torch.testing.assert_close(step.std**2, large._get_variance(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [1, 2, 10, 500, 998, 999])
def test_posterior_mean_is_their_step(t):
    scheduler = float64(DDPMScheduler(**BETAS, prediction_type="sample", clip_sample=False))
    x_t, x0 = start(2, 5)[:1], start(2, 5)[1:]
    stepped = scheduler.step(x0, t, x_t, generator=torch.Generator().manual_seed(3)).prev_sample
    noise = torch.randn(1, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    level, before = (md.Linear()(number((k + 1) / 1000)) for k in (t, t - 1))
    posterior = md.posterior(x_t, x0, level, before)
    torch.testing.assert_close(posterior.mean + posterior.std * noise, stepped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", STEPS)
def test_ddpm(n):
    """Step by step with the same noise.

    At the last step theirs adds noise of variance 1e-20, "clamped to ensure it's not 0", when the last
    timestep is not 0. Ours adds none: x_0 is not noisy.
    """
    timesteps = trailing(n)
    scheduler = float64(DDPMScheduler(**BETAS, clip_sample=False))
    scheduler.set_timesteps(timesteps=timesteps)
    levels, x = levels_at(timesteps), start(3, 4)
    ours = list(md.ddpm(NETWORK, x, levels, generator=torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(1)
    for t, level, state in zip(timesteps, levels, ours, strict=False):
        eps = NETWORK(x, level).eps
        theirs = scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(9)).prev_sample
        std = scheduler._get_variance(t) ** 0.5
        x = theirs - std * torch.randn(3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        if state is not ours[-1]:  # our noise in place of theirs: drawn in float32, whatever x is
            x = x + std * torch.randn(3, 4, generator=generator).double()
        torch.testing.assert_close(state.x, x, rtol=1e-8, atol=1e-8)


# --- DDIM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 20, 50])
def test_ddim(n, eta):
    """At step counts that divide 1000, where "the previous timestep" is what it says."""
    scheduler = float64(DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"))
    scheduler.set_timesteps(n)
    assert scheduler.timesteps.tolist() == trailing(n)
    levels, x = levels_at(trailing(n)), start(3, 4)
    generator = torch.Generator().manual_seed(1)
    for t, level, state in zip(
        trailing(n), levels, md.ddim(NETWORK, x, levels, eta=eta, generator=generator), strict=False
    ):
        # Feed theirs the noise that ours drew.
        std = eta * posterior_std(level, state.level)
        x0, eps = NETWORK(x, level)
        kept = (state.level.sigma**2 - std**2).clamp(min=0).sqrt()
        drawn = torch.zeros_like(x)
        if std > 0:
            drawn = (state.x - state.level.alpha * x0 - kept * eps) / std
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=drawn if eta else None).prev_sample
        torch.testing.assert_close(state.x, theirs, rtol=1e-9, atol=1e-9)
        x = state.x
    assert state.level.sigma == 0


@pytest.mark.parametrize("n", [7, 13])
def test_ddim_where_the_step_count_does_not_divide(n):
    """diffusers 0.42 with 7 steps visits timesteps 999, 856, 713, 570, 428, 285, 142 but recomputes "the
    previous one" as t - 1000 // 7 = t - 142: from 999 it steps to the noise of 857, and then tells the
    network 856. The last step goes to timestep 0, not to clean data, and leaves noise.

    Ours is right: the next level of the list is where a step goes. The judge is a point mass, which any
    number of right steps finds. Step by step, with the level each step really goes to, both agree.
    """
    c = 0.8
    scheduler = float64(DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"))
    scheduler.set_timesteps(n)
    timesteps = scheduler.timesteps.tolist()
    levels, x = levels_at(timesteps), start(3, 4)
    went_to = [t - 1000 // n for t in timesteps]
    assert went_to[:-1] != timesteps[1:]
    assert went_to[-1] >= 0
    theirs = x
    for t, target in zip(timesteps, went_to, strict=True):
        at, to = (md.Linear()(number((k + 1) / 1000)) for k in (t, target))
        (state,) = md.ddim(point_mass(c), theirs, [at, to])
        theirs = scheduler.step(point_mass(c)(theirs, at).eps, t, theirs).prev_sample
        torch.testing.assert_close(state.x, theirs, rtol=1e-9, atol=1e-9)
    ours = md.sample(md.ddim(point_mass(c), x, levels))
    assert (ours - c).abs().max() < 1e-12
    assert (theirs - c).abs().max() > 1e-3


def test_clipping():
    """Their ``use_clipped_model_output`` is our clip: eps is derived again from the clipped x0. Their
    default clips x0 and keeps the old eps, which no longer belongs to it."""
    scheduler = float64(DDIMScheduler(**BETAS, clip_sample=True, timestep_spacing="trailing"))
    scheduler.set_timesteps(20)
    levels, x = levels_at(trailing(20)), 2 * start(3, 4)
    wide = two_peaks(1.5)
    for t, level, state in zip(trailing(20), levels, md.ddim(md.clamp(wide), x, levels), strict=False):
        eps = wide(x, level).eps
        right = scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
        torch.testing.assert_close(state.x, right, rtol=1e-9, atol=1e-9)
        x = state.x


# --- Heun ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", STEPS)
def test_heun(n):
    """Theirs works on x/alpha (k-diffusion's convention), with each inner timestep listed twice; its
    sigmas are float32."""
    scheduler = HeunDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=trailing(n))
    levels, x = levels_at(trailing(n)), start(3, 4)
    ours = [state.x for state in md.heun(NETWORK, x, levels)]
    scaled, theirs = x / levels[0].alpha, []
    for i, t in enumerate(scheduler.timesteps):
        level = md.Linear()((t.double() + 1) / 1000)
        variance_preserving = scheduler.scale_model_input(scaled, t)
        eps = NETWORK(variance_preserving.double(), level).eps
        scaled = scheduler.step(eps, t, scaled).prev_sample
        if i % 2 == 1 or i == len(scheduler.timesteps) - 1:  # the second half of a step, or the last step
            theirs.append(scaled)
    assert len(theirs) == n
    for state, level, found in zip(ours, levels[1:], theirs, strict=True):
        torch.testing.assert_close(state / level.alpha, found.double(), rtol=1e-5, atol=1e-5)


# --- DPM-Solver++ ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", STEPS)
def test_dpmpp_2m(n):
    """Theirs with ``final_sigmas_type="zero"``, whose last step is first order, as ours; it computes in
    float32."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint",
        final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=trailing(n))
    levels, x = levels_at(trailing(n)), start(3, 4)
    exact_sigmas(scheduler, levels)
    theirs = x
    for t, level, state in zip(scheduler.timesteps, levels, md.dpmpp_2m(NETWORK, x, levels), strict=False):
        theirs = scheduler.step(NETWORK(theirs, level).eps, t, theirs).prev_sample
        assert same(state.x, theirs)
    assert state.level.sigma == 0


@pytest.mark.parametrize("n", STEPS)
def test_dpmpp_2m_sde(n):
    """eta = 1 is their "sde-dpmsolver++", fed with the same noise."""
    scheduler = DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2, solver_type="midpoint",
        final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=trailing(n))
    levels, x = levels_at(trailing(n)), start(3, 4)
    ours = md.dpmpp_2m(NETWORK, x, levels, eta=1.0, generator=torch.Generator().manual_seed(1))
    exact_sigmas(scheduler, levels)
    theirs, generator = x, torch.Generator().manual_seed(1)
    for t, level, state in zip(scheduler.timesteps, levels, ours, strict=False):
        eps = NETWORK(theirs, level).eps
        fresh = torch.randn(3, 4, generator=generator).double()
        theirs = scheduler.step(eps, t, theirs, variance_noise=fresh).prev_sample
        assert same(state.x, theirs)
    assert state.level.sigma == 0


# --- EDM -------------------------------------------------------------------------------------------


def edm_output(scheduler, x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """What their preconditioned network must output to mean ``x0`` (Karras et al. 2022, eq. 7)."""
    data = scheduler.config.sigma_data
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2) ** 0.5
    return (x0 - c_skip * x) / c_out


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize(
    "make,sampler",
    [
        (lambda: EDMEulerScheduler(), md.ddim),
        (lambda: EDMDPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="zero"), md.dpmpp_2m),
    ],
    ids=["euler", "dpmpp_2m"],
)
def test_edm(make, sampler, n):
    """On the variance-exploding schedule, DDIM is Euler's method (Karras et al. 2022, algorithm 1 without
    its correction)."""
    scheduler = make()
    scheduler.set_timesteps(n)
    levels = md.Karras().levels(n)
    exact_sigmas(scheduler, levels)
    x = 80 * start(3, 4)
    theirs = x
    for t, level, state in zip(scheduler.timesteps, levels, sampler(NETWORK, x, levels), strict=False):
        theirs = theirs.double()
        output = edm_output(scheduler, theirs, NETWORK(theirs, level).x0, level.sigma)
        scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(output, t, theirs).prev_sample
        assert same(state.x, theirs), (state.x - theirs).norm() / theirs.norm()
    assert state.level.sigma == 0


@pytest.mark.parametrize("n", [2, 7, 20])
def test_heun_is_algorithm_1_of_edm(n):
    """Karras et al. 2022, algorithm 1, line by line: d = (x - D(x))/sigma and the mean of two slopes."""
    levels = md.Karras().levels(n)
    x = 80 * start(3, 4)
    sigmas = [level.sigma for level in levels]
    for i, state in enumerate(md.heun(NETWORK, x, levels)):
        d = (x - NETWORK(x, levels[i]).x0) / sigmas[i]
        moved = x + (sigmas[i + 1] - sigmas[i]) * d
        if sigmas[i + 1] != 0:
            d_next = (moved - NETWORK(moved, levels[i + 1]).x0) / sigmas[i + 1]
            moved = x + (sigmas[i + 1] - sigmas[i]) * (d + d_next) / 2
        torch.testing.assert_close(state.x, moved, rtol=1e-9, atol=1e-9)
        x = moved


# --- flow matching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", STEPS)
def test_flow_matching_euler(n):
    """On straight lines DDIM is Euler's method with the velocity eps - x0."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)])
    levels, x = md.Flow().levels(n), start(3, 4)
    theirs = x.float()
    for t, level, state in zip(scheduler.timesteps, levels, md.ddim(NETWORK, x, levels), strict=False):
        x0, eps = NETWORK(theirs.double(), level)
        velocity = md.to_target(x0, eps, level, "flow").float()
        theirs = scheduler.step(velocity, t, theirs).prev_sample
        torch.testing.assert_close(state.x.float(), theirs, rtol=1e-5, atol=1e-5)
    assert state.level.sigma == 0


@pytest.mark.parametrize("rescale", [0.2, 0.7, 1.0])
def test_rescaled_guidance(rescale):
    """Theirs, on x0 at every level; and at alpha = 0 also on v, which is what the paper's network
    predicts (Lin et al. 2024, section 3.4)."""
    told, free, x_t = torch.randn(3, 4, 2, 5, 5, dtype=torch.float64)

    def denoise(x_t, level, condition):
        x0 = told if condition else free
        _, alpha, sigma = level.like(x_t)
        return md.Prediction(x0, (x_t - alpha * x0) / sigma)

    def v(level, x0, eps):
        return level.alpha * eps - level.sigma * x0

    for t in (0.1, 0.5, 1.0):
        level = md.Cosine()(t)
        found = md.guide(denoise, True, 5.0, rescale=rescale)(x_t, level)
        theirs = rescale_noise_cfg(free + 5 * (told - free), told, rescale)
        torch.testing.assert_close(found.x0, theirs)
    guided, asked = md.guide(denoise, True, 5.0)(x_t, level), denoise(x_t, level, True)
    theirs = rescale_noise_cfg(v(level, *guided), v(level, *asked), rescale)
    torch.testing.assert_close(v(level, *found), theirs)
