"""What the benchmarks share: timing in turn, the machine in words, result files, Markdown tables."""

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch

from minidiff.files import write_whole

RESULTS = Path(__file__).parent / "results"
ROUNDS = 6
"""Runs of every contender; the figures are their least, median and greatest."""

PEERS = {
    "diffusers": "diffusers",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch",
    "smalldiffusion": "smalldiffusion",
    "azula": "azula",
}
"""The libraries that minidiff is compared with, and the names that they are imported by."""


def installed(library: str) -> bool:
    """Whether a library of :data:`PEERS` can be imported."""
    return find_spec(PEERS[library]) is not None


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several functions in turn, A B C A B C, so that what else the machine does hits all alike.

    Every function is called once before, unmeasured. ``torch.utils.benchmark`` measures one function at a
    time, and calls each at least twice more to warm up: too much for a training step of seconds.

    Args:
        contenders: the functions by name.
        rounds: turns of each.
        seconds: a turn ends with the first call after so long.
        clock: tells the time in seconds.

    Returns:
        For each name the seconds of one call, a mean for each round.

    Raises:
        ValueError: ``rounds`` is smaller than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds}: time at least 1")
    for call in contenders.values():
        call()
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            calls, began = 0, clock()
            while True:
                call()
                calls += 1
                if (passed := clock() - began) >= seconds:
                    break
            took[name].append(passed / calls)
    return took


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Least, median and greatest of the runs, and the runs, to so many significant digits."""
    short = [float(f"{value:.{digits}g}") for value in values]
    return {
        "min": min(short),
        "median": float(f"{statistics.median(short):.{digits}g}"),
        "max": max(short),
        "runs": short,
    }


def machine() -> dict[str, Any]:
    """The machine in words and numbers; nothing says whose it is or where."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """What the processor calls itself. Python does not know on Linux, where the kernel says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(part: str, run: Callable[..., dict[str, Any]], folder: Path = RESULTS, **settings: Any) -> Path:
    """Run a part and write ``PART.json``, whole or not at all: what was measured, when, how and on what.

    How busy other programs kept the processor just before is written too: a figure from a busy machine
    should be told from one that is not.

    Args:
        part: name of the module.
        run: its function; each line under ``skipped`` of what it returns is printed.
        folder: where to.
        settings: arguments of ``run``.

    Returns:
        The file.
    """
    busy = psutil.cpu_percent(interval=1.0)
    if busy > 20:
        print(f"{part}: other programs keep the processor {busy:.0f} % busy, so the figures will scatter")
    result = run(**settings)
    for line in result.get("skipped", ()):
        print(f"left out: {line}")
    made_by = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "-m", f"benchmarks.{part}", *sys.argv[1:]]),
        "machine": machine(),
        "busy_before_percent": busy,
        "versions": {"minidiff": version("minidiff")}
        | {name: version(name) for name in PEERS if installed(name)},
    }
    return write_json(folder / f"{part}.json", {"made_by": made_by, **result})


def write_json(file: Path, values: object) -> Path:
    """Write a result file, whole or not at all; the file is given back."""
    with write_whole(file) as unfinished:
        unfinished.write_text(json.dumps(values, indent=1) + "\n")
    return file


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: text to the left, and from the second column on to the right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def show(values: Mapping[str, Any], unit: float = 1.0) -> str:
    """A spread in a table: the median, and from where to where the runs went, if they differ.

    Args:
        values: what :func:`spread` made.
        unit: numbers are given in this unit.
    """
    low, median, high = (_short(values[key] / unit) for key in ("min", "median", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def _short(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def under(result: Mapping[str, Any]) -> str:
    """The line under a table: the day, the machine and the versions."""
    made_by = result["made_by"]
    on = made_by["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in made_by["versions"].items())
    return (
        f"Measured on {made_by['date']} by `{made_by['command']}`: {on['processor']}, {on['cores']} cores, "
        f"{on['threads']} {'thread' if on['threads'] == 1 else 'threads'}, {on['instructions']}, "
        f"{made_by['busy_before_percent']:.0f} % busy before; {on['system']}, Python {on['python']}, "
        f"torch {on['torch']}, {versions}.\n"
    )
