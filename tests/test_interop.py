"""Out to diffusers and back: the same numbers, with their real classes, small and untrained."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from helpers import SCHEDULES

import minidiff as md
from minidiff.interop import from_diffusers, to_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CHAINS = [name for name in SCHEDULES if name not in ("karras", "flow")]


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=4, attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def start(channels: int = 2) -> torch.Tensor:
    return torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))


# --- there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_chain_keeps_its_levels(name, target):
    """Their table is a product in float32, and the last beta at most 0.999."""
    scheduler = SCHEDULES[name].to_diffusers(target)
    t = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    level = SCHEDULES[name](t)
    theirs = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(level.alpha[:-1] ** 2, theirs[:-1], rtol=3e-4, atol=1e-9)
    known = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    assert scheduler.config.prediction_type == known[target]
    ddim = DDIMScheduler.from_config(scheduler.config)
    assert torch.equal(ddim.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_keeps_its_levels(shift):
    schedule = md.Flow() if shift == 1 else md.Shifted(md.Flow(), shift)
    scheduler = schedule.to_diffusers()
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1])
    ours = torch.stack([level.sigma for level in schedule.levels(10)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_karras_keeps_its_levels():
    schedule = md.Karras(0.01, 20.0, 5.0)
    scheduler = schedule.to_diffusers()
    scheduler.set_timesteps(10)
    ours = torch.stack([level.sigma for level in schedule.levels(10)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-5, atol=0)


def test_what_diffusers_has_no_name_for_is_refused():
    with pytest.raises(ValueError, match="target 'flow': their chains know eps, x0, v"):
        to_diffusers(md.Cosine(), "flow")
    with pytest.raises(ValueError, match="target 'v': an EDM scheduler"):
        to_diffusers(md.Karras(), "v")
    with pytest.raises(ValueError, match="has no betas"):
        to_diffusers(md.Shifted(md.Karras(), 2.0))
    twice = md.Shifted(md.Shifted(md.Flow(), 2.0), 3.0)
    assert to_diffusers(twice).config.shift == 6
    with pytest.raises(ValueError, match="target 'x0': a flow scheduler means velocities"):
        to_diffusers(md.Flow(), "x0")


# --- and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_a_schedule_survives_the_round_trip(name, unet):
    back = from_diffusers(unet, SCHEDULES[name].to_diffusers("v"))
    t = torch.linspace(0, 0.998, 499, dtype=torch.float64)
    torch.testing.assert_close(
        back.schedule(t).alpha, SCHEDULES[name](t).alpha, rtol=1e-3, atol=1e-5
    )
    assert back.target == "v"


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@torch.no_grad()
def test_our_ddim_walks_as_theirs(n, prediction, unet):
    """Their scheduler drives the network in the way their pipelines do. They find the next timestep by
    subtracting 1000 // n, so only where n divides 1000 do they walk along their own timesteps."""
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type=prediction, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(n)
    model = from_diffusers(unet, scheduler)
    levels = model.schedule.levels(n, "trailing")
    theirs = start()
    for t, state in zip(scheduler.timesteps, md.ddim(model.denoise, start(), levels), strict=True):
        if t >= 1000 // n:  # their last step does not end at clean data
            theirs = scheduler.step(unet(theirs, t).sample, t, theirs).prev_sample
            torch.testing.assert_close(state.x.float(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [1, 7, 13, 20, 50])
@torch.no_grad()
def test_our_dpmpp_walks_as_theirs(n, unet):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_type="midpoint", final_sigmas_type="zero"
    )
    model = from_diffusers(unet, scheduler)
    levels = model.schedule.levels(n, "trailing")
    scheduler.set_timesteps(timesteps=[round(level.t.item() * 1000) - 1 for level in levels[:-1]])
    theirs = start()
    for t, state in zip(
        scheduler.timesteps, md.dpmpp_2m(model.denoise, start(), levels), strict=True
    ):
        theirs = scheduler.step(unet(theirs, t).sample, t, theirs).prev_sample
        torch.testing.assert_close(state.x.float(), theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [1, 7, 13, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_our_flow_walks_as_theirs(n, shift, unet):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, n + 1)[:-1])
    model = from_diffusers(unet, scheduler)
    assert model.target == "flow"
    theirs = start()
    states = md.ddim(model.denoise, start(), model.schedule.levels(n))
    for t, state in zip(scheduler.timesteps, states, strict=True):
        theirs = scheduler.step(unet(theirs, t).sample, t, theirs).prev_sample
        torch.testing.assert_close(state.x.float(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 7, 13, 20, 50])
@torch.no_grad()
def test_our_edm_walks_as_theirs(n, unet):
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(n)
    model = from_diffusers(unet, scheduler)
    theirs = 80 * start()
    states = md.ddim(model.denoise, 80 * start(), model.schedule.levels(n))
    for t, state in zip(scheduler.timesteps, states, strict=True):
        out = unet(scheduler.scale_model_input(theirs, t), t).sample
        theirs = scheduler.step(out, t, theirs).prev_sample
        torch.testing.assert_close(state.x.float(), theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_transformer_with_classes_and_learned_variance():
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    model = from_diffusers(net, DDPMScheduler())
    level = model.schedule(0.5)
    classes = torch.tensor([1, 2, 3])
    x_t = start().double()
    found = model.denoise(x_t, level, classes)
    timesteps = torch.full((3,), 499)
    eps = net(start(), timestep=timesteps, class_labels=classes).sample[:, :2]
    torch.testing.assert_close(found.eps.float(), eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(level.alpha * found.x0 + level.sigma * found.eps, x_t)
    other = model.denoise(x_t, level, {"class_labels": classes.flip(0)})
    assert not torch.allclose(other.eps, found.eps)


@torch.no_grad()
def test_a_text_model_with_our_guidance():
    """Text states in, guided samples out; the mask of a Condition reaches their attention."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=16,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4, attention_head_dim=4,
    ).eval()  # fmt: skip
    model = from_diffusers(net, EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    tokens, empty = torch.randn(2, 1, 5, 16)
    level, x_t = model.schedule(0.7), start(4).double()
    plain, other = (model.denoise(x_t, level, c.expand(3, -1, -1)) for c in (tokens, empty))
    guided = md.guide(
        model.denoise, tokens.expand(3, -1, -1), scale=2.5, negative=empty.expand(3, -1, -1)
    )
    torch.testing.assert_close(
        guided(x_t, level).eps, other.eps + 2.5 * (plain.eps - other.eps), rtol=1e-5, atol=1e-5
    )
    one = md.guide(model.denoise, tokens, scale=2.5, negative=empty)  # one condition serves all
    torch.testing.assert_close(one(x_t, level).eps, guided(x_t, level).eps)
    x0 = md.sample(md.dpmpp_2m(guided, x_t, model.schedule.levels(4)))
    assert x0.isfinite().all()
    mask = torch.tensor([[True, True, False, False, False]]).expand(3, -1)
    pooled = torch.zeros(3, 16)
    masked = model.denoise(x_t, level, md.Condition(tokens.expand(3, -1, -1), mask, pooled))
    short = model.denoise(x_t, level, tokens[:, :2].expand(3, -1, -1))
    torch.testing.assert_close(masked.eps, short.eps, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_read_is_refused(unet):
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type 'noise'"):
        from_diffusers(unet, scheduler)
    with pytest.raises(ValueError, match=r"sigma_data 1: only 'epsilon' and 0.5"):
        from_diffusers(unet, EDMEulerScheduler(sigma_data=1.0))
    with pytest.raises(ValueError, match="shifts by image size"):
        from_diffusers(unet, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
