"""From result files to the tables in ``README.md`` and ``book/benchmarks.md``: nothing is retyped.

A table stands between two comments, ``<!-- bench:training -->`` and ``<!-- /bench:training -->`` on the page,
``<!-- bench -->`` and ``<!-- /bench -->`` in the README.

    python -m benchmarks.tables
"""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import LONGER, PARTS
from benchmarks.common import RESULTS, markdown, show
from minidiff.files import write_whole

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "book" / "benchmarks.md", ROOT / "README.md"


def results(folder: Path = RESULTS) -> dict[str, Any]:
    """What the parts have written, by their names."""
    files = {part: folder / f"{part}.json" for part in (*PARTS, *LONGER)}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


def fill(text: str, name: str, table: str) -> str:
    """The text with the table between the two comments of that name.

    Raises:
        ValueError: the text does not have each of the comments once.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(
            f"no place for a table: write {begin.strip()} and {end.strip()} once, on their own lines"
        )
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n{table}\n{end}{after}"


def page(text: str, found: Mapping[str, Any]) -> str:
    """The page of the book with its tables."""
    for part, result in found.items():
        text = fill(text, f"bench:{part}", import_module(f"benchmarks.{part}").table(result))
    return text


def summary(found: Mapping[str, Any]) -> str:
    """The table of the README: from ``training`` every network in the loop of its own library, and from
    ``weight`` what its library weighs."""
    training = {(row["name"], row["size"]): row for row in found["training"]["rows"]}
    weight = {row["library"]: row for row in found["weight"]["rows"]}
    own = [row for row in found["training"]["rows"] if row["our_network"] == (row["library"] == "minidiff")]
    sizes = sorted({row["size"] for row in own})
    header = [
        "", "computes in", *[f"images/s at {size}×{size}" for size in sizes], "seconds to import", "MB"
    ]  # fmt: skip
    rows = []
    for name, dtype in dict.fromkeys((row["name"], row["computes_in"]) for row in own):
        speeds = [show(training[name, size]["images_per_s"]) for size in sizes]
        heavy = weight.get(name)
        weighs = ["", ""] if heavy is None else [show(heavy["seconds"]), f"{heavy['bytes'] / 1e6:.1f}"]
        rows.append([name, dtype, *speeds, *weighs])
    on = found["training"]["made_by"]["machine"]
    return (
        markdown(header, rows)
        + f"\nMedian (least to greatest) on one machine: {on['processor']}, {on['cores']} cores, torch "
        f"{on['torch']}.\n"
    )


def write_tables() -> None:
    """Bring page and README up to date."""
    found = results()
    for file, text in (
        (PAGE, page(PAGE.read_text(), found)),
        (README, fill(README.read_text(), "bench", summary(found))),
    ):
        with write_whole(file) as unfinished:
            unfinished.write_text(text)


if __name__ == "__main__":
    write_tables()
