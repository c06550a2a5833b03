"""Execute the book's notebooks in place, or check that they were.

    python tools/notebooks.py            # all of notebooks/, or the paths given
    python tools/notebooks.py --check    # say what is wrong with them, execute nothing

The book shows the outputs that are committed, so a notebook is committed executed from top to
bottom. What differs between runs and machines is left out: timings, widget state, the name of the
kernel. A hash of what the code cells do goes along: it tells whether a cell was edited after its output
was made. Comments, docstrings and the layout of code do not count, as no output tells them.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
CELL_TIMEOUT = 600  # seconds; the tests allow 300
SIZE_LIMIT = 3_500_000  # bytes; pictures in full colour and an animation or two, not a video
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SETUP_TAG = "remove-cell"  # the first code cell prepares the machine; the book does not show it
CHECKED_TAG = "nbval-check-output"  # nbval compares this cell's output with the committed one
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MAGIC = re.compile(r"^([ \t]*)([%!].*)", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(?:root|work|home|tmp|private|Users|var/folders)/")


def code_cells(notebook: Any) -> list[Any]:
    """The code cells that have something in them, in order."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def code_hash(notebook: Any) -> str:
    """SHA-256 of what all code cells do: it changes with the code, not with its layout or the prose."""
    cells = [meaning(cell.source) for cell in code_cells(notebook)]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def meaning(source: str) -> str:
    """What a cell does, however it is laid out: its code as parsed; its text where that is no Python."""
    try:
        # IPython's own lines, as `%pip install`, count by their text.
        tree = ast.parse(MAGIC.sub(lambda line: f"{line[1]}magic({line[2]!r})", source))
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    # IPython shows no value where a semicolon ends the cell.
    return _shape(tree) + (";" if source.rstrip().endswith(";") else "")


def _shape(node: object) -> str:
    """As `ast.dump`, but without empty fields: each version of Python has others."""
    if isinstance(node, list):
        return f"[{', '.join(map(_shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={_shape(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(fields)})"


def execute(path: Path) -> None:
    """Execute a notebook from top to bottom and write it back.

    The file is replaced only when every cell has run.

    Raises:
        CellExecutionError: a cell failed; the file is left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    # An MPLBACKEND set for scripts would keep the kernel from showing figures.
    os.environ.pop("MPLBACKEND", None)
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    ).execute()
    clean(notebook)
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def clean(notebook: Any) -> None:
    """Drop what differs from one machine or run to the next; store the hash of the code."""
    for cell in notebook.cells:
        for key in ("execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            output.get("metadata", {}).pop("needs_background", None)
            # A widget is a dead object without its kernel; what it said in plain text stays.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata = {
        "kernelspec": KERNEL,
        "language_info": {"name": "python"},
        "minidiff": {"code_hash": code_hash(notebook)},
    }


def problems(path: Path) -> Iterator[str]:
    """What keeps this notebook from being committed: one line each, none when all is well."""
    if (size := path.stat().st_size) > SIZE_LIMIT:
        yield f"is {size:,} bytes, over the limit of {SIZE_LIMIT:,}: make fewer or smaller figures"
    notebook = nbformat.read(path, as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        yield f"is not a valid notebook: {error}"
        return
    cells = code_cells(notebook)
    if not cells:
        yield "has no code cells"
        return
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        yield f"was not executed from top to bottom: its execution counts are {counts}"
    if (stored := notebook.metadata.get("minidiff", {}).get("code_hash")) is None:
        yield "was not executed by tools/notebooks.py: it has no code hash"
    elif stored != code_hash(notebook):
        yield "was edited after it was executed: its outputs are those of other code"
    if SETUP_TAG not in cells[0].metadata.get("tags", []):
        yield f"shows its setup: tag the first code cell {SETUP_TAG}"
    if not any(CHECKED_TAG in cell.metadata.get("tags", []) for cell in cells):
        yield f"checks no output: tag the cells whose output is the same every time {CHECKED_TAG}"
    for number, cell in enumerate(cells, 1):
        if CHECKED_TAG in cell.metadata.get("tags", []) and not cell.outputs:
            yield f"cell [{number}] is tagged {CHECKED_TAG} and has no output to check"
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"cell [{number}] failed: {output.ename}: {output.evalue}"
            if output.output_type == "stream" and output.name == "stderr":
                yield f"cell [{number}] wrote to stderr: {output.text.strip().splitlines()[0]}"
            if any(kind.startswith("image/") for kind in output.get("data", {})) and not alt_text(cell):
                yield f"cell [{number}] shows a picture and no alt text: set mystnb.image.alt in its metadata"
            if found := MACHINE_PATH.search(shown_text(output)):
                yield f"cell [{number}] shows a path of the machine it ran on: {found.group()}…"


def reading_minutes(notebook: Any) -> int:
    """How long it takes to read, to five minutes: 200 words or 40 lines of unfolded code a minute."""
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    words = sum(len(re.findall(r"\w+", text)) for text in prose)
    folded = {SETUP_TAG, "hide-input", "hide-cell"}
    lines = sum(
        len(cell.source.splitlines())
        for cell in code_cells(notebook)
        if folded.isdisjoint(cell.metadata.get("tags", []))
    )
    return max(5, 5 * round((words / 200 + lines / 40) / 5))


def alt_text(cell: Any) -> str:
    """What a reader hears who cannot see the cell's pictures."""
    return str(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")).strip()


def shown_text(output: Any) -> str:
    """What a reader can read in an output: text and HTML, not the bytes of pictures."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/html"))]
    return re.sub(r"data:image/[^\"')]*", "", "\n".join(parts))


def main() -> int:
    """The command line: exit status 0 when all went well, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Execute the book's notebooks in place.")
    parser.add_argument("paths", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--check", action="store_true", help="execute nothing, say what is wrong")
    arguments = parser.parse_args()
    paths = arguments.paths or sorted(NOTEBOOKS.glob("*.ipynb"))
    if not paths:
        parser.error(f"no notebooks in {NOTEBOOKS}")
    failed = False
    for path in paths:
        if not arguments.check:
            print(f"{path.name} …", flush=True)
            try:
                execute(path)
            except CellExecutionError as error:
                failed = True
                print(error, file=sys.stderr)
                continue
        for problem in problems(path):
            failed = True
            print(f"{path.name} {problem}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
