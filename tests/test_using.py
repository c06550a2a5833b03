"""What the README and the prose pages of the book tell a reader to type works as written."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from minidiff.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text() for path in [*(ROOT / "book").glob("*.md"), ROOT / "README.md"]
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def command_lines() -> list[str]:
    lines = [
        line.removeprefix(".venv/bin/")
        for text in PAGES.values()
        for block in blocks(text, "bash")
        for line in (text.split("  #")[0] for text in block.splitlines())
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
    assert session["x"].shape == (1000, 2)  # the last thing drawn on both pages
