"""What holds for all inputs, tried on many that chance picks.

Each property is exact, or exact up to rounding. The search is the same in every run, so a failure stays one.
"""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SCHEDULES, VARIANCE_PRESERVING, from_x0, gaussian, point_mass
from PIL import Image

import minidiff as md
from minidiff.data import captioned_folder
from minidiff.sampling import SAMPLERS, generators

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


def tried(number: int):
    """So many examples, the same in each run, each in any time: machines are slow now and then."""
    few = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow]
    return hypothesis.settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=few
    )


schedules = st.sampled_from(sorted(SCHEDULES))
times = st.floats(0, 1)
inside = st.floats(0.01, 0.99)  # where neither data nor noise are all there is
seeds = st.integers(0, 2**62)
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)  # of a sample, without the batch
spacings = st.sampled_from(["uniform", "trailing", "log_snr", "karras"])


def level_at(name: str, t: float, dtype: torch.dtype) -> md.NoiseLevel:
    return SCHEDULES[name](torch.tensor(t, dtype=dtype))


def random_like(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- schedules -------------------------------------------------------------------------------------


@tried(100)
@hypothesis.given(name=schedules, s=times, t=times)
def test_noise_only_grows(name, s, t):
    first, second = (level_at(name, at, torch.float64) for at in sorted((s, t)))
    for level in (first, second):
        assert 0 <= level.alpha < math.inf
        assert 0 <= level.sigma < math.inf
    assert first.sigma * second.alpha <= second.sigma * first.alpha * (1 + 1e-9) + 1e-12
    if name in VARIANCE_PRESERVING:
        assert first.alpha**2 + first.sigma**2 == pytest.approx(1, rel=1e-9)


@tried(80)
@hypothesis.given(name=schedules, n=st.integers(1, 300), spacing=spacings)
def test_every_run_goes_from_noise_to_data(name, n, spacing):
    levels = SCHEDULES[name].levels(n, spacing)
    assert len(levels) == n + 1
    assert levels[-1].sigma == 0
    ratios = [float(level.sigma / level.alpha) if level.alpha > 0 else math.inf for level in levels]
    assert ratios == sorted(ratios, reverse=True)


@tried(100)
@hypothesis.given(name=schedules, t=inside)
def test_a_time_is_found_again_by_its_log_snr(name, t):
    schedule = SCHEDULES[name]
    level = level_at(name, t, torch.float64)
    log_snr = 2 * (level.alpha / level.sigma).log()
    again = schedule(schedule.time(log_snr))
    assert float(2 * (again.alpha / again.sigma).log()) == pytest.approx(float(log_snr), abs=1e-3, rel=1e-3)


# --- the forward process and the targets -----------------------------------------------------------


@tried(100)
@hypothesis.given(
    name=schedules, t=inside, dtype=dtypes, seed=seeds, shape=shapes, batch=st.integers(1, 3),
    target=st.sampled_from(["x0", "eps", "v", "flow", "edm"]),
)  # fmt: skip
def test_what_a_network_is_asked_for_says_what_was_there(name, t, dtype, seed, shape, batch, target):
    """To a target and back: the noisy sample and the target together give x0 and eps again."""
    level = level_at(name, t, dtype)
    x0, eps = (random_like((batch, *shape), dtype, seed + i) for i in range(2))
    try:
        asked = md.to_target(x0, eps, level, target)
    except ValueError:
        return  # a target that this path cannot have, with a line that says so
    found = md.from_target(asked, md.diffuse(x0, eps, level), level, target)
    rounding = 1e-9 if dtype == torch.float64 else 1e-2
    torch.testing.assert_close(found.x0, x0, rtol=rounding, atol=rounding * float(1 / level.alpha))
    torch.testing.assert_close(found.eps, eps, rtol=rounding, atol=rounding * float(1 / level.sigma))
    assert (found.x0.dtype, found.x0.shape) == (dtype, x0.shape)


@tried(80)
@hypothesis.given(name=schedules, times=st.tuples(inside, inside, inside), x0=st.floats(-3, 3))
def test_two_steps_are_one(name, times, x0):
    """From r to s and from s to t has the mean and the variance of from r to t."""
    r, s, t = (level_at(name, at, torch.float64) for at in sorted(times))
    x = torch.tensor([x0], dtype=torch.float64)
    half = md.transition(x, r, s)
    on, whole = md.transition(half.mean, s, t), md.transition(x, r, t)
    variance = (t.alpha / s.alpha * half.std) ** 2 + on.std**2
    torch.testing.assert_close(on.mean, whole.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance, whole.std**2, rtol=1e-6, atol=1e-10)


# --- samplers --------------------------------------------------------------------------------------


def run(name: str, denoise, x: torch.Tensor, levels: list[md.NoiseLevel], seed: int) -> torch.Tensor:
    extra = {"generator": torch.Generator().manual_seed(seed)} if name == "ddpm" else {}
    return md.sample(SAMPLERS[name](denoise, x, levels, **extra))


@tried(100)
@hypothesis.given(
    sampler=st.sampled_from(sorted(SAMPLERS)), name=schedules, n=st.integers(1, 30), spacing=spacings,
    dtype=dtypes, shape=shapes, seed=seeds, value=st.floats(-2, 2),
)  # fmt: skip
def test_a_sampler_that_is_told_the_answer_gives_it(sampler, name, n, spacing, dtype, shape, seed, value):
    """All data are one point: whatever the noise and the levels, the end is that point."""
    levels = SCHEDULES[name].levels(n, spacing)
    generator = torch.Generator().manual_seed(seed)
    x = md.noise((2, *shape), levels[0], generator=generator).to(dtype)
    found = run(sampler, point_mass(value), x, levels, seed)
    assert (found.shape, found.dtype) == (x.shape, torch.float64)  # the samplers' own precision
    torch.testing.assert_close(found, torch.full_like(found, value), rtol=1e-6, atol=1e-6)


@tried(60)
@hypothesis.given(
    sampler=st.sampled_from(["ddim", "heun", "dpmpp_2m", "adams"]), mean=st.floats(-1, 1),
    scale=st.floats(0.1, 4), seed=seeds, name=st.sampled_from(["vp", "cosine", "flow", "karras"]),
)  # fmt: skip
def test_paths_of_the_flow_do_not_cross(sampler, mean, scale, seed, name):
    """Two solutions of an ODE never meet: samples of one dimension keep the order of their noise."""
    levels = SCHEDULES[name].levels(20, "log_snr")
    x = random_like((8,), torch.float64, seed).sort().values * levels[0].sigma
    found = run(sampler, gaussian(mean, scale), x, levels, seed)
    assert torch.equal(found.sort().values, found)


@tried(60)
@hypothesis.given(
    sampler=st.sampled_from(sorted(SAMPLERS)), seed=seeds, n=st.integers(1, 12), batch=st.integers(1, 6)
)
def test_a_sample_does_not_depend_on_those_beside_it(sampler, seed, n, batch):
    """Sample i of a batch is what its own generator makes alone."""
    levels = md.Cosine().levels(n)

    def drawn(first: int, count: int) -> torch.Tensor:
        chance = generators(seed + first, count)
        x = md.noise((count, 3), levels[0], generator=chance)
        extra = {"generator": chance} if sampler == "ddpm" else {}
        return md.sample(SAMPLERS[sampler](gaussian(0.3, 0.7), x, levels, **extra))

    together = drawn(0, batch)
    alone = torch.cat([drawn(i, 1) for i in range(batch)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@tried(100)
@hypothesis.given(guidance=st.floats(-5, 20), t=inside, seed=seeds, shape=shapes)
def test_guidance_is_a_straight_line(guidance, t, seed, shape):
    """Through the answer without a condition, at 0, and the one with it, at 1 (Ho & Salimans 2022, eq. 6)."""
    condition = md.Condition(torch.ones(2, 1, 1), torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 1))

    def denoise(x_t, level, condition=None):
        told = 0.0 if condition is None else condition.pooled.reshape(-1, *[1] * (x_t.ndim - 1))
        return from_x0(lambda x, alpha, sigma: 0.5 * x + told)(x_t, level)

    x = random_like((2, *shape), torch.float64, seed)
    level = level_at("cosine", t, torch.float64)
    found = md.guide(denoise, condition, guidance)(x, level).x0
    without, told = denoise(x, level).x0, denoise(x, level, condition).x0
    if guidance == 1:
        assert torch.equal(found, told)
    torch.testing.assert_close(found, without + guidance * (told - without), rtol=1e-9, atol=1e-9)


# --- what strangers bring --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model in a folder."""
    torch.manual_seed(0)
    text = md.TextEncoder.from_captions(["a red green blue square"], dim=32, layers=1)
    net = md.MLP(2, 32, 1, condition_dim=32)
    folder = tmp_path_factory.mktemp("model")
    md.Diffusion(net, md.Cosine(), "x0", text, shape=(2,)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model) -> md.Diffusion:
    return md.Diffusion.from_pretrained(model)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(config: object, before: tuple = ()) -> list[tuple]:
    """Every path into nested dictionaries and lists."""
    items = (
        config.items() if isinstance(config, dict) else enumerate(config if isinstance(config, list) else [])
    )
    found = []
    for key, value in items:
        found += [(*before, key), *places(value, (*before, key))]
    return found


def check_line(error: Exception) -> None:
    """A message is one line that can be read."""
    assert len(str(error).splitlines()) == 1, error
    assert len(str(error)) < 600, error


@tried(80)
@hypothesis.given(data=st.data(), value=anything)
def test_any_config_loads_or_is_refused_in_a_line(model, tmp_path, data, value):
    """One entry of config.json is replaced by anything."""
    config = json.loads((model / "config.json").read_text())
    *way, last = data.draw(st.sampled_from(places(config)))
    changed = copy.deepcopy(config)
    at = changed
    for key in way:
        at = at[key]
    at[last] = value
    folder = tmp_path / "changed"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(changed))
    try:
        md.Diffusion.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        check_line(error)


@tried(80)
@hypothesis.given(
    lines=st.lists(
        st.text(max_size=30)
        | st.dictionaries(st.sampled_from(["file_name", "text", "other"]), anything, max_size=3).map(
            json.dumps
        )
        | anything.map(lambda text: json.dumps({"file_name": "red.png", "text": text})),
        max_size=4,
    ),
    name=st.sampled_from(["metadata.jsonl", "metadata.csv"]),
)
def test_any_metadata_are_read_or_refused_in_a_line(tmp_path, lines, name):
    folder = tmp_path / "pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    (folder / name).write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        found = captioned_folder(folder, 16)
    except (ValueError, FileNotFoundError) as error:
        check_line(error)
    else:
        assert all(isinstance(text, str) for text in found.captions)  # empty: a picture without words


@tried(100)
@hypothesis.given(prompt=st.text(max_size=60))
@pytest.mark.filterwarnings("ignore")
def test_any_prompt_can_be_encoded(loaded, prompt):
    condition = loaded.encode([prompt])
    assert condition.tokens.isfinite().all()
    assert condition.pooled.isfinite().all()
