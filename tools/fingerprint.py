"""What the library does, as one number: does a change need the notebooks to run again?

    python tools/fingerprint.py FILE FOLDER...    # FILE holds the hash of what is in the folders

FILE is written only when the hash is another than the one it holds, so `make` sees it as changed only
then. Docstrings and comments do not count, nor does the layout of the code: no notebook can tell them.
"""

import ast
import hashlib
import sys
from pathlib import Path


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


def fingerprint(folders: list[Path]) -> str:
    """SHA-256 over the names and the behaviour of all files below the folders."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            hidden = any(part.startswith((".", "__pycache__")) for part in file.parts)
            if file.is_file() and not hidden:
                content = hashlib.sha256(behaviour(file)).hexdigest()
                found.update(f"{file.relative_to(folder)} {content}\n".encode())
    return found.hexdigest()


def main(stamp: Path, folders: list[Path]) -> None:
    """Bring ``stamp`` up to date; leave it as it is where nothing changed."""
    now = fingerprint(folders) + "\n"
    if not stamp.is_file() or stamp.read_text() != now:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(now)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python tools/fingerprint.py FILE FOLDER...")
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
