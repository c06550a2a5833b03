"""tools/matrix.py: what the cells of the matrix are made of, and what the page says of them."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tools import matrix

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_oldest_versions_are_the_bounds_of_what_is_needed():
    project = {
        "project": {
            "dependencies": ["torch>=2.11", "huggingface-hub>=1.0,<3"],
            "optional-dependencies": {
                "book": ["nbclient>=0.10"],
                "tests": ["pytest>=8.3", "diffusers>=0.36"],
            },
        }
    }
    pins = "# torch==9\nfilelock==4.2\nhuggingface_hub==2.4.0\nnbclient==0.11\npytest==9.2.0\ntorch==2.15.0"
    assert matrix.oldest(project, pins) == [
        "torch==2.11", "huggingface-hub==1.0", "diffusers==0.36", "nbclient==0.11", "pytest==9.2.0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="torch: give one lower bound"):
        matrix.oldest({"project": {**project["project"], "dependencies": ["torch"]}}, pins)
    ours = matrix.oldest(PROJECT, (ROOT / "constraints.txt").read_text())
    assert len(ours) > len(PROJECT["project"]["dependencies"])


def test_all_cells_are_on_pythons_that_are_supported():
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    pythons = {cell.split()[0] for cell in matrix.CELLS}
    assert all(f"{python}.0" in allowed for python in pythons)
    assert min(pythons, key=lambda p: int(p.split(".")[1])) == "3.11"
    assert "3.11 oldest" in matrix.CELLS


def test_a_report_is_counted(tmp_path):
    (tmp_path / "report.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="test_one"/>'
        '<testcase classname="tests.test_a" name="test_two[1]"><failure message="no"/></testcase>'
        '<testcase classname="tests.test_b" name="test_three"><skipped/></testcase>'
        '<testcase classname="tests.test_b" name="test_four"><error/></testcase></testsuite></testsuites>'
    )
    assert matrix.counts(tmp_path / "report.xml") == {
        "passed": 1, "skipped": 1, "failed": ["tests.test_a::test_two[1]", "tests.test_b::test_four"],
    }  # fmt: skip


def test_a_python_that_is_not_there_is_named(tmp_path):
    with pytest.raises(matrix.Failed, match=r"^python9.9: No such file"):
        matrix.run_cell("9.9 pinned", [], 1, False, tmp_path)


def test_the_page_quotes_what_matrix_has_written():
    page = (ROOT / "book" / "reliable.md").read_text()
    rows = []
    for cell, found in json.loads(matrix.RESULT.read_text()).items():
        python, versions = cell.split()
        assert found["python"].startswith(f"{python}.")
        assert not found["failed"]
        packages = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
        told = "all tests" if found["tests"] == "all" else f"`{found['tests']}`"
        rows.append(
            f"| Python {found['python']}, {versions}: {packages}; {told}: {found['passed']:,} passed, "
            f"{found['skipped']} skipped |"
        )
    assert all(row in page for row in rows)
    assert len(rows) == len(re.findall(r"^\| Python 3\.", page, re.M))
