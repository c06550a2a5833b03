"""Which notebooks must run again? Those whose code, or what they use of the library, does something else.

A notebook's fingerprint is a hash of what its code cells do (with the outputs that are checked) and of every
module of ``minidiff`` that it reaches: those it uses, as in ``md.UNet`` or ``from minidiff.data import
points``, and what these use, inside functions too. Docstrings, comments and the layout of code do not count,
nor does prose: no cell can tell them. The shipped models count for a notebook where the name of their folder
stands in a string, in its own code or in a module's that it reaches, and so do the result files; the pinned
versions count for all. Where it cannot be told what is used (``getattr(md, name)``, ``!minidiff``,
``importlib``), the whole library counts.

``import minidiff.data`` runs the ``__init__`` of both: their text counts, and of what they import that which
is used, as no module does more on import than define things.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from tools.notebooks import meaning

PACKAGE = "minidiff"
Place = tuple[str, tuple[str, ...]]  # a module, and the names that follow it
DATA = (f"{PACKAGE}/checkpoints", "notebooks/results")
# Who uses one of these may import or start anything.
DYNAMIC = {"importlib", "import_module", "__import__", "runpy", "pkgutil", "subprocess", "exec", "eval"}
# IPython's own lines that import nothing; any other is no Python, so the whole library counts.
HARMLESS = re.compile(r"^([ \t]*)%(?:pip|config|matplotlib)\b.*", re.MULTILINE)


def behaviour(file: Path) -> bytes:
    """The content of a file, of Python code without docstrings, comments and layout."""
    return ast.dump(_parsed(file)).encode() if file.suffix == ".py" else file.read_bytes()


def _parsed(file: Path) -> ast.Module:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            # A string that stands alone does nothing: a docstring, or one below a name.
            node.body = [part for part in node.body if not _is_text(part)] or [ast.Pass()]
    return tree


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class Library:
    """The modules of the package below ``root``, and what each uses of the others."""

    def __init__(self, root: Path):
        self.root = root
        self.files = {self._name(file): file for file in sorted((root / PACKAGE).rglob("*.py"))}
        self.tree = cache(lambda module: _parsed(self.files[module]))
        self.bound = cache(self._bound)
        self.uses = cache(lambda module: self.used_in(self.tree(module)))
        self.content = cache(lambda file: hashlib.sha256(behaviour(file)).hexdigest())

    def _name(self, file: Path) -> str:
        parts = file.relative_to(self.root).with_suffix("").parts
        return ".".join(part for part in parts if part != "__init__")

    def _bound(self, module: str) -> dict[str, set[Place]]:
        # A package says to type checkers what it imports when asked for.
        package = self.files[module].stem == "__init__"
        names = bound(ast.walk(self.tree(module)) if package else at_runtime(self.tree(module)))
        for inner, _ in names.pop("*", ()):  # `from minidiff.a import *` binds what a lists
            for name in listed(self.tree(inner)):
                names.setdefault(name, set()).add((inner, (name,)))
        return names

    def resolve(self, place: Place) -> set[str]:
        """The modules that ``minidiff.a.b.c`` leads through, given as the module ``minidiff.a`` and the names
        ``(b, c)``; the package itself where there is no telling."""
        found: set[str] = set()
        seen: set[Place] = set()
        todo = [place]
        while todo:
            if (
                place := todo.pop()
            ) in seen:  # `from minidiff import data`, in minidiff, is the module within
                continue
            seen.add(place)
            module, names = place
            if module not in self.files:
                return {PACKAGE}
            further: list[Place] = []
            if names:
                inner = f"{module}.{names[0]}"
                further = [(inner, names[1:])] if inner in self.files else []
                further += [(m, (*path, *names[1:])) for m, path in self.bound(module).get(names[0], ())]
            if self.files[module].stem != "__init__":
                found.add(module)
            elif not names:  # who holds a package can ask it for anything
                found |= {name for name in self.files if f"{name}.".startswith(f"{module}.")}
            elif not further:
                return {PACKAGE}
            todo += further
        return found

    def used_in(self, tree: ast.AST) -> set[str]:
        """The modules that code uses: through each name it imported, as far as the dots behind it go."""
        nodes = list(at_runtime(tree))
        names = bound(nodes)
        if _is_dynamic(nodes) or "*" in names:
            return {PACKAGE}
        outer = {id(node.value): node for node in nodes if isinstance(node, ast.Attribute)}
        found: set[str] = set()
        for node in nodes:
            if isinstance(node, ast.Name) and node.id in names:
                path: list[str] = []
                end: ast.AST | None = node
                while end := outer.get(id(end)):
                    path.append(end.attr)
                found = found.union(*(self.resolve((m, (*start, *path))) for m, start in names[node.id]))
        return found

    def reached(self, start: set[str]) -> set[str]:
        """The modules, those that they use, and the packages around them; all where something is unknown."""
        found: set[str] = set()
        todo = list(start)
        while todo:
            if (module := todo.pop()) == PACKAGE:
                return set(self.files)
            if module not in found:
                found.add(module)
                todo += self.uses(module)
        around = {module.rsplit(".", n)[0] for module in found for n in range(1, module.count(".") + 1)}
        return found | around | {PACKAGE}


def at_runtime(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield tree
    checked = isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING")
    for child in tree.orelse if checked and isinstance(tree, ast.If) else ast.iter_child_nodes(tree):
        yield from at_runtime(child)


def bound(nodes: Iterable[ast.AST]) -> dict[str, set[Place]]:
    """What names that come from the package stand for."""
    found: dict[str, set[Place]] = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == PACKAGE:
            for name in node.names:
                found.setdefault(name.asname or name.name, set()).add((str(node.module), (name.name,)))
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == PACKAGE:
                    # `import minidiff.data` binds `minidiff`; with `as` it binds what it names.
                    place = (name.name, ()) if name.asname else (PACKAGE, ())
                    found.setdefault(name.asname or PACKAGE, set()).add(place)
    return found


def listed(tree: ast.Module) -> list[str]:
    """What a module lists in ``__all__``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError("`import *` from a module without a plain list __all__: name what is imported")


def _is_dynamic(nodes: Iterable[ast.AST]) -> bool:
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [str(getattr(node, "module", "")), *(name.name for name in node.names)]
            # A relative import is not followed here.
            if getattr(node, "level", 0) or DYNAMIC & {part for name in names for part in name.split(".")}:
                return True
        if isinstance(node, ast.Name) and node.id in DYNAMIC:
            return True
        if isinstance(node, ast.Attribute) and node.attr in ("import_module", "system", "popen"):
            return True
    return False


def used(code: str, library: Library) -> set[str]:
    """The modules that a notebook's code uses; the package itself where that cannot be told."""
    try:
        return library.used_in(ast.parse(HARMLESS.sub(r"\1pass", code)))
    except SyntaxError:  # `!command`, `%run`
        return {PACKAGE}


def fingerprint(notebook: Path, library: Library) -> str:
    """SHA-256 over the notebook's code and the behaviour of all that it reaches."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    modules = library.reached(used(code, library))
    files = [library.files[module] for module in modules] + [library.root / "constraints.txt"]
    strings = [code] + [_strings(library.tree(module)) for module in modules]
    for folder in DATA:
        if any(folder.rpartition("/")[2] in text for text in strings):
            files += [f for f in (library.root / folder).rglob("*") if f.is_file() and f.name[0] != "."]
    found = hashlib.sha256(sys.version.encode())
    for cell in cells:
        # Whether the book shows a cell changes nothing in its run.
        tags = [tag for tag in cell["metadata"].get("tags", []) if tag.startswith(("nbval-", "raises-"))]
        checked = cell["outputs"] if "nbval-check-output" in tags else []
        found.update(json.dumps([meaning("".join(cell["source"])), tags, checked]).encode())
    for file in sorted(files):
        found.update(f"{file.relative_to(library.root)} {library.content(file)}\n".encode())
    return found.hexdigest()


def _strings(tree: ast.AST) -> str:
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(value for value in constants if isinstance(value, str))
