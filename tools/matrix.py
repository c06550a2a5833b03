"""Do the unit tests pass on every Python that minidiff supports, and with the oldest versions that will do?

    python -m tools.matrix                                   # all cells, all tests: hours on two cores
    python -m tools.matrix --cell "3.12 pinned" -- -m "not slow"
    python -m tools.matrix --cell "3.11 oldest" --resolve    # only: is there such a set of versions?

A cell is a Python and a set of versions: "pinned" as constraints.txt has them, or "oldest", the lower bounds
of pyproject.toml. Each gets a virtual environment of its own, several gigabytes for some minutes, in the
system's folder for temporary files. What comes after ``--`` goes to pytest. Results go to tests/matrix.json,
which the page *What you can rely on* quotes; a cell that was not run keeps what it had.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minidiff.files import write_whole

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tests" / "matrix.json"
CELLS = ("3.11 pinned", "3.12 pinned", "3.13 pinned", "3.11 oldest")
"""The oldest versions are tried on the oldest Python: later ones have no wheels of some of them."""
EXTRAS = ("book", "tests")
EXCHANGED = ("diffusers",)
"""Of the extras, whose schedulers and networks users exchange with ours: its oldest version counts, too."""
SHOWN = ("torch", "transformers", "numpy", "accelerate", "tokenizers")
"""Packages whose versions stand in the result."""


class Failed(Exception):
    """A cell could not be made."""


def oldest(project: dict[str, Any], pins: str) -> list[str]:
    """pip's constraints for the oldest versions: the lower bound of each dependency.

    What only the tests or the book need is pinned as ever, but for :data:`EXCHANGED`; what others bring in is
    free, since it must go with the old ones.

    Args:
        project: pyproject.toml, parsed.
        pins: the text of constraints.txt.

    Raises:
        ValueError: a dependency has no lower bound.
    """
    extras = [text for e in EXTRAS for text in project["project"]["optional-dependencies"][e]]
    lines = []
    for text in [
        *project["project"]["dependencies"],
        *(t for t in extras if Requirement(t).name in EXCHANGED),
    ]:
        requirement = Requirement(text)
        bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{text}: give one lower bound")
        lines.append(f"{requirement.name}=={bounds[0]}")
    lowest = {canonicalize_name(Requirement(line).name) for line in lines}
    pinned = {canonicalize_name(Requirement(text).name) for text in extras} - lowest
    kept = [line for line in pins.splitlines() if "==" in line and not line.startswith("#")]
    return [*lines, *(line for line in kept if canonicalize_name(Requirement(line).name) in pinned)]


def counts(report: Path) -> dict[str, Any]:
    """What pytest's report (JUnit's XML) says: how many tests passed and were skipped, and which failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [
        f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {p.tag for p in c}
    ]
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return {"passed": len(cases) - skipped - len(bad), "skipped": skipped, "failed": bad}


def call(*words: str | Path, **options: Any) -> str:
    """Run a program; what it writes.

    Raises:
        Failed: it ends with an error, or is not there.
    """
    try:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    except OSError as error:
        raise Failed(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise Failed(f"{' '.join(map(str, words[:5]))}: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout


def run_cell(cell: str, tests: Sequence[str], jobs: int, resolve: bool, folder: Path) -> dict[str, Any]:
    """Make the environment of a cell in ``folder`` and run the tests in it.

    Args:
        cell: one of :data:`CELLS`.
        tests: what pytest is told besides.
        jobs: tests side by side.
        resolve: only ask pip which versions it would take.
        folder: empty; left to the caller.

    Raises:
        Failed: there is no such Python, pip finds no set of versions, or pytest ends without a report.
    """
    python, versions = cell.split()
    call(f"python{python}", "-m", "venv", folder / "venv")
    own = folder / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    constraints = ROOT / "constraints.txt"
    if versions == "oldest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        lines = oldest(project, constraints.read_text())
        constraints = folder / "oldest.txt"
        constraints.write_text("\n".join(lines) + "\n")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints)
    what = f"{ROOT}[{','.join(EXTRAS)}]"
    if resolve:
        call(own, *pip, "--dry-run", "--report", folder / "plan.json", what)
        plan = json.loads((folder / "plan.json").read_text())["install"]
        about = [entry["metadata"] for entry in plan]
        chosen = {str(canonicalize_name(found["name"])): found["version"] for found in about}
        return {"versions": {name: chosen[name] for name in SHOWN}}
    call(own, *pip, "--no-cache-dir", "--editable", what)
    report, started = folder / "report.xml", time.monotonic()
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    side = ["--numprocesses", str(jobs), "--dist", "loadfile"]
    words = [own, "-m", "pytest", "-q", *side, f"--junitxml={report}", *tests]
    subprocess.run(
        [str(word) for word in words], cwd=ROOT, env=quiet, check=False
    )  # the report says how it went
    if not report.is_file():
        raise Failed(f"{cell}: pytest ended without a report")
    ask = "import json, platform, sys; from importlib.metadata import version; "
    ask += "print(json.dumps([platform.python_version(), *map(version, sys.argv[1:])]))"
    exact, *found = json.loads(call(own, "-c", ask, *SHOWN))
    return {
        "python": exact,
        "versions": dict(zip(SHOWN, found, strict=True)),
        "tests": " ".join(tests) or "all",
        **counts(report),
        "seconds": round(time.monotonic() - started),
    }


def main() -> int:
    """Run the cells that are asked for: 0, or 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", action="append", choices=CELLS, help="one of the cells; else all")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side")
    parser.add_argument("--resolve", action="store_true", help="only ask pip which versions it would take")
    parser.add_argument("tests", nargs="*", help="what pytest is told besides, after --")
    asked = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    good = True
    for cell in asked.cell or CELLS:
        folder = Path(tempfile.mkdtemp(prefix="minidiff-matrix-"))
        try:
            found = run_cell(cell, asked.tests, asked.jobs, asked.resolve, folder)
        except Failed as error:
            print(f"{cell}: {error}", file=sys.stderr)
            good = False
            continue
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(cell, json.dumps(found))
        if not asked.resolve:
            good &= not found["failed"]
            results[cell] = found
            ordered = {name: results[name] for name in CELLS if name in results}
            with write_whole(RESULT) as unfinished:
                unfinished.write_text(json.dumps(ordered, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
