"""Which changes run which notebooks again."""

import json
from pathlib import Path

import pytest

from tools.stale import Library, main, used

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
    "deep/__init__.py": "",
    "deep/c.py": "value = 1\n",
    "late.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minidiff.b import B\nx = 1\n",
    "checkpoints/weights": "1",
}
NOTEBOOKS = {
    "uses a": "import minidiff as md\nmd.twice(2)",
    "uses b": "import minidiff as md\nmd.B()()",
    "imports c": "from minidiff.deep import c",
    "late": "from minidiff import late\nlate.x",
    "any": "import minidiff as md\ngetattr(md, 'twice')",
    "loads": "import minidiff as md\nmd.late.from_pretrained()",
    "reads": "if 1:\n    %matplotlib inline\nopen('results/a.json')",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {f"minidiff/{name}": text for name, text in MODULES.items()}
    files |= {"pyproject.toml": "", "constraints.txt": "torch==1", "notebooks/results/a.json": "1"}
    for name, code in NOTEBOOKS.items():
        cells = [{"cell_type": "code", "source": [code]}, {"cell_type": "markdown", "source": ["words"]}]
        files[f"notebooks/{name}.ipynb"] = json.dumps({"cells": cells})
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    main(tmp_path / "stamp", passed=True, root=tmp_path)
    return tmp_path


def stale(root: Path, file: str, old: str, new: str) -> set[str]:
    """What must run after an edit."""
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    return {path.stem for path in main(root / "stamp", passed=False, root=root)}


EVERY = set(NOTEBOOKS)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("minidiff/a.py", '"""A module."""', '"""Another text."""', set()),
        ("minidiff/a.py", '"""What it is."""', "", set()),
        ("minidiff/a.py", '        """Doc."""\n        return', "        return", set()),
        ("minidiff/a.py", "# why", "# because", set()),
        ("minidiff/a.py", "RATE * x", "RATE*x", set()),
        ("minidiff/a.py", "RATE = 2", "RATE = 3", {"uses a", "any"}),
        ("minidiff/a.py", "x: int", "x: float", {"uses a", "any"}),
        ("minidiff/b.py", "class B", "class B(object)", {"uses b", "any"}),
        ("minidiff/deep/c.py", "1", "2", {"uses b", "imports c", "any"}),
        ("minidiff/late.py", "x = 1", "x = 2", {"late", "loads", "any"}),
        ("minidiff/checkpoints/weights", "1", "2", {"loads"}),
        ("notebooks/results/a.json", "1", "2", {"reads"}),
        ("constraints.txt", "1", "2", EVERY),
        ("notebooks/imports c.ipynb", "import c", "import c as d", {"imports c"}),
        ("notebooks/imports c.ipynb", "words", "other words", set()),
    ],
)
def test_what_an_edit_runs(root, file, old, new, expected):
    assert stale(root, file, old, new) == expected


def test_all_run_without_a_stamp_and_none_after_they_passed(root):
    (root / "stamp").unlink()
    assert len(main(root / "stamp", passed=False, root=root)) == len(NOTEBOOKS)
    main(root / "stamp", passed=True, root=root)
    assert main(root / "stamp", passed=False, root=root) == []


def test_every_name_of_the_real_library_is_found():
    """None of the book's notebooks asks for the whole library; each name leads to the module that has it."""
    library = Library(Path(__file__).parents[1])
    for name, module in (("ddim", "sampling"), ("TextEncoder", "text"), ("plots", "plots"), ("loss", "loss")):
        assert used(f"import minidiff as md\nmd.{name}", library) == {f"minidiff.{module}"}
    assert "minidiff.critters.reader" in library.reached({"minidiff.critters"})
    assert "minidiff.plots" not in library.reached({"minidiff.sampling"})
