"""Run all parts, one after the other, and make the tables: ``python -m benchmarks``."""

import subprocess
import sys

from benchmarks import PARTS
from benchmarks.tables import write_tables


def main() -> None:
    """Each part has a process of its own, so that none runs in the memory that another leaves."""
    for part in PARTS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{part}"], check=True)
    write_tables()


if __name__ == "__main__":
    main()
