"""Measurements beside other libraries, on the CPU of one machine; ``make bench`` runs them all.

* :mod:`~benchmarks.samplers`: error against calls, on distributions known exactly;
* :mod:`~benchmarks.quality`: pictures of the shipped model against calls;
* :mod:`~benchmarks.minutes`: pictures after eight minutes of training;
* :mod:`~benchmarks.training`: images a second while training;
* :mod:`~benchmarks.overhead`: what a sampler costs besides its network;
* :mod:`~benchmarks.weight`: time to import, size on disk, dependencies;
* :mod:`~benchmarks.common`: timing in turn, the machine in words, result files;
* :mod:`~benchmarks.tables`: from result files to the tables in ``README.md`` and ``book/benchmarks.md``.

A part is a module with ``run(...)``, which measures and returns a dict, ``table(result)``, which makes
Markdown of it, and ``main``, which writes ``benchmarks/results/PART.json``. Its name stands in :data:`PARTS`
or :data:`LONGER`.
:mod:`~benchmarks.gpu` is a script of its own, for a machine with a GPU.
"""

import os

# Progress bars of other libraries would fall between the lines of ours; they read this once.
os.environ.setdefault("TQDM_DISABLE", "1")

PARTS = ("weight", "overhead", "samplers", "training")
"""The parts, in the order in which they run."""
LONGER = ("quality", "minutes")
"""Parts that take too long for ``make bench``: each runs by its own command."""
