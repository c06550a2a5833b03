"""Out to diffusers and back: the same numbers, with their real classes, small and untrained."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
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
from minidiff.interop import DiffusersModel, from_diffusers

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
    scheduler = schedule.to_diffusers("flow")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 11)[:-1])
    ours = torch.stack([level.sigma for level in schedule.levels(10)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


def test_karras_keeps_its_levels():
    schedule = md.Karras(0.01, 20.0, 5.0)
    scheduler = schedule.to_diffusers("edm")
    scheduler.set_timesteps(10)
    ours = torch.stack([level.sigma for level in schedule.levels(10)])
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-5, atol=0)


def test_what_diffusers_has_no_name_for_is_refused():
    with pytest.raises(ValueError, match=r"target 'flow' with Cosine.*: their chains know eps, x0, v"):
        md.Cosine().to_diffusers("flow")
    with pytest.raises(ValueError, match=r"target 'v' with Karras.*: their scheduler means 'edm'"):
        md.Karras().to_diffusers("v")
    with pytest.raises(ValueError, match="has no betas"):
        md.Shifted(md.Karras(), 2.0).to_diffusers("eps")
    twice = md.Shifted(md.Shifted(md.Flow(), 2.0), 3.0)
    assert twice.to_diffusers("flow").config.shift == 6
    with pytest.raises(ValueError, match=r"target 'x0' with Flow\(\): their scheduler means 'flow'"):
        md.Flow().to_diffusers("x0")


class Oracle(torch.nn.Module):
    """The best network for a Gaussian of standard deviation 0.4, whatever its target."""

    def __init__(self, schedule, target):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.oracle = md.exact.GaussianMixture(torch.zeros(1, 2 * 64), 0.4)
        self.schedule, self.target = schedule, target

    def forward(self, x, t, condition=None):
        level = self.schedule(t.double())
        std = 0.5 if self.target == "edm" else 1.0
        scale = (level.alpha**2 * std**2 + level.sigma**2).sqrt()
        x_t = x.double().flatten(1) * scale[:, None]  # undoes the model's c_in
        x0, eps = self.oracle.denoise(x_t, level)
        return md.to_target(x0, eps, level, self.target).reshape(x.shape).to(x) + self.anchor


EXPORTED = [
    (md.Linear(), "eps"), (md.Linear(), "v"), (md.Cosine(), "x0"), (md.Cosine(), "v"), (md.Flow(), "flow"),
    (md.Shifted(md.Flow(), 3.0), "flow"), (md.Karras(), "edm"),
]  # fmt: skip


@pytest.mark.parametrize("schedule,target", EXPORTED, ids=str)
@torch.no_grad()
def test_our_model_answers_their_scheduler(schedule, target):
    """Their loop on our network ends where ours does: at the Gaussian that it is the best network for."""
    model = md.Diffusion(Oracle(schedule, target), schedule, target, shape=(2, 8, 8))
    unet, scheduler = model.to_diffusers()
    # With fewer steps DDPM's smaller variance shows.
    scheduler.set_timesteps(1000 if isinstance(scheduler, DDPMScheduler) else 100)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, 8, 8, generator=generator)
    if target == "edm":
        x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        step = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        x = scheduler.step(unet(scaled, t).sample, t, x, **step).prev_sample
    assert x.std().item() == pytest.approx(0.4, abs=0.02)
    assert abs(x.mean().item()) < 0.02


@pytest.mark.parametrize("schedule,target", EXPORTED[:4], ids=str)
@pytest.mark.parametrize("t", [10, 100, 500])
@torch.no_grad()
def test_our_model_is_asked_at_the_level_of_their_timestep(schedule, target, t):
    """The level is read off their own table; one step beside it the guess of x0 is another."""
    model = md.Diffusion(Oracle(schedule, target), schedule, target, shape=(2, 8, 8))
    unet, scheduler = model.to_diffusers()
    alpha_bar = scheduler.alphas_cumprod[t].double()
    level = md.NoiseLevel(torch.tensor(t / 1000.0), alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    x = start()
    theirs = scheduler.step(unet(x, t).sample, t, x).pred_original_sample
    exact = model.net.oracle.denoise(x.flatten(1).double(), level).x0.reshape(x.shape)
    torch.testing.assert_close(theirs.double(), exact, rtol=2e-3, atol=2e-4)


def test_a_pipeline_around_one_of_our_networks():
    """It runs as it is, and takes the network as predicting v."""
    torch.manual_seed(0)
    net = md.UNet(2, 32, (1,), patch=2, attention=())
    model = md.Diffusion(net, md.Cosine(), "v", shape=(2, 8, 8)).eval()
    pipe = DDPMPipeline(*model.to_diffusers())
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(batch_size=3, num_inference_steps=5, output_type="np").images
    assert drawn.shape == (3, 8, 8, 2)
    with pytest.raises(ValueError, match=r"does not say the shape of its images"):
        md.Diffusion(net, md.Cosine(), "v").to_diffusers()


def test_one_of_their_networks_learns_here(unet):
    """Fine-tuned by md.train, examined by the doctor, saved and loaded, with its weights changed."""
    torch.manual_seed(0)
    net = UNet2DModel.from_config(unet.config)
    model = from_diffusers(net, DDPMScheduler(prediction_type="v_prediction"))
    assert model.shape == (2, 8, 8)
    pictures = torch.rand(16, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(16, 2, 8, 8) - 0.5
    before = md.doctor(model, pictures)
    losses = [step.loss for step in md.train(model, [pictures], 150, lr=2e-3, ema_decay=0.9)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    after = md.doctor(model, pictures)
    assert after.learned > before.learned + 3  # from far beyond a linear guess


def test_a_fine_tuned_network_is_saved_and_loaded(unet, tmp_path):
    model = from_diffusers(unet, DDPMScheduler(prediction_type="v_prediction"))
    model.save_pretrained(tmp_path)
    again = DiffusersModel.from_pretrained(tmp_path, net=UNet2DModel.from_config(unet.config))
    x_t, level = start(), model.schedule(0.4)
    with torch.no_grad():
        torch.testing.assert_close(again.denoise(x_t, level).x0, model.denoise(x_t, level).x0)
    with pytest.raises(ValueError, match="holds a DiffusersModel: load it with DiffusersModel.from_"):
        md.Diffusion.from_pretrained(tmp_path, net=unet)
    with pytest.raises(ValueError, match=r"saved with a network of your own, .*UNet2DModel: give"):
        DiffusersModel.from_pretrained(tmp_path)


def test_class_labels_train_a_network_of_theirs():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        num_class_embeds=3,
    )  # fmt: skip
    model = from_diffusers(net, DDPMScheduler())
    batches = [(torch.rand(4, 1, 8, 8) - 0.5, torch.tensor([0, 1, 2, 2]))]
    with pytest.raises(ValueError, match=r"of type Tensor cannot be withheld: .*condition_dropout=0"):
        next(md.train(model, batches, 1))
    table = net.class_embedding.weight
    before = table.detach().clone()
    for _ in md.train(model, batches, 2, condition_dropout=0.0):
        pass
    assert (table.detach() - before).abs().amax(1).gt(0).all()


# --- and back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_a_schedule_survives_the_round_trip(name, unet):
    back = from_diffusers(unet, SCHEDULES[name].to_diffusers("v"))
    t = torch.linspace(0, 0.998, 499, dtype=torch.float64)
    torch.testing.assert_close(back.schedule(t).alpha, SCHEDULES[name](t).alpha, rtol=1e-3, atol=1e-5)
    assert back.target == "v"


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@torch.no_grad()
def test_our_ddim_walks_as_theirs(n, prediction, unet):
    """Their scheduler drives the network in the way their pipelines do. They find the next timestep by
    subtracting 1000 // n, so only where n divides 1000 do they walk along their own timesteps."""
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction, timestep_spacing="trailing")
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
    for t, state in zip(scheduler.timesteps, md.dpmpp_2m(model.denoise, start(), levels), strict=True):
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
    guided = md.guide(model.denoise, tokens.expand(3, -1, -1), scale=2.5, negative=empty.expand(3, -1, -1))
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
