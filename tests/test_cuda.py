"""The same code on a GPU. Skipped where there is none; nothing here is needed to use the library."""

import copy
import warnings

import pytest
import torch

import minidiff as md
from minidiff.critters import Critters, vocabulary
from minidiff.data import Batches
from minidiff.exact import GaussianMixture
from minidiff.likelihood import flow_log_likelihood, variational_bound

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
PROMPTS = ["a cat in a top hat", "a frog in a beanie"]


def test_training_chooses_the_gpu_and_its_model_comes_back():
    data = Critters(64, 32, "train")
    text = md.TextEncoder.from_captions(data.captions())
    net = md.UNet(patch=2, condition_dim=text.dim)
    model = md.Diffusion(net, md.Cosine(), "x0", text, (3, 32, 32))
    images = data.render().images.float() / 127.5 - 1
    for step in md.train(model, [(images, data.captions())], 3):
        assert step.loss > 0
    assert step.ema.device.type == model.device.type == "cuda"
    drawn = md.TextToImage(step.ema)(PROMPTS, steps=3).tensors
    assert drawn.shape == (2, 3, 32, 32)
    assert drawn.device.type == "cpu"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun", "dpmpp_2m", "unipc"])
def test_a_seed_means_the_same_on_both(sampler):
    """Noise is drawn on the CPU, so a GPU draws the same picture up to its rounding."""
    drawn = [
        md.TextToImage.from_pretrained("critters", device)(PROMPTS, steps=8, sampler=sampler, seed=3).tensors
        for device in ("cpu", "cuda")
    ]
    assert (drawn[0] - drawn[1]).abs().mean() < 0.02


def test_a_denoiser_answers_where_the_question_is():
    model = md.Diffusion.from_pretrained("critters", "cuda")
    level, x_t = model.schedule(0.5), torch.randn(2, 3, 64, 64)
    for x in (x_t, x_t.cuda(), x_t.double()):
        x0, eps = model.denoise(x, level, model.encode(PROMPTS))
        assert x0.device == eps.device == x.device
        assert x0.dtype == x.dtype


def test_oracles_bounds_and_doctor_on_the_gpu():
    oracle = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], device="cuda"), 0.3)
    x0 = oracle.sample(300)
    assert x0.device.type == "cuda"
    levels = md.Cosine().levels(20, "log_snr")
    assert variational_bound(oracle.denoise, x0, levels).total.isfinite().all()
    assert flow_log_likelihood(oracle.denoise, x0[:4], levels).isfinite().all()
    x = md.noise((300, 2), levels[0], device="cuda")
    assert md.metrics.energy_test(md.sample(md.heun(oracle.denoise, x, levels)), x0) > 1e-3
    model = md.Diffusion(md.MLP(2), md.Cosine(), "v").cuda()
    report = md.doctor(model, x0, oracle=oracle, raw=copy.deepcopy(model))
    assert [finding.name for finding in report.findings] == ["not learned"]


@pytest.mark.parametrize("frozen", [True, False])
def test_a_recorded_run_learns_what_the_plain_one_learns(frozen, monkeypatch):
    """One graph for all batches, though their captions differ in length; the losses agree to rounding."""
    data = Critters(64, 32)
    images = data.images()
    text = md.TextEncoder.from_captions([*vocabulary(), ","], dim=32, layers=1)
    text.frozen = frozen

    def losses() -> list[float]:
        torch.manual_seed(0)
        encoder = copy.deepcopy(text)
        net = md.UNet(width=32, patch=2, multipliers=(1, 1), attention=(1,), condition_dim=32, positions=True)
        model = md.Diffusion(net, md.Cosine(), "x0", encoder, (3, 32, 32))
        batches = Batches(images.cuda(), data.caption, 16)
        return [step.loss for step in md.train(model, batches, 12, precision="fp32", warmup=0)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it could be recorded
        recorded = losses()
    monkeypatch.setattr("minidiff.training.Graphed", lambda step: step)
    assert recorded == pytest.approx(losses(), rel=0.02)
    assert recorded[-1] < recorded[0]


def test_a_network_that_cannot_be_recorded_is_trained_as_it_is():
    class Waits(md.MLP):
        def forward(self, x, t, condition=None):
            return super().forward(x, t, condition) * float(x.mean() < 1e9)  # asks the device

    model = md.Diffusion(Waits(2), md.Cosine(), "v")
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert len([step.loss for step in md.train(model, [torch.randn(32, 2)], 8)]) == 8
