import pytest
import scipy.stats
import torch
from helpers import SCHEDULES, VARIANCE_PRESERVING
from runs import Guess, data, generator, words
from torch import Tensor, nn

import minidiff as md
from minidiff.loss import WEIGHTINGS, stratified_times

CPU = torch.device("cpu")


# --- times -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 128])
def test_times_fall_one_in_each_nth_of_the_interval(n):
    for seed in range(20):
        t = stratified_times(n, generator(seed), CPU).sort().values
        assert ((t > torch.arange(n) / n) & (t <= torch.arange(1, n + 1) / n)).all()
        torch.testing.assert_close(t.diff(), torch.full((n - 1,), 1 / n, dtype=torch.float64))


def test_every_place_in_the_batch_gets_every_time():
    """The loss needs t independent of x0. Were stratum i always given to sample i, a list of batches
    used again and again would show each picture at its own few times only."""
    times = torch.stack([stratified_times(8, generator(seed), CPU) for seed in range(500)])
    for place in range(8):
        assert scipy.stats.kstest(times[:, place], "uniform").pvalue > 1e-4
    correlation = torch.corrcoef(times[:, :2].T)[0, 1]
    assert abs(correlation + 1 / 7) < 0.15  # two different strata: slightly negative, never one


def test_times_come_close_to_noise_and_never_reach_clean_data():
    times = torch.cat([stratified_times(64, generator(seed), CPU) for seed in range(200)])
    assert times.max() > 0.9998
    assert 0 < times.min() < 0.0002


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_the_simple_loss_is_the_mean_squared_error(name, target):
    """E ||target - net||², with eps found back from what the network was shown: Ho et al. 2020, eq. 14."""
    x0 = data(16, 2, 3)
    model = Guess(SCHEDULES[name], target)
    found = md.loss(model, x0, generator=generator())
    total = 0.0
    for i in range(16):
        alpha, sigma = model.level.alpha[i], model.level.sigma[i]
        eps = (model.x_t[i] - alpha * x0[i]) / sigma
        guessed_eps = (model.x_t[i] - alpha * model.x0[i]) / sigma
        p, q = {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, alpha), "flow": (-1, 1)}[target]
        error = p * x0[i] + q * eps - (p * model.x0[i] + q * guessed_eps)
        total += (error**2).sum().item()
    assert found.shape == ()
    assert found.item() == pytest.approx(total / x0.numel(), rel=1e-5)


def test_the_noise_in_the_loss_is_standard_normal():
    x0 = data(5000, 8)
    model = Guess(md.Cosine())
    md.loss(model, x0, generator=generator())
    eps = (model.x_t - model.level.alpha[:, None] * x0) / model.level.sigma[:, None]
    assert scipy.stats.kstest(eps.flatten(), "norm").pvalue > 1e-3
    each = torch.corrcoef(eps.T) - torch.eye(8)
    assert each.abs().max() < 5 / 5000**0.5  # independent between elements
    assert abs(torch.corrcoef(torch.stack([eps[:, 0], model.level.t]))[0, 1]) < 5 / 5000**0.5


def test_the_generator_decides_the_loss():
    model, x0 = md.Diffusion(md.MLP(3), md.Cosine()), data().float()
    nn.init.normal_(model.net.last.weight)
    losses = [md.loss(model, x0, generator=generator(seed)).item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("weighting", [name for name, weigh in WEIGHTINGS.items() if weigh])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_weighting_means_the_same_for_every_target(weighting, name):
    """w(level) counts squared errors of x0; the same guess has the same loss in every parametrisation."""
    x0, losses = data(), {}
    for target in ("eps", "x0", "v", "flow", "edm"):
        model = Guess(SCHEDULES[name], target)
        losses[target] = md.loss(model, x0, weighting=weighting, generator=generator()).item()
    weight = WEIGHTINGS[weighting](model.level)
    direct = (weight[:, None] * (model.x0 - x0) ** 2).mean().item()
    for target in losses:
        assert losses[target] == pytest.approx(direct, rel=2e-4), target


def weights(schedule: md.Schedule, target: str, weighting: object) -> tuple[Tensor, md.NoiseLevel]:
    """The factor of the squared error of the output: the loss of a network that is wrong by 1."""
    found, levels = [], []
    for seed in range(40):
        x0 = torch.zeros(1, 2, dtype=torch.float64)
        model = Guess(schedule, target, guess=torch.zeros_like, offset=1.0)
        found.append(md.loss(model, x0, weighting=weighting, generator=generator(seed)))  # type: ignore[arg-type]
        levels.append(model.level)
    return torch.stack(found), md.NoiseLevel(*(torch.cat(part) for part in zip(*levels, strict=True)))


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize(
    "target,formula",
    [
        ("eps", lambda snr: snr.clamp(max=5) / snr),  # Hang et al. 2023, section 3.4
        ("v", lambda snr: snr.clamp(max=5) / (snr + 1)),  # its appendix
        ("x0", lambda snr: snr.clamp(max=5)),
    ],
)
def test_min_snr_is_the_formula_of_the_paper(name, target, formula):
    found, level = weights(SCHEDULES[name], target, "min_snr")
    snr = (level.alpha / level.sigma) ** 2
    assert (snr > 5).any()
    assert (snr < 5).any()
    torch.testing.assert_close(found.double(), formula(snr), rtol=1e-4, atol=0)


def test_min_snr_of_the_flow_velocity():
    """x0 = x_t - t * velocity, so an error of 1 in the velocity is one of t in x0."""
    found, level = weights(md.Flow(), "flow", "min_snr")
    expected = level.t**2 * ((1 - level.t) / level.t).square().clamp(max=5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("target,weighting", [("eps", "snr"), ("v", lambda level: level.snr + 1)])
def test_plain_errors_of_eps_and_v_are_weighted_errors_of_x0(name, target, weighting):
    """Salimans & Ho 2022, section 4: SNR for eps, SNR + 1 for v."""
    found, _ = weights(SCHEDULES[name], target, weighting)
    torch.testing.assert_close(found.double(), torch.ones(len(found)).double(), rtol=1e-4, atol=0)


def test_snr_plus_one_is_capped():
    found, level = weights(md.Cosine(), "x0", "snr_plus_one")
    torch.testing.assert_close(found.double(), (1 / level.sigma**2).clamp(max=50), rtol=1e-4, atol=0)


def test_unknown_weighting_is_named():
    with pytest.raises(
        ValueError, match="unknown weighting 'p2': choose one of simple, uniform, snr, min_snr"
    ):
        md.loss(Guess(md.Cosine()), data(), weighting="p2")


# --- condition dropout -----------------------------------------------------------------------------


def test_conditions_are_dropped_sample_by_sample():
    model, x0 = Guess(md.Cosine()), data(4000)
    md.loss(model, x0, words(4000), condition_dropout=0.1, generator=generator())
    drop = ~model.condition.mask[:, 0]
    assert torch.equal(drop, model.condition.pooled[:, 0] == 0)
    count = int(drop.sum())  # binomial: 400 ± 19
    assert abs(count - 400) < 5 * 19
    # Independent of each other and of t: neighbours are dropped together no more than by chance.
    pairs = int((drop[1:] & drop[:-1]).sum())  # 40 ± 6.6
    assert abs(pairs - 40) < 5 * 6.6
    assert abs(torch.corrcoef(torch.stack([drop.double(), model.level.t]))[0, 1]) < 5 / 4000**0.5


@pytest.mark.parametrize("chance,dropped", [(0.0, 0), (1.0, 64)])
def test_no_dropout_and_full_dropout(chance, dropped):
    model = Guess(md.Cosine())
    md.loss(model, data(), words(64), condition_dropout=chance, generator=generator())
    assert int((~model.condition.mask).sum()) == dropped


@pytest.mark.parametrize("chance", [-0.1, 1.5])
def test_dropout_is_a_chance(chance):
    with pytest.raises(ValueError, match=rf"condition_dropout = {chance}"):
        md.loss(Guess(md.Cosine()), data(), condition_dropout=chance)


def test_dropped_captions_are_unseen():
    """With dropout 1 the loss is that of no condition; without, the captions change it."""
    text = md.TextEncoder.from_captions(["a cat", "a dog"], dim=32, layers=1)
    model = md.Diffusion(md.MLP(3, 32, condition_dim=32), md.Cosine(), encoder=text)
    nn.init.normal_(model.net.last.weight)
    x0, captions = data(2).float(), ["a cat", "a dog"]
    without = md.loss(model, x0, None, generator=generator())
    dropped = md.loss(model, x0, captions, condition_dropout=1.0, generator=generator())
    told = md.loss(model, x0, captions, generator=generator())
    torch.testing.assert_close(dropped, without)
    assert abs(told - without) > 1e-4


def test_edm_weighting_is_the_papers_lambda():
    """Karras et al. 2022, table 1: lambda = (sigma² + sigma_data²) / (sigma sigma_data)², and with the
    target "edm" it is the plain squared error of the output."""
    level = md.Karras()(torch.linspace(0, 1, 9, dtype=torch.float64))
    wanted = (level.sigma**2 + 0.25) / (level.sigma * 0.5) ** 2
    torch.testing.assert_close(WEIGHTINGS["edm"](level), wanted)
    found, _ = weights(md.Cosine(), "edm", "edm")
    torch.testing.assert_close(found.double(), torch.ones(len(found)).double(), rtol=1e-4, atol=0)


def test_sigmoid_weighting_of_eps():
    """Kingma & Gao 2023: the squared error of eps counts sigmoid(2 - log SNR)."""
    found, level = weights(md.Cosine(), "eps", "sigmoid")
    wanted = 1 / (1 + (level.log_snr - 2).exp())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_uniform_weighting_is_the_error_of_x0():
    found, _ = weights(md.Cosine(), "x0", "uniform")
    torch.testing.assert_close(found, torch.ones_like(found))
