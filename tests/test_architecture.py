"""The house: who may import whom, and how large a room may be."""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

import pytest
from conftest import SLOW

from tools.stale import PACKAGE, Library, at_runtime

ROOT = Path(__file__).parents[1]

# From the ground up. A module imports from lower floors, or from its own package; the chapters of the book go
# up the same stairs, but for text, which makes conditions and needs no denoiser.
FLOORS = [
    ("checks",),
    ("forward",),
    ("schedule",),
    ("files", "device"),
    ("sounds",),
    ("pixels",),
    ("condition",),
    ("text",),
    ("denoiser",),
    ("exact", "loss", "muon", "state", "step"),
    ("training", "sampling", "masking"),
    ("guidance", "likelihood"),
    ("metrics", "doctor", "interop"),
    ("plots", "data"),
    ("pipeline",),
    ("evaluation", "critters", "tones"),
    ("recipes",),
    ("fit", "progress"),
    ("cli",),
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LIBRARY = Library(ROOT)
MODULES = sorted(LIBRARY.files.keys() - {PACKAGE})


def room(module: str) -> str:
    return module.split(".")[1]


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a module's imports name. Those inside functions count: they may be there to be light,
    not to hide a circle. What only a type checker reads does not."""
    found: set[str] = set()
    for node in at_runtime(ast.parse(LIBRARY.files[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names} & LIBRARY.files.keys()
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: the library spells names in full"
            for name in node.names:
                origin, inner = str(node.module), f"{node.module}.{name.name}"
                if inner in LIBRARY.files:
                    found.add(inner)
                elif origin == PACKAGE:
                    found |= LIBRARY.resolve((PACKAGE, (name.name,)))
                elif origin in LIBRARY.files:
                    found.add(origin)
    return frozenset(found)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_floor(module):
    assert room(module) in FLOOR, f"add {room(module)!r} to FLOORS in {Path(__file__).name}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    for other in imports(module):
        if other == PACKAGE:
            assert module == f"{PACKAGE}.cli", f"{module} imports the package itself: name the module"
        elif room(other) != room(module):
            assert FLOOR[room(other)] < FLOOR[room(module)], f"{module} imports {other}, from no lower floor"


@pytest.mark.parametrize("module", MODULES)
def test_no_circle(module):
    """Within a package, too: its __init__ gathers its modules for others, and none of them asks it back."""
    todo = [(module,)]
    seen: set[str] = set()
    while todo:
        road = todo.pop()
        for other in imports(road[-1]) - {PACKAGE}:
            assert other != module, " imports ".join((*road, module))
            if other not in seen:
                seen.add(other)
                todo.append((*road, other))


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


@pytest.mark.parametrize("module", MODULES)
def test_a_room_can_be_read_in_five_minutes(module):
    assert lines_of_code(LIBRARY.files[module].read_text()) <= 300, (
        f"{module} has more than 300 lines of code"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda path: path.name)
def test_a_test_file_is_about_one_room(path):
    assert len(path.read_text().splitlines()) <= 500, f"{path.name} has more than 500 lines: split it"


@pytest.mark.parametrize("name", SLOW)
def test_what_is_listed_as_slow_exists(name):
    """A test or file that was renamed would run in `make quick` again, unnoticed."""
    if name.endswith(".py"):
        assert (ROOT / "tests" / name).is_file()
    else:
        assert any(f"\ndef {name}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
