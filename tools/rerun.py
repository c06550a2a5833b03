"""Run the notebooks that must run again, and remember which passed.

    python -m tools.rerun FOLDER      # FOLDER holds a stamp for each notebook that passed

A stamp is the notebook's fingerprint (tools/stale.py) when it passed. The notebooks whose fingerprint is
another now go through one call of pytest with nbval; those that pass are stamped, whatever the others do.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.stale import Library, fingerprint

ROOT = Path(__file__).parents[1]
NBVAL = ("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=300")


class Failures:
    """A plugin of pytest that notes in which files something failed."""

    def __init__(self) -> None:
        self.files: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A cell ran."""
        if report.failed:
            self.files.add(Path(report.location[0]).name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file was read."""
        if report.failed:
            self.files.add(Path(report.nodeid.split("::")[0]).name)


def run(paths: list[Path]) -> tuple[int, set[str]]:
    """Run notebooks in one call of pytest: its exit code, and the names of those that failed."""
    failures = Failures()
    code = pytest.main([*NBVAL, *(str(path) for path in paths)], plugins=[failures])
    # Anything but "passed" and "some failed" says nothing about those that are not named.
    whole = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return int(code), failures.files if whole else {path.name for path in paths}


def main(stamps: Path, root: Path = ROOT, run: Callable[[list[Path]], tuple[int, set[str]]] = run) -> int:
    """Bring the stamps up to date: 0, or pytest's exit code."""
    library = Library(root)
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    # Taken before the run: an edit made meanwhile counts as one made afterwards.
    now = {path: fingerprint(path, library) for path in notebooks}
    stamp = {path: stamps / f".executed-{path.stem}" for path in notebooks}
    stale = [p for p in notebooks if not stamp[p].is_file() or stamp[p].read_text() != now[p]]
    print(f"Notebooks: {len(notebooks)}, to run: {', '.join(p.stem for p in stale) or 'none'}.", flush=True)
    if not stale:
        return 0
    code, failed = run(stale)
    stamps.mkdir(parents=True, exist_ok=True)
    for path in stale:
        if path.name not in failed:
            stamp[path].write_text(now[path])
    return code


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tools.rerun FOLDER")
    sys.exit(main(Path(sys.argv[1])))
