"""How heavy is a library? Time to import it, its size on disk, and how much it brings along.

Every import is timed in a fresh interpreter, the libraries in turn. What is imported is what a training run
needs: a network, a noise schedule, and the library's own training loop where it has one.

    python -m benchmarks.weight [--rounds 6]
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.common import PEERS, ROUNDS, installed, markdown, record, show, spread, under

IMPORTS = {
    "torch": "import torch",
    "minidiff": "from minidiff import Cosine, Diffusion, UNet, ddim, train",
    "diffusers": "from diffusers import DDPMScheduler, UNet2DConditionModel",
    "denoising-diffusion-pytorch": "from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet",
    "smalldiffusion": "from smalldiffusion import ScheduleDDPM, Unet, samples, training_loop",
    "azula": "from azula.denoise import KarrasDenoiser\n"
    "from azula.nn.unet import UNet\n"
    "from azula.noise import VPSchedule",
}
"""What is imported of each library."""

MADE = frozenset({"book", "tests"})
"""The extras that ``make install`` asks for."""

EXTRAS = {"diffusers": frozenset({"torch"})}
"""What a user must ask for besides the name: diffusers alone brings no torch."""


def seconds_to_import(statement: str) -> float:
    """Seconds that an import takes in a fresh interpreter; its own start does not count."""
    code = f"import time\nbegan = time.perf_counter()\n{statement}\nprint(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


@cache
def files(name: str) -> dict[Path, int]:
    """The files of an installed package and their bytes, without what Python compiles of them.

    Of a package that is installed in place (``pip install --editable``) the files of its folder count.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    found = distribution(name)
    listed = [Path(str(found.locate_file(file))) for file in found.files or []]
    spec = find_spec(name.replace("-", "_"))
    if spec is not None and spec.origin is not None and spec.submodule_search_locations:
        folder = Path(spec.origin).parent
        if not any(file.is_relative_to(folder) and file.name == "__init__.py" for file in listed):
            listed = [*folder.rglob("*")]
    return {
        file: file.stat().st_size for file in listed if file.is_file() and "__pycache__" not in file.parts
    }


def needed(name: str, extras: frozenset[str] = frozenset(), deep: bool = True) -> set[str]:
    """The packages that a package needs on this machine, itself not among them.

    Args:
        name: of the package.
        extras: those of its extras that are wanted.
        deep: whether those that they need count too.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting, found = [(canonicalize_name(name), extras)], set[str]()
    while waiting:
        package, wanted = waiting.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        try:
            lines = requires(package) or []
        except PackageNotFoundError:
            if package == canonicalize_name(name):
                raise
            continue  # needed, and not here: it counts, and what it needs cannot be known
        for requirement in map(Requirement, lines):
            if requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in wanted | {""}
            ):
                found.add(canonicalize_name(requirement.name))
                if deep:
                    waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found - {canonicalize_name(name)}


def with_needed(name: str, extras: frozenset[str] = frozenset()) -> int:
    """Bytes of a package and of all that it needs, as far as they are installed."""
    total = sum(files(name).values())
    for other in needed(name, extras):
        try:
            total += sum(files(other).values())
        except PackageNotFoundError:
            continue
    return total


def run(*, rounds: int = ROUNDS, names: tuple[str, ...] = tuple(IMPORTS)) -> dict[str, Any]:
    """Measure.

    Args:
        rounds: imports of each library, in turn; one before does not count, as it reads from the disk.
        names: which of :data:`IMPORTS`.

    Returns:
        ``settings``; ``rows``, for each library its seconds to import, its bytes, those of them that are
        Python code, its direct and all dependencies and their bytes, its own included; ``environment``, the
        bytes of what ``make install`` brings; ``skipped``, the libraries that are not installed.
    """
    present = [name for name in names if name not in PEERS or installed(name)]
    took: dict[str, list[float]] = {name: [] for name in present}
    for turn in range(rounds + 1):
        for name in present:
            seconds = seconds_to_import(IMPORTS[name])
            if turn > 0:
                took[name].append(seconds)
    rows = []
    for name in present:
        own, extras = files(name), EXTRAS.get(name, frozenset())
        rows.append(
            {
                "library": name,
                "import": IMPORTS[name],
                "seconds": spread(took[name]),
                "bytes": sum(own.values()),
                "python_bytes": sum(size for file, size in own.items() if file.suffix == ".py"),
                "direct_dependencies": len(needed(name, extras, deep=False)),
                "all_dependencies": len(needed(name, extras)),
                "all_bytes": with_needed(name, extras),
            }
        )
    skipped = [f"{name} is not installed" for name in names if name not in present]
    environment = {"extras": sorted(MADE), "bytes": with_needed("minidiff", MADE)}
    return {"settings": {"rounds": rounds}, "rows": rows, "environment": environment, "skipped": skipped}


def table(result: Mapping[str, Any]) -> str:
    """The rows in seconds and megabytes."""
    rows = [
        [
            row["library"],
            show(row["seconds"]),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['python_bytes'] / 1e6:.2f}",
            str(row["direct_dependencies"]),
            str(row["all_dependencies"]),
            f"{row['all_bytes'] / 1e9:.1f}",
        ]
        for row in result["rows"]
    ]
    header = ["library", "seconds to import", "MB", "of it Python code", "needs", "in all", "GB in all"]
    return (
        markdown(header, rows)
        + f"\nWhat `make install` brings takes {result['environment']['bytes'] / 1e9:.1f} GB. "
        + f"Rounds: {result['settings']['rounds']}. "
        + under(result)
    )


def main() -> None:
    """Run and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(record("weight", run, **vars(parser.parse_args())))


if __name__ == "__main__":
    main()
