"""The files around the code agree with each other: versions, notebooks, book."""

import json
import pkgutil
import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import nbformat
import pytest
import yaml
from mutants import MUTANTS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import minidiff
from tools.notebooks import problems, reading_minutes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def declared() -> list[Requirement]:
    """Every requirement in pyproject.toml: build system, library and extras."""
    project = PROJECT["project"]
    lists = [
        PROJECT["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    return [Requirement(line) for lines in lists for line in lines]


def pinned() -> dict[str, str]:
    """constraints.txt as {name: version}."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.+!]+", line), (
                f"constraints.txt: {line!r} is not an exact version"
            )
            name, version = line.split("==")
            assert canonicalize_name(name) not in pins, f"constraints.txt names {name} twice"
            pins[canonicalize_name(name)] = version
    return pins


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_every_dependency_has_a_lower_bound_and_a_pin_that_satisfies_it(requirement):
    assert any(spec.operator == ">=" for spec in requirement.specifier), f"{requirement}: no lower bound"
    version = pinned().get(canonicalize_name(requirement.name))
    assert version is not None, f"constraints.txt does not pin {requirement.name}"
    assert version in requirement.specifier, (
        f"constraints.txt pins {requirement.name} at {version}, not {requirement}"
    )


def test_what_is_installed_here_is_what_constraints_say():
    """Every package that minidiff needs, directly or not, is pinned: nothing floats."""
    pins = pinned()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [("minidiff", frozenset(PROJECT["project"]["optional-dependencies"]))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # an extra that is not installed here; its own name is checked above
        for requirement in map(Requirement, lines):
            active = not requirement.marker or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            if active:
                needed = canonicalize_name(requirement.name)
                assert needed in pins or needed == "minidiff", (
                    f"{name} needs {needed}: not in constraints.txt"
                )
                waiting.append((needed, frozenset(requirement.extras)))
    assert len(seen) > 100, f"only {len(seen)} packages were reached: is minidiff installed?"


def test_conda_installs_the_same():
    """environment.yml repeats no version: it hands pip the same files that make does."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    extras = ",".join(PROJECT["project"]["optional-dependencies"])
    assert pip == ["--constraint constraints.txt", f"--editable .[{extras}]"]
    (python,) = (d for d in environment["dependencies"] if str(d).startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["project"]["requires-python"])


def test_version_and_licence_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == minidiff.__version__ == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]


def test_every_chapter_is_in_the_book():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    chapters = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    listed = {c for c in chapters if c.startswith("notebooks/")}
    assert listed == {f"notebooks/{path.stem}" for path in NOTEBOOKS}


def test_every_module_has_its_reference_page():
    """Each module that users call into is named by exactly one automodule in book/api."""
    internal = {
        "minidiff.checks",
        "minidiff.state",
        "minidiff.files",
        "minidiff.device",
        "minidiff.critters.outlines",
    }
    pages = [path.read_text() for path in sorted((ROOT / "book/api").glob("*.md"))]
    named = sorted(name for page in pages for name in re.findall(r"automodule:: (minidiff\S*)", page))
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "minidiff").rglob("*.py")
        if not path.stem.startswith("_")
    )
    assert len(set(named)) == len(named), "a module has two automodule lines in book/api"
    assert internal < set(modules)
    modules = sorted(set(modules) - internal)
    assert set(named) == set(modules), (
        f"without a page in book/api: {set(modules) - set(named)}; "
        f"with a page, but gone: {set(named) - set(modules)}"
    )


def test_citation_keys_are_defined_once_and_every_citation_has_its_entry():
    entries = re.findall(r"^@\w+\{(\w+),", (ROOT / "book/references.bib").read_text(), re.MULTILINE)
    assert sorted(entries) == entries, "book/references.bib is sorted by key"
    assert len(set(entries)) == len(entries), "book/references.bib defines a key twice"
    texts = [path.read_text() for path in (*NOTEBOOKS, *sorted((ROOT / "book").rglob("*.md")))]
    cited = {
        key.strip()
        for text in texts
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in keys.split(",")
    }
    assert cited <= set(entries), f"cited and not in book/references.bib: {cited - set(entries)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_executed_and_fit_to_commit(path):
    """nbval passes silently over a notebook that was never executed; this does not."""
    assert list(problems(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_chapter_says_how_long_it_takes(path):
    notebook = nbformat.read(path, as_version=4)
    first = notebook.cells[0].source
    said = re.search(r"\*About (\d+) minutes to read, and [\w ]+ to run on two cores", first)
    assert said
    assert int(said[1]) == reading_minutes(notebook)


# --- the ledger of equations -----------------------------------------------------------------------

LEDGER = (ROOT / "book" / "equations.md").read_text()
ROWS = re.findall(r"^\| \{eq\}`(.+?)` \| \{py:\w+\}`(.+?)` \| `(.+?)::(.+?)` \|$", LEDGER, re.M)


def numbered_equations() -> set[str]:
    """The labels of the equations in the chapters: `$$ (label)` and `:label: name`."""
    labels: list[str] = []
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                labels += re.findall(r"\$\$\s*\(([\w-]+)\)", text)
                labels += re.findall(r"^:label:\s*([\w-]+)", text, re.M)
    assert len(labels) == len(set(labels)), "two equations share a label"
    return set(labels)


def test_every_equation_is_in_the_ledger():
    assert len(ROWS) == LEDGER.count("{eq}`"), "a row of book/equations.md is not in the usual form"
    known = {label for label, *_ in ROWS}
    assert known == numbered_equations()


@pytest.mark.parametrize("label,function,file,test", ROWS, ids=[row[0] for row in ROWS])
def test_what_the_ledger_names_exists(label, function, file, test):
    assert callable(pkgutil.resolve_name(function)), function
    assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text()


def test_every_promise_names_a_test():
    """A row of book/reliable.md ends with the tests that hold it."""
    rows = re.findall(r"^\| (?!You can|:--).* \| (.*) \|$", (ROOT / "book/reliable.md").read_text(), re.M)
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_fits_the_source(mutant):
    """`make mutants` plants them; a change of the source must not leave one without its place."""
    source = (ROOT / "minidiff" / f"{mutant.file}.py").read_text()
    assert source.count(mutant.old) == 1
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in mutant.tests)
    compile(source.replace(mutant.old, mutant.new), mutant.name, "exec")
