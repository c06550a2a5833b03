"""The check-up names each planted fault, and is silent on healthy models."""

import copy
import math
import re
import sys

import pytest
import torch
from torch import Tensor, nn

import minidiff as md
from minidiff.critters import Critters
from minidiff.doctor import Report, doctor
from minidiff.exact import GaussianMixture

MEANS = torch.tensor([[-1.0, -0.5], [1.0, 0.5]])
ORACLE = GaussianMixture(MEANS, 0.15)


def names(report: Report) -> set[str]:
    return {finding.name for finding in report.findings}


def points(n: int = 512) -> tuple[Tensor, list[str]]:
    """Samples of the mixture, and which of the two blobs each comes from."""
    which = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(1))
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(2))
    return MEANS[which] + 0.15 * noise, [("left", "right")[k] for k in which.tolist()]


def trained(
    schedule: md.Schedule, target: str = "v", captions: bool = False, shuffle: bool = False
) -> md.Diffusion:
    torch.manual_seed(0)
    text = md.TextEncoder.from_captions(["left", "right"], dim=32, layers=1) if captions else None
    net = md.MLP(2, width=64, condition_dim=text.dim if text else None)
    model = md.Diffusion(net, schedule, target, text)
    x0, told = points(4096)
    if shuffle:
        told = [told[i] for i in torch.randperm(4096).tolist()]
    batches = [
        (x0[i : i + 256], told[i : i + 256]) if captions else x0[i : i + 256] for i in range(0, 4096, 256)
    ]
    for step in md.train(model, batches, 500, lr=3e-3, ema_decay=0.99):
        pass
    return copy.deepcopy(step.ema).cpu()  # training chose the device, the tests have the CPU's


@pytest.fixture(scope="module")
def healthy() -> md.Diffusion:
    return trained(md.Cosine())


@pytest.fixture(scope="module")
def healthy_with_text() -> md.Diffusion:
    return trained(md.Flow(), "flow", captions=True)


# --- healthy ---------------------------------------------------------------------------------------


def test_a_healthy_model_of_points(healthy):
    report = doctor(healthy, points()[0], oracle=ORACLE, guide=md.guide, raw=copy.deepcopy(healthy))
    assert str(report).endswith("nothing is wrong"), str(report)
    assert report.learned > 0.9
    assert not any(math.isnan(e.model) for e in report.levels)
    without = doctor(healthy, points()[0])  # the floor is then that of the samples themselves
    assert not without.findings
    assert all(e.floor <= 1.02 * o.floor for e, o in zip(without.levels, report.levels, strict=True))


def test_a_healthy_model_with_text(healthy_with_text):
    report = doctor(healthy_with_text, *points(), oracle=ORACLE)
    assert not report.findings, str(report)


def test_the_shipped_model():
    data = Critters(96, 64, "train", seed=5)
    x0 = data.render().images.float() / 127.5 - 1
    model = md.Diffusion.from_pretrained("critters")
    report = doctor(model, x0, data.captions())
    assert not report.findings, str(report)
    assert report.learned > 0.5


def test_the_errors_are_those_of_the_definitions(healthy):
    """At t = 1 nothing can be known: trivial guess and floor both err by the variance."""
    x0 = points(4096)[0]
    last = doctor(healthy, x0, oracle=ORACLE).levels[-1]
    assert last.t == 1
    assert last.trivial == pytest.approx(x0.var(0).mean().item(), rel=1e-3)
    assert last.floor == pytest.approx(last.trivial, rel=1e-2)
    assert math.isnan(last.learned)


# --- sick: the model -------------------------------------------------------------------------------


def test_a_chain_cut_short():
    report = doctor(md.Diffusion(md.MLP(2), md.Linear(steps=200), "v"))
    assert "terminal snr" in names(report)
    assert "alpha is 0.36" in str(report)


def test_eps_at_pure_noise():
    assert "target" in names(doctor(md.Diffusion(md.MLP(2), md.Cosine(), "eps")))


def test_a_schedule_that_turns_back():
    class Bump(md.Schedule):
        def coefficients(self, t):
            u = t + 0.3 * (2 * math.pi * t).sin()
            return (u * math.pi / 2).cos().clamp(min=0), (u * math.pi / 2).sin()

    assert "schedule" in names(doctor(md.Diffusion(md.MLP(2), Bump(), "v")))


def test_nan_in_the_weights(healthy):
    sick = copy.deepcopy(healthy)
    sick.net.last.bias.data[1] = torch.nan
    report = doctor(sick, points()[0])
    assert names(report) == {"weights"}
    assert "net.last.bias holds 1 values" in str(report)


class Fragile(nn.Module):
    """A network that divides by the distance of some number from 1: in bfloat16 that distance is 0."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net, self.near_one = net, nn.Linear(1, 1)
        nn.init.constant_(self.near_one.weight, 0.9995)
        nn.init.zeros_(self.near_one.bias)

    def forward(self, x, t, condition=None):
        return self.net(x, t, condition) * 0.0005 / (1 - self.near_one(torch.ones(1)))


def test_nan_in_bfloat16(healthy):
    sick = md.Diffusion(Fragile(copy.deepcopy(healthy.net)), md.Cosine(), "v")
    report = doctor(sick, points()[0])
    assert names(report) == {"nan"}
    assert "in bfloat16 the output is not finite" in str(report)


def test_dropout_left_on(healthy):
    class Dropped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.dropout = net, nn.Dropout(0.2)

        def forward(self, x, t, condition=None):
            return self.net(self.dropout(x), t, condition)

    sick = md.Diffusion(Dropped(copy.deepcopy(healthy.net)), md.Cosine(), "v")
    assert "train mode" in names(doctor(sick.train(), points()[0]))
    assert "train mode" not in names(doctor(sick.eval(), points()[0]))


def test_a_network_that_never_learned():
    torch.manual_seed(0)
    assert names(doctor(md.Diffusion(md.MLP(2), md.Cosine(), "v"), points()[0])) == {"not learned"}


def test_the_wrong_target(healthy):
    report = doctor(md.Diffusion(healthy.net, md.Cosine(), "x0"), points()[0])
    assert "not learned" in names(report)


def test_the_time_is_not_passed_on(healthy):
    class Timeless(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t, condition=None):
            return self.net(x, t * 0 + 0.5, condition)

    assert "time" in names(doctor(md.Diffusion(Timeless(healthy.net), md.Cosine(), "v"), points()[0]))


def test_high_times_never_trained(monkeypatch):
    module = sys.modules["minidiff.loss"]  # its name in the package is the function's
    plain = module.stratified_times
    monkeypatch.setattr(module, "stratified_times", lambda *args: 0.7 * plain(*args))
    report = doctor(trained(md.Cosine(), "v"), points()[0], oracle=ORACLE)
    assert "t coverage" in names(report)
    assert "The high end is missing" in str(report)


def test_an_average_that_lags(healthy):
    """EMA with decay 0.9999 and no warm-up after 500 steps: 95 % of it is still the first weights."""
    torch.manual_seed(0)
    averaged = md.Diffusion(md.MLP(2, width=64), md.Cosine(), "v")
    for slow, fast in zip(averaged.parameters(), healthy.parameters(), strict=True):
        slow.data.lerp_(fast.data, 1 - 0.9999**500)
    report = doctor(averaged, points()[0], raw=healthy)
    assert "ema" in names(report)


# --- sick: data and condition ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil,what",
    [
        (lambda x: (x + 1) / 2, r"lie in \[0"),
        (lambda x: (x - x.mean()) / x.std() * 2, "samples are clipped"),
        (lambda x: (x * 127.5 + 127.5).to(torch.uint8), "torch.uint8"),
        (lambda x: x * 0, "all values are 0"),
    ],
)
def test_images_in_the_wrong_range(spoil, what):
    x0 = spoil(Critters(32, 32, "train").render().images.float() / 127.5 - 1)
    model = md.Diffusion(md.UNet(width=32, multipliers=(1, 1), attention=()), md.Cosine(), "v")
    found = [f for f in doctor(model, x0).findings if f.name in ("data range", "data")]
    assert len(found) == 1
    assert re.search(what, found[0].what)


def test_nan_in_the_data(healthy):
    x0 = points()[0]
    x0[3, 1] = torch.nan
    assert names(doctor(healthy, x0)) == {"data"}


def test_captions_of_other_samples():
    report = doctor(trained(md.Flow(), "flow", captions=True, shuffle=True), *points())
    assert names(report) == {"condition uninformative"}


def test_a_condition_that_is_not_heard(healthy_with_text):
    sick = copy.deepcopy(healthy_with_text)
    nn.init.zeros_(sick.net.embedding.pooled.weight)
    assert "condition ignored" in names(doctor(sick, *points()))


def test_another_guidance_convention():
    def papers(denoise, condition, w):
        return md.guide(denoise, condition, 1 + w)

    def reversed_(denoise, condition, scale):
        return md.guide(denoise, None, scale, negative=condition)

    for wrong, advice in ((papers, "pass scale - 1"), (reversed_, "none + scale")):
        report = doctor(md.Diffusion(md.MLP(2), md.Cosine(), "v"), points()[0], guide=wrong)
        assert "guidance" in names(report)
        assert advice in str(report)


def test_bad_input_is_named(healthy_with_text):
    x0, told = points()
    with pytest.raises(ValueError, match="x0 holds 1 samples"):
        doctor(healthy_with_text, x0[:1])
    with pytest.raises(ValueError, match="3 conditions for 512 samples"):
        doctor(healthy_with_text, x0, told[:3])
