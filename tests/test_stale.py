"""Which changes run which notebooks again, and what is remembered of a run."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.rerun import main
from tools.stale import Library, used

ROOT = Path(__file__).parents[1]

MODULES = {
    "__init__.py": """
from typing import TYPE_CHECKING
from minidiff.a import twice
if TYPE_CHECKING:
    from minidiff import late
    from minidiff.b import B
""",
    "a.py": '''"""A module."""

RATE = 2
"""What it is."""


class Scale:
    """Doc."""

    def twice(self, x: int) -> int:
        """Doc."""
        return RATE * x  # why

def twice(x):
    return Scale().twice(x)
''',
    "b.py": "class B:\n    def __call__(self):\n        from minidiff.deep import c\n        return c\n",
    "deep/__init__.py": "from minidiff.deep.c import value\nfrom minidiff.deep.d import other\n",
    "deep/c.py": "value = 1\n",
    "deep/d.py": "other = 1\n",
    "late.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minidiff.b import B\nx = 1\n",
    "shipped.py": "from minidiff import deep\nFOLDER = 'checkpoints'\ndef load():\n    return deep.other\n",
    "checkpoints/weights": "1",
}
NOTEBOOKS = {
    "uses a": "import minidiff as md\nmd.twice(2)",
    "uses b": "import minidiff as md\nmd.B()()",
    "imports c": "from minidiff.deep import c\nc.value",
    "a name of c": "import minidiff.deep\nminidiff.deep.value",
    "late": "from minidiff import late\nlate.x",
    "loads": "from minidiff.shipped import load as give\ngive()",
    "by way of": "from minidiff import shipped\nshipped.deep.value",
    "reads": "if 1:\n    %matplotlib inline\nopen('results/a.json')",
    "any": "import minidiff as md\ngetattr(md, 'twice')",
    "missing": "import minidiff as md\nmd.nothing",
    "starts": "!minidiff sample",
    "by name": "from importlib import import_module as load\nload('minidiff.a')",
}
ANY = {"any", "missing", "starts", "by name"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {f"minidiff/{name}": text for name, text in MODULES.items()}
    files |= {"constraints.txt": "torch==1", "notebooks/results/a.json": "1"}
    for name, code in NOTEBOOKS.items():
        cells = [
            {"cell_type": "code", "source": [code], "metadata": {}, "outputs": ["picture"]},
            {
                "cell_type": "code",
                "source": ["1"],
                "metadata": {"tags": ["nbval-check-output"]},
                "outputs": ["one"],
            },
            {"cell_type": "markdown", "source": ["words"], "metadata": {}},
        ]
        files[f"notebooks/{name}.ipynb"] = json.dumps({"cells": cells})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert run(tmp_path) == set(NOTEBOOKS)
    return tmp_path


def run(root: Path, failing: tuple[str, ...] = (), code: int = 0) -> set[str]:
    """The notebooks that were run, in one call if any."""
    ran: list[set[str]] = []

    def fake(paths: list[Path]) -> tuple[int, set[str]]:
        ran.append({path.stem for path in paths})
        return code, {f"{name}.ipynb" for name in failing}

    assert main(root / "_build", root, fake) == (code if ran else 0)
    assert len(ran) <= 1
    return ran[0] if ran else set()


def edit(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("minidiff/a.py", '"""A module."""', '"""Another text."""', set()),
        ("minidiff/a.py", '"""What it is."""', "", set()),
        ("minidiff/a.py", '        """Doc."""\n        return', "        return", set()),
        ("minidiff/a.py", "# why", "# because", set()),
        ("minidiff/a.py", "RATE * x", "RATE*x", set()),
        ("minidiff/a.py", "RATE = 2", "RATE = 3", {"uses a"} | ANY),
        ("minidiff/a.py", "RATE * x", "x * RATE", {"uses a"} | ANY),
        ("minidiff/a.py", "x: int", "x: float", {"uses a"} | ANY),
        ("minidiff/b.py", "class B", "class B(object)", {"uses b"} | ANY),
        (
            "minidiff/deep/c.py",  # through an import in a method, the package, and another module's own name
            "1",
            "2",
            {"uses b", "imports c", "a name of c", "by way of"} | ANY,
        ),
        ("minidiff/deep/d.py", "1", "2", {"loads", "by way of"} | ANY),
        (
            "minidiff/deep/__init__.py",
            "value\n",
            "value as value\n",
            {"uses b", "imports c", "a name of c", "loads", "by way of"} | ANY,
        ),
        ("minidiff/late.py", "x = 1", "x = 2", {"late"} | ANY),
        ("minidiff/__init__.py", "late", "late as late", set(NOTEBOOKS)),
        ("minidiff/checkpoints/weights", "1", "2", {"loads", "by way of"} | ANY),
        ("notebooks/results/a.json", "1", "2", {"reads"}),
        ("constraints.txt", "1", "2", set(NOTEBOOKS)),
        ("notebooks/imports c.ipynb", "import c", "import c as c", {"imports c"}),
        ("notebooks/imports c.ipynb", "import c", "import (c)  # why", set()),
        ("notebooks/imports c.ipynb", "one", "two", {"imports c"}),
        ("notebooks/imports c.ipynb", "-output", '-output", "hide-input', set()),
        ("notebooks/imports c.ipynb", "check-output", "ignore-output", {"imports c"}),
        ("notebooks/imports c.ipynb", "picture", "another", set()),
        ("notebooks/imports c.ipynb", "words", "other words", set()),
    ],
)  # fmt: skip
def test_what_an_edit_runs(root, file, old, new, expected):
    edit(root, file, old, new)
    assert run(root) == expected
    assert run(root) == set()


def test_weights_count_by_name_too_and_caches_do_not(root):
    (root / "minidiff/__pycache__").mkdir()
    (root / "minidiff/__pycache__/a.pyc").write_bytes(b"1")
    assert run(root) == set()
    (root / "minidiff/checkpoints/weights").rename(root / "minidiff/checkpoints/others")
    assert run(root) == {"loads", "by way of"} | ANY


def test_who_fails_runs_again_and_who_passed_does_not(root):
    edit(root, "constraints.txt", "1", "2")
    assert run(root, failing=("late", "any"), code=1) == set(NOTEBOOKS)
    assert run(root) == {"late", "any"}


def test_an_edit_during_the_run_counts(root):
    edit(root, "minidiff/late.py", "1", "2")

    def edits(paths: list[Path]) -> tuple[int, set[str]]:
        edit(root, "minidiff/late.py", "2", "3")
        return 0, set()

    main(root / "_build", root, edits)
    assert run(root) == {"late"} | ANY


@pytest.mark.slow
def test_a_run_tells_who_failed(tmp_path):
    """With pytest and nbval as they are: one passes, one fails, one is no notebook."""
    for name, code in (("good", "1 + 1"), ("bad", "1 / 0")):
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    call = "import sys, pathlib, tools.rerun; print(tools.rerun.run([*map(pathlib.Path, sys.argv[1:])]))"

    def told(*names: str) -> str:
        paths = [str(tmp_path / f"{name}.ipynb") for name in names]
        done = subprocess.run(
            [sys.executable, "-c", call, *paths], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()[-1]

    assert told("good", "bad") == "(1, {'bad.ipynb'})"
    assert "good.ipynb" in told("good", "broken")  # it did not come to it


def test_the_real_library_can_be_told_apart():
    """None of the book's notebooks counts as using all; a name leads to the module that has it."""
    library = Library(ROOT)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text())["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        assert library.reached(used(code, library)) < library.files.keys(), notebook.name
    for name, module in (("ddim", "sampling"), ("plots", "plots"), ("loss", "loss"), ("train", "training")):
        assert f"minidiff.{module}" in used(f"import minidiff as md\nmd.{name}", library)
    assert used("from minidiff import critters\ncritters.HATS", library) == {"minidiff.critters.scene"}
    assert "minidiff.plots" not in library.reached({"minidiff.sampling"})
