"""The script for a GPU at hand runs from end to end where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

from minidiff import Diffusion

ROOT = Path(__file__).parents[1]


def test_the_script_for_a_gpu_runs_whole(tmp_path):
    """In small, each part in a process of its own; every part leaves its numbers and its model."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--tiny", "--limit", "280"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290, check=True, env=env)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tiny"] is True
    for part in ("tests", "rates", "critters", "both", "pooled"):
        assert found[part]["exit"] == 0, (part, found[part], done.stdout)
    loops = {(row["loop"], row["batch"]) for row in found["rates"]["rates"]}
    assert len(loops) == 6
    assert all(0 < row["images/s"]["min"] <= row["images/s"]["max"] for row in found["rates"]["rates"])
    for part in ("critters", "both", "pooled"):
        assert found[part]["scores"]
        assert Diffusion.from_pretrained(tmp_path / part).shape == (3, 16, 16)
    assert Diffusion.from_pretrained(tmp_path / "pooled").net.config["conditioning"] == "pooled"


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), "--tiny", "--limit", "0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found) > {"tests", "rates", "critters", "both", "pooled"}
    assert any(found[part]["exit"] is None for part in ("tests", "rates", "critters", "both", "pooled")), done
