"""The house: who may import whom, and how large a room may be."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tools.stale import Library

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from lower floors, or from its own package; the chapters of the book go
# up the same stairs, but for text, which makes conditions and needs no denoiser.
FLOORS = [
    ("forward",),
    ("schedule",),
    ("files", "device"),
    ("pixels",),
    ("condition",),
    ("text",),
    ("denoiser",),
    ("exact", "loss", "state"),
    ("training", "sampling"),
    ("guidance", "likelihood"),
    ("metrics", "doctor", "interop"),
    ("plots", "data"),
    ("pipeline",),
    ("evaluation", "critters"),
    ("recipes",),
    ("fit",),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIBRARY = Library(ROOT)
MODULES = sorted(LIBRARY.files.keys() - {"minidiff"})


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_its_floor():
    rooms = {room(module) for module in MODULES}
    assert rooms == FLOOR.keys(), "add a new module to FLOORS in tests/test_architecture.py"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    """Imports inside functions count: they may be there to be light, not to hide a circle."""
    for other in LIBRARY.imports(module):
        if other == "minidiff" == module.removesuffix(".cli"):
            continue  # for its version
        assert other != "minidiff", f"{module} imports the package itself: name the module"
        if room(other) != room(module):
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle_within_a_package(module):
    seen, todo = set(), list(LIBRARY.imports(module))
    while todo:
        other = todo.pop()
        # A package's __init__ gathers its modules for others; none of them asks it back.
        assert other != module, f"{module} imports itself, by way of others"
        if other not in seen:
            seen.add(other)
            todo += LIBRARY.imports(other)


def lines_of_code(source: str) -> int:
    """Lines that are not blank, comment or docstring."""
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            documentation |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    lines: set[int] = set()
    layout = (
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    )  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def test_lines_are_counted_as_said():
    assert (
        lines_of_code('"""Doc."""\n\n# why\nx = 1  # what\n\n\ndef f():\n    """Doc."""\n    return x\n') == 3
    )


def test_a_room_can_be_read_in_five_minutes():
    long = {module: lines_of_code(file.read_text()) for module, file in LIBRARY.files.items()}
    assert not {module: n for module, n in long.items() if n > 300}


def test_a_test_file_is_about_one_room():
    long = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "tests").glob("test_*.py")}
    assert not {name: n for name, n in long.items() if n > 500}
