"""The benchmarks run, and the book shows what they wrote."""

import json
import sys
from pathlib import Path

import pytest
import torch

import minidiff as md

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import samplers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # of diffusers and NumPy


@pytest.fixture(scope="module")
def small():
    return samplers.run(n=40, calls=(4, 40), fine=200)


def test_more_calls_come_closer(small):
    assert len(small["rows"]) == 2 * (len(samplers.OURS) + 1 + len(samplers.THEIRS))
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


def test_the_page_shows_the_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "samplers.json").read_text())
    page = (ROOT / "book" / "benchmarks.md").read_text()
    for problem in samplers.problems():
        for what in ("mean", "median"):
            assert samplers.table(found, problem, what) in page
