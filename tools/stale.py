"""Which notebooks must run again? Those whose code, or what they use of the library, does something else.

    python tools/stale.py STAMP              # the notebooks that changed since STAMP was written, one a line
    python tools/stale.py STAMP --passed     # all have run: write STAMP

A notebook's fingerprint is a hash of its code cells and of every module of ``minidiff`` that it reaches:
those it names, as in ``md.UNet`` or ``from minidiff.data import points``, and what these import, inside
functions too. Docstrings, comments and the layout of code do not count: no notebook can tell them. Result
files count for a notebook that reads some, the shipped models for one that loads some or reads a recipe, and
the pinned versions for all. Where it cannot be told what a notebook uses (``getattr(md, name)``), the whole
library counts.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "minidiff"


def behaviour(file: Path) -> bytes:
    """The content of a file, of Python code without docstrings, comments and layout."""
    if file.suffix != ".py":
        return file.read_bytes()
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A string that stands alone does nothing: a docstring, or one below a name.
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return ast.dump(tree).encode()


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class Library:
    """The modules of the package below ``root``, and what each imports."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {self._name(file): file for file in sorted((root / PACKAGE).rglob("*.py"))}
        self.homes = self._names_of_the_package()
        self.imports = cache(self._imports)

    def _name(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    def _names_of_the_package(self) -> dict[str, str]:
        """Where the package's own names come from: its imports, those for type checkers alone included, since
        they say what is imported when asked for."""
        tree = ast.parse(self.files[PACKAGE].read_text())
        found = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    found[name.asname or name.name] = whole if whole in self.files else str(node.module)
        return found

    def modules(self, node: ast.AST) -> set[str]:
        """The modules that an import statement names."""
        if isinstance(node, ast.Import):
            return {n.name for n in node.names if n.name in self.files and n.name != PACKAGE}
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
            return set()
        found = set()
        for name in node.names:
            whole = f"{node.module}.{name.name}"
            if node.module == PACKAGE:  # its __init__ is what everybody runs; only the name counts
                found.add(whole if whole in self.files else self.homes.get(name.name, PACKAGE))
            else:
                found |= {str(node.module), whole} & self.files.keys()
        return found

    def _imports(self, module: str) -> frozenset[str]:
        tree = ast.parse(self.files[module].read_text())
        return frozenset(m for node in _walk_at_runtime(tree) for m in self.modules(node)) - {module}

    def reached(self, start: set[str]) -> set[str]:
        """The modules, what they import, and the packages they are in; all, if the package itself is asked
        for."""
        if PACKAGE in start:
            return set(self.files)
        found, todo = set(), list(start)
        while todo:
            if (module := todo.pop()) not in found:
                found.add(module)
                todo += self.imports(module)
                parent = module.rpartition(".")[0]
                todo += [parent] if parent not in ("", PACKAGE) else []
        return found | {PACKAGE}


def _walk_at_runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below ``if TYPE_CHECKING``."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        checked = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        todo += list(ast.iter_child_nodes(node)) if not checked else []


def used(code: str, library: Library) -> set[str]:
    """The modules that a notebook's code names; the package itself where that cannot be told."""
    tree = ast.parse(code)
    found: set[str] = set()
    aliases = {PACKAGE} if f"import {PACKAGE}\n" in code else set()
    for node in ast.walk(tree):
        found |= library.modules(node)
        if isinstance(node, ast.Import):
            aliases |= {n.asname for n in node.names if n.name == PACKAGE and n.asname}
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and child.id in aliases:
                known = isinstance(node, ast.Attribute)
                name = node.attr if isinstance(node, ast.Attribute) else ""
                whole = f"{PACKAGE}.{name}"
                default = whole if known and whole in library.files else PACKAGE
                found.add(library.homes.get(name, default))
    return found


def fingerprint(notebook: Path, library: Library) -> str:
    """SHA-256 over the notebook's code and the behaviour of all that it reaches."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    code = ["".join(cell["source"]) for cell in cells]
    text = "\n".join(code)
    python = re.sub(r"^(\s*)[%!].*", r"\1pass", text, flags=re.MULTILINE)  # IPython's own lines
    files = [library.files[module] for module in library.reached(used(python, library))]
    root = library.root
    files += [root / "pyproject.toml", root / "constraints.txt"]
    if any(word in text for word in ("pretrained", "recipe")):
        files += _below(root / PACKAGE / "checkpoints")
    if "result" in text:
        files += _below(root / "notebooks" / "results")
    found = hashlib.sha256(json.dumps(code).encode())
    for file in sorted(set(files)):
        content = hashlib.sha256(behaviour(file)).hexdigest()
        found.update(f"{file.relative_to(root)} {content}\n".encode())
    return found.hexdigest()


def _below(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".")]


def main(stamp: Path, passed: bool, root: Path = ROOT) -> list[Path]:
    """The notebooks that are not as ``stamp`` has them; ``passed`` writes it anew."""
    library = Library(root)
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    now = {file.name: fingerprint(file, library) for file in notebooks}
    before = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if passed:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(json.dumps(now, indent=1) + "\n")
    return [file for file in notebooks if before.get(file.name) != now[file.name]]


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or sys.argv[2:] not in ([], ["--passed"]):
        sys.exit("usage: python tools/stale.py STAMP [--passed]")
    changed = main(Path(sys.argv[1]), bool(sys.argv[2:]))
    if not sys.argv[2:]:
        print(*(file.relative_to(ROOT) for file in changed), sep="\n")
