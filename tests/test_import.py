"""Importing minidiff is as light as torch: what is large waits until something needs it."""

import subprocess
import sys

import pytest

import minidiff as md

LARGE = ("accelerate", "diffusers", "huggingface_hub", "matplotlib", "torchmetrics", "torchvision",
         "transformers")  # fmt: skip


def loaded_by(code: str) -> set[str]:
    """Which of the large libraries a fresh interpreter has loaded after running ``code``."""
    show = f"import sys; print(*[name for name in {LARGE!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_what_needs_no_large_library_loads_none():
    """Schedules, networks, samplers, guidance and exact answers: all of chapters 1 to 3 and 5."""
    assert (
        loaded_by(
            "import torch, minidiff as md\n"
            "oracle = md.exact.GaussianMixture(torch.zeros(1, 2), stds=torch.tensor(1.0))\n"
            "levels = md.Cosine().levels(3)\n"
            "md.sample(md.heun(oracle.denoise, md.noise((2, 2), levels[0]), levels))\n"
            "md.Diffusion(md.UNet(), md.Cosine()), md.doctor, md.from_diffusers"
        )
        == set()
    )


def test_the_command_loads_none_before_it_has_work():
    assert loaded_by("import minidiff.cli") == set()


def test_a_name_brings_what_it_needs():
    assert "accelerate" in loaded_by("from minidiff import train")
    assert "transformers" in loaded_by("import minidiff as md; md.TextEncoder")


@pytest.mark.parametrize("name", md.__all__)
def test_every_name_is_there_and_listed(name):
    assert getattr(md, name) is getattr(md, name)
    assert name in dir(md)


def test_another_name_is_refused():
    with pytest.raises(AttributeError, match="module 'minidiff' has no attribute 'ddimm'"):
        md.ddimm  # noqa: B018
