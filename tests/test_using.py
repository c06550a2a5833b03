"""What the README and the prose pages of the book tell a reader to type works as written."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer.main
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import minidiff as md
from minidiff.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text() for path in [*(ROOT / "book").glob("*.md"), ROOT / "README.md"]}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines() -> list[str]:
    lines = [
        line.removeprefix(".venv/bin/")
        for text in PAGES.values()
        for block in blocks(text, "bash")
        for line in (text.split("  #")[0] for text in block.replace("\\\n", "").splitlines())
    ]
    return [line for line in lines if line.startswith("minidiff ")]


def test_the_pages_show_every_command():
    commands = typer.main.get_command(app).commands
    assert {line.split()[1] for line in command_lines()} == set(commands)


@pytest.mark.parametrize("line", command_lines())
def test_command_line_is_understood(line):
    """Parsed, not run: an argument or option that does not exist is a usage error."""
    _, name, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", ["using.md", "README.md"])
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    """From top to bottom, in one session, as a reader would paste it."""
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for number, block in enumerate(blocks(PAGES[page], "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), session)
    assert (tmp_path / "cat.png").is_file()
    drawn = {"README.md": (1000, 2), "using.md": (4, 1, 16, 16)}  # the last thing drawn on each page
    assert session["x"].shape == drawn[page]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_python_of_the_page_on_latent_models_runs(tmp_path, monkeypatch):
    """All but the download: the parts are of the real classes, small and untrained."""
    torch.manual_seed(0)
    words = md.TextEncoder.from_captions(["a cat in a hat"]).tokenizer
    words.model_max_length = 8
    parts = SimpleNamespace(
        tokenizer=words,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=8,
            )
        ).eval(),
        unet=UNet2DConditionModel(
            block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=4,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval(),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip
    download, code = blocks(PAGES["latents.md"], "python")
    assert "from_pretrained" in download
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"parts": parts}
    exec(compile(code, "latents.md", "exec"), session)
    assert session["images"].shape == (1, 3, 512, 512)
    assert Image.open("latent-cat.png").size == (512, 512)
    assert session["levels"][0].alpha == pytest.approx(0.068, abs=5e-4)  # as the page says
