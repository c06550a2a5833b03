"""Measurements beside other libraries, on the CPU of one machine; ``make bench`` runs them all.

* :mod:`~benchmarks.training`: images a second while training;
* :mod:`~benchmarks.overhead`: what a sampler costs besides its network;
* :mod:`~benchmarks.weight`: time to import, size on disk, dependencies;
* :mod:`~benchmarks.common`: timing in turn, the machine in words, result files;
* :mod:`~benchmarks.tables`: from result files to the tables in ``README.md`` and ``book/benchmarks.md``.

A part is a module with three functions: ``run(...)`` measures and returns a dict, ``table(result)`` makes
Markdown of it, and ``main`` writes ``benchmarks/results/PART.json``. Its name stands in :data:`PARTS`.
"""

import os
from importlib.util import find_spec

# Progress bars of other libraries would fall between the lines of ours; they read this once.
os.environ.setdefault("TQDM_DISABLE", "1")

PARTS = tuple(
    part for part in ("weight", "overhead", "samplers", "training") if find_spec(f"benchmarks.{part}")
)
"""The parts there are, in the order in which they run."""
