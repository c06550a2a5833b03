"""The benchmarks run, and the book shows what they wrote."""

import json
import math
import statistics
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

import benchmarks.__main__ as everything
import minidiff as md
from benchmarks import LONGER, PARTS, common, minutes, overhead, quality, samplers, tables, training, weight

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers and NumPy


@pytest.fixture(scope="module")
def small():
    return samplers.run(n=40, calls=(4, 40), fine=200)


def test_more_calls_come_closer(small):
    assert len(small["rows"]) == 2 * (len(samplers.OURS) + 2 + len(samplers.THEIRS))
    for row in small["rows"]:
        assert row["mean"][1] < 0.5 * row["mean"][0], row


def test_theirs_and_ours_solve_one_problem():
    """DPM-Solver++ 2M by both libraries from one start: the same points, but for the table's last beta."""
    oracle = samplers.problems()["ring"]
    x = torch.randn(40, 2, dtype=torch.float64)
    here = samplers.ours(md.dpmpp_2m, oracle, x, 20)
    there = samplers.theirs(*samplers.THEIRS["DPM-Solver++ 2M"], oracle, x, 20)
    assert (here - there).norm(dim=1).median() < 1e-3


def test_heun_makes_the_calls_it_is_counted_for():
    oracle, calls = samplers.problems()["ring"], []
    ask = oracle.denoise
    oracle.denoise = lambda *given: (calls.append(1), ask(*given))[1]
    for count in (4, 10, 50):
        calls.clear()
        samplers.heun_calls(oracle, torch.randn(3, 2, dtype=torch.float64), count)
        assert len(calls) == count


# --- what the parts share -------------------------------------------------------------------------


class Clock:
    """Stands still, but for what `call` takes."""

    def __init__(self):
        self.now, self.called = 0.0, []

    def __call__(self):
        return self.now

    def call(self, name, *seconds):
        """A function that takes so long: the first time, the second time, ..., and from then on the last."""

        def wait():
            self.now += seconds[min(self.called.count(name), len(seconds) - 1)]
            self.called.append(name)

        return wait


def test_contenders_run_in_turn_after_a_call_that_does_not_count():
    clock = Clock()
    calls = {"a": clock.call("a", 100.0, 1.0), "b": clock.call("b", 100.0, 3.0)}
    took = common.in_turn(calls, rounds=2, seconds=2.0, clock=clock)
    assert "".join(clock.called) == "ab" + "aab" * 2
    assert took == {"a": [1.0, 1.0], "b": [3.0, 3.0]}


def test_a_slow_spell_is_told_apart_from_the_rest():
    clock = Clock()
    (took,) = common.in_turn({"a": clock.call("a", 1, 1, 9, 2)}, rounds=3, seconds=0.0, clock=clock).values()
    assert took == [1, 9, 2]
    assert common.spread(took) == {"min": 1.0, "median": 2.0, "max": 9.0, "runs": [1.0, 9.0, 2.0]}
    with pytest.raises(ValueError, match="rounds = 0"):
        common.in_turn({}, rounds=0)


def test_a_record_says_how_it_was_made_and_what_was_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["somewhere/training.py", "--rounds", "7"])
    result = {"rows": [1], "skipped": ["azula is not installed"]}
    file = common.record("training", lambda rounds: result | {"rounds": rounds}, tmp_path, rounds=7)
    written = json.loads(file.read_text())
    assert "left out: azula is not installed" in capsys.readouterr().out
    assert written["rows"] == [1]
    assert written["rounds"] == 7
    assert written["made_by"]["command"] == "python -m benchmarks.training --rounds 7"
    assert written["made_by"]["machine"]["torch"] == torch.__version__
    assert written["made_by"]["versions"]["diffusers"] == find_version("diffusers")


def find_version(name):
    (line,) = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x.startswith(f"{name}==")]
    return line.partition("==")[2]


def test_all_parts_run_one_after_the_other(monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command[1:]))
    monkeypatch.setattr(everything, "write_tables", lambda: ran.append("tables"))
    everything.main()
    assert ran == [*(["-m", f"benchmarks.{part}"] for part in PARTS), "tables"]
    assert all(find_spec(f"benchmarks.{part}") for part in PARTS)


# --- training -------------------------------------------------------------------------------------

on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="these are figures of the CPU")


def recorded(part, folder, **settings):
    """What a part writes when it is run in small."""
    return json.loads(common.record(part.__name__.split(".")[1], part.run, folder, **settings).read_text())


def tiny(folder):
    return recorded(training, folder, sizes=(32,), batch=2, rounds=1, seconds=0.0, images=8)


def check(found, libraries):
    rows = {row["name"]: row for row in found["rows"]}
    assert {row["library"] for row in found["rows"]} == {"minidiff", *libraries}
    assert rows["minidiff"]["ours_is_faster"]["runs"] == [1.0]
    for row in rows.values():
        assert math.isfinite(row["loss"]["first"])
        assert row["steps"] == 2
        if row["our_network"]:
            assert row["parameters"] == rows["minidiff"]["parameters"]
        else:
            assert 3e6 < row["parameters"] < 5e6, row["name"]  # what the page says
    assert training.table(found).count("\n| ") == len(rows) + 2


@pytest.mark.slow
@on_cpu
def test_training_runs_without_the_other_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "installed", lambda library: library == "diffusers")
    found = tiny(tmp_path)
    check(found, {"diffusers"})
    for library in set(common.PEERS) - {"diffusers"}:
        assert f"{library} is not installed" in found["skipped"]


@pytest.mark.slow
@on_cpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # theirs
def test_training_runs_with_all_libraries(tmp_path):
    missing = [library for library in common.PEERS if not common.installed(library)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make bench installs them)")
    check(tiny(tmp_path), set(common.PEERS))


@pytest.mark.slow
@on_cpu
@pytest.mark.parametrize("start", [training.minidiff_run, training.diffusers_run])
def test_the_precision_that_is_asked_for_is_computed_in(start):
    task, ours = training.Task(32, 2, 8), start is training.minidiff_run
    for dtype, asked in (("bfloat16", "bf16" if ours else True), ("float32", "fp32" if ours else False)):
        running = start(task, asked)
        seen = training.watch(running.net)
        running.step()
        assert seen == [dtype]


def test_our_network_is_told_the_time_of_the_level():
    level = md.Cosine()(torch.linspace(0.01, 0.99, 9, dtype=torch.float64))
    found = training.OurNetwork.time(level.sigma / level.alpha)
    torch.testing.assert_close(found, level.t, atol=0.01, rtol=0)


def test_figures_of_the_cpu_are_not_taken_where_there_is_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match="hide it"):
        training.run()


# --- what a sampler costs -------------------------------------------------------------------------


def test_a_run_around_a_stored_answer_ends_there():
    """So it is a whole run: the last step goes to the clean sample."""
    x, answer = torch.randn(2, 1, 3, 16, 16)
    for name in overhead.SAMPLERS:
        net = overhead.Stored(answer)
        torch.testing.assert_close(overhead.ours(name, net, x, 5)(), answer.double())


@pytest.mark.slow
def test_overhead_runs_and_counts_calls(tmp_path):
    found = recorded(overhead, tmp_path, steps=4, batch=1, size=16, rounds=1, seconds=0.0)
    calls = {(row["library"], row["sampler"]): row["calls_per_step"] for row in found["rows"]}
    assert calls.pop(("minidiff", "heun")) == 6 / 4  # two a step, one at the first and the last
    assert calls.pop(("diffusers", "Heun")) == 7 / 4  # two a step, one at the last
    assert set(calls.values()) == {1.0}
    assert {library for library, _ in calls} == {"minidiff", "diffusers"}
    assert overhead.table(found).count("\n| ") == len(found["rows"]) + 1


# --- weight ---------------------------------------------------------------------------------------


def test_files_and_needs_of_a_package():
    shipped = {file.name: size for file, size in weight.files("minidiff").items() if "critters" in file.parts}
    assert shipped["model.safetensors"] > 1e6
    assert not any(name.endswith(".pyc") for name in shipped)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert weight.needed("minidiff", deep=False) == {Requirement(line).name for line in listed}
    assert weight.needed("minidiff") > {"torch", "sympy"}  # sympy by way of torch
    assert "torch" not in weight.needed("diffusers")
    assert "torch" in weight.needed("diffusers", weight.EXTRAS["diffusers"])


def test_a_module_of_one_file_does_not_weigh_as_the_folder_it_lies_in():
    assert sum(weight.files("typing_extensions").values()) < 1e6


@pytest.mark.slow
def test_weight_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(weight, "installed", lambda library: False)
    found = recorded(weight, tmp_path, rounds=1, names=("minidiff", "azula"))
    (row,) = found["rows"]
    assert 0 < row["python_bytes"] < row["bytes"] < row["all_bytes"] < found["environment"]["bytes"]
    assert found["skipped"] == ["azula is not installed"]
    assert weight.table(found).count("\n| ") == 2


# --- quality --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_are_scored_against_where_the_same_noise_leads():
    found = quality.run(prompts=40, calls=(2, 4), fine=4, fits=())
    (same,) = [row for row in found["rows"] if (row["library"], row["sampler"]) == ("minidiff", "Adams")]
    assert same["away"][1] < 1e-3 < same["away"][0]
    assert same["right"][1] == found["end"]["right"]
    assert len(found["rows"]) == len(quality.contestants())
    written = found | {"made_by": json.loads((common.RESULTS / "samplers.json").read_text())["made_by"]}
    assert quality.table(written).count("\n| ") == 3 * (len(found["rows"]) + 2) - 1


# --- minutes --------------------------------------------------------------------------------------


@pytest.mark.skipif(not common.installed("azula"), reason="azula is not installed")
def test_azulas_network_denoises_for_us_as_for_them():
    """At levels of both: their denoiser, given what it has at this sigma/alpha, gives the x0 that we get."""
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule

    task = minutes.Dropping(32, 2, images=2)
    backbone = training.AzulaBackbone(task.width).eval()
    schedule, theirs = md.Cosine(), VPSchedule()
    ours = minutes.FromAzula(backbone, schedule)
    denoiser = KarrasDenoiser(backbone=backbone, schedule=theirs)
    t_theirs = torch.tensor([0.1, 0.6])
    alpha, sigma = theirs(t_theirs)
    t = schedule.time(2 * (alpha / sigma).log())
    x0, eps = torch.randn(2, 2, 3, 32, 32)
    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * eps
    _, condition = next(task.encoded())
    with torch.no_grad():
        expected = denoiser(x_t, t_theirs, condition=condition.pooled).mean
        torch.testing.assert_close(ours(x_t, t.float(), condition), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not common.installed("diffusers"), reason="diffusers is not installed")
def test_the_chain_of_diffusers_is_ours():
    """Timestep 0 of theirs is our t = 1/1000, and the noise is as much."""
    from diffusers import DDPMScheduler

    given = DDPMScheduler(num_train_timesteps=1000).alphas_cumprod.double()
    steps = torch.arange(1000)
    level = md.Linear()((steps.double() + 1) / 1000)
    torch.testing.assert_close(level.alpha**2, given, atol=1e-6, rtol=1e-4)
    asked = []

    class Net(torch.nn.Module):
        def forward(self, x, timestep, **text):
            asked.append(timestep)
            return SimpleNamespace(sample=x)

    module = minutes.FromDiffusers(Net(), bf16=False)
    condition = md.Condition(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 3))
    module(torch.zeros(1, 3, 8, 8), torch.tensor([1.0]), condition)
    assert asked[0].item() == 999


@pytest.mark.slow
@pytest.mark.skipif(not all(map(common.installed, minutes.STARTS)), reason="peers are not installed")
def test_minutes_run():
    found = minutes.run(minutes=0.001, prompts=2, size=64, images=32)
    ours, others = found["rows"][:-2], found["rows"][-2:]
    assert [row["name"] for row in others] == ["diffusers", "azula"]
    assert all(row["name"].startswith("minidiff") and row["seconds"] < 480 for row in ours)
    assert all(row["images"] >= minutes.BATCH for row in others)
    written = found | {"made_by": json.loads((common.RESULTS / "samplers.json").read_text())["made_by"]}
    assert minutes.table(written).count("\n| ") == len(found["rows"]) + 1


def test_training_ends_with_the_step_in_which_time_is_up():
    running = training.Running(torch.nn.Identity(), iter([1.0] * 9))
    ticks = iter([0.0, 0.0, 4.0, 8.0, 12.0])
    assert minutes.train_for(running, 10, clock=lambda: next(ticks)) == 12
    assert len(running.losses) == 3


# --- what was written -----------------------------------------------------------------------------


def test_the_tables_are_those_of_the_result_files():
    found = tables.results()
    assert set(PARTS) <= set(found) <= {*PARTS, *LONGER}
    assert tables.page(tables.PAGE.read_text(), found) == tables.PAGE.read_text()
    readme = tables.README.read_text()
    assert tables.fill(readme, "bench", tables.summary(found)) == readme


def test_a_page_without_a_place_is_named():
    with pytest.raises(ValueError, match="<!-- bench -->"):
        tables.fill("no place\n", "bench", "")


def spreads(value):
    if isinstance(value, dict):
        yield from [value] if "runs" in value else [s for inner in value.values() for s in spreads(inner)]
    if isinstance(value, list):
        yield from (s for inner in value for s in spreads(inner))


@pytest.mark.parametrize("part", [part for part in PARTS if part != "samplers"])
def test_every_figure_is_of_five_runs_and_more(part):
    text = (common.RESULTS / f"{part}.json").read_text()
    found = list(spreads(json.loads(text)))
    assert found
    for figure in found:
        assert len(figure["runs"]) >= 5
        assert (
            figure["min"] == min(figure["runs"]) <= figure["median"] <= max(figure["runs"]) == figure["max"]
        )
    assert str(ROOT) not in text


def records():
    """The logs of one race, by what their files' names say before the seed."""
    races: dict[str, list[dict]] = {}
    for file in sorted((ROOT / "benchmarks/records").glob("*.json")):
        log = json.loads(file.read_text())
        assert file.name.endswith(f"-{log['seed']}.json")
        assert f"--seed {log['seed']}" in log["train"]
        races.setdefault(file.stem.rpartition("-")[0], []).append(log)
    return races


def median_of(logs, score):
    return statistics.median(log["scores"][score]["value"] for log in logs)


def clock(seconds):
    return f"{seconds // 60}:{seconds % 60:02d}"


def test_the_page_of_records_says_what_the_logs_say():
    """Each race with its commands, times, shares and their medians over three seeds; and it is a record if
    and only if the medians reach the bar."""
    page = (ROOT / "book/records.md").read_text()
    races = records()
    assert races
    for race, logs in races.items():
        assert len({log["seed"] for log in logs}) == len(logs) == 3
        said = [f"records/{race}-0.json", clock(statistics.median(log["seconds_to_train"] for log in logs))]
        bar = logs[0]["bar"]
        assert bar
        said += [f"{100 * median_of(logs, score):.1f} %" for score in bar]
        for log in logs:
            said += [log["train"], log["evaluate"], clock(log["seconds_to_train"])]
            assert log["images"] == 128 * log["loss"][-1]["step"]  # the recipe's batch
            assert log["bar"] == bar
            shares = [score for score in log["scores"].values() if score["unit"] == "%"]
            said += [
                f"{100 * s['value']:.1f} % [{100 * s['low']:.1f}, {100 * s['high']:.1f}]" for s in shares
            ]
        for text in said:
            assert text in page, text
        reached = all(median_of(logs, score) >= least for score, least in bar.items())
        section = page[: page.index(f"records/{race}-0.json")].rpartition("## ")[2]
        assert ("short of the bar" not in section) == reached
