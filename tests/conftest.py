"""What holds for every test: no network, no display, the same random numbers each time."""

import json
import os
from pathlib import Path

# Before torch, transformers or matplotlib are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import pytest
import torch
from PIL import Image

# The tests' tensors are small: on many cores they only get slower. Workers side by side share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Noise drawn without a generator is the same whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six captioned pictures, one broken, one missing."""
    path = tmp_path / "pictures"
    path.mkdir()
    lines = []
    for i, color in enumerate(["red", "green", "blue", "red", "green", "blue"]):
        Image.new("RGB", (40 + i, 30), color).save(path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"a {color} square"})
    (path / "broken.png").write_bytes(b"not a picture")
    lines += [{"file_name": n, "text": "nothing"} for n in ("broken.png", "missing.png")]
    (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


SLOW = (
    "test_assumptions.py", "test_bad_folders.py", "test_bad_input.py", "test_benchmarks_gpu.py",
    "test_cli.py", "test_cuda.py", "test_doctor.py", "test_examples.py",
    "test_exported_schedules.py", "test_guests.py", "test_import.py", "test_interop.py",
    "test_likelihood.py", "test_on_disk.py", "test_progress.py", "test_start.py", "test_stopped_runs.py",
    "test_own_networks.py", "test_pipeline.py", "test_recipes.py", "test_resume.py", "test_sampling_exact.py",
    "test_scores.py", "test_studies.py", "test_tones_run.py", "test_tools.py", "test_training.py",
    "test_using.py",
    "test_rendering_works_in_a_script_without_a_main_guard", "test_energy_test_keeps_its_promise",
    "test_intervals_are_as_wide_as_the_scatter", "test_order_of_convergence",
    "test_a_chain_of_a_thousand_transitions_is_the_marginal",
    "test_the_transition_variance_is_right_for_normal_data",
)  # fmt: skip
"""Files and tests that `make quick` leaves out: they train, draw, start programs, or take seconds. A single
test may say so itself, too: `@pytest.mark.slow`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = getattr(item, "originalname", item.name)
        if item.path.name in SLOW or name in SLOW:
            item.add_marker("slow")
