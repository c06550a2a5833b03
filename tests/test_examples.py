"""The examples run, in tiny form, and read straight down."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_points(capsys):
    p = load("points").main(steps=20, n=100)
    assert 0 < p < 0.5  # 20 steps are not enough
    assert "samples of the exact denoiser: p = " in capsys.readouterr().out


def test_labels(monkeypatch, tmp_path):
    """With ten flat pictures in place of scikit-learn's digits, which need that library."""
    labels = np.arange(200) % 10
    pictures = np.broadcast_to(labels[:, None, None] * 1.6, (200, 8, 8)).copy()
    datasets = ModuleType("sklearn.datasets")
    datasets.load_digits = lambda: SimpleNamespace(images=pictures, target=labels)
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    share = load("labels").main(steps=2)
    assert 0 <= share <= 1
    assert (tmp_path / "digits.png").is_file()


def test_folder(tmp_path):
    for color in ("red", "blue"):
        (tmp_path / "data" / color).mkdir(parents=True)
        Image.new("RGB", (20, 20), color).save(tmp_path / "data" / color / "1.png")
    load("folder").main("data", "red", steps=2, size=16)
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (16, 16)
    assert (tmp_path / "runs/mine/model.safetensors").is_file()
