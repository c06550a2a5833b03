"""tools/notebooks.py executes a notebook cleanly and names what is wrong with one."""

from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebooks import SIZE_LIMIT, clean, code_hash, execute, meaning, problems


def code(source, outputs=(), count=None, tags=()) -> NotebookNode:
    cell = new_code_cell(source, outputs=list(outputs), execution_count=count)
    cell.metadata["tags"] = list(tags)
    return cell


def good_notebook() -> NotebookNode:
    """As a notebook should be committed: two cells, executed, the second one checked."""
    out = new_output("stream", name="stdout", text="2\n")
    notebook = new_notebook(
        cells=[
            code("import math", count=1, tags=["remove-cell"]),
            code("print(2)", [out], count=2, tags=["nbval-check-output"]),
        ]
    )
    clean(notebook)
    return notebook


def written(notebook: NotebookNode, folder: Path) -> Path:
    path = folder / "notebook.ipynb"
    nbformat.write(notebook, path)
    return path


def test_a_good_notebook_has_no_problems(tmp_path):
    assert list(problems(written(good_notebook(), tmp_path))) == []


def edit_after_execution(notebook):
    notebook.cells[1].source = "print(3)"


def execute_out_of_order(notebook):
    notebook.cells[1].execution_count = 3


def fail(notebook):
    notebook.cells[1].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]


def write_to_stderr(notebook):
    notebook.cells[1].outputs[0].name = "stderr"


def show_a_machine_path(notebook):
    notebook.cells[1].outputs[0].text = "wrote /home/someone/cat.png\n"


def lose_the_hash(notebook):
    del notebook.metadata["minidiff"]


def show_the_setup(notebook):
    notebook.cells[0].metadata["tags"] = []


def check_no_cell(notebook):
    notebook.cells[1].metadata["tags"] = []


def check_a_silent_cell(notebook):
    notebook.cells[1].outputs = []


def show_a_picture_in_silence(notebook):
    notebook.cells[1].outputs.append(new_output("display_data", {"image/png": "iVBORw0KGgo="}))


def grow_too_big(notebook):
    notebook.cells[1].outputs[0].text = "2" * SIZE_LIMIT


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (edit_after_execution, "was edited after it was executed"),
        (execute_out_of_order, "was not executed from top to bottom"),
        (fail, "cell [2] failed: ValueError: no"),
        (write_to_stderr, "cell [2] wrote to stderr"),
        (show_a_machine_path, "cell [2] shows a path of the machine"),
        (lose_the_hash, "has no code hash"),
        (show_the_setup, "shows its setup"),
        (check_no_cell, "checks no output"),
        (check_a_silent_cell, "cell [2] is tagged nbval-check-output and has no output to check"),
        (show_a_picture_in_silence, "cell [2] shows a picture and no alt text"),
        (grow_too_big, "over the limit"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_spoilt_notebook_has_exactly_that_problem(spoil, said, tmp_path):
    notebook = good_notebook()
    spoil(notebook)
    (problem,) = problems(written(notebook, tmp_path))
    assert said in problem


def test_the_hash_follows_the_code_and_not_the_prose():
    notebook = good_notebook()
    before = code_hash(notebook)
    notebook.cells.insert(1, new_markdown_cell("Prose."))
    assert code_hash(notebook) == before
    notebook.cells[0].source = "import cmath"
    assert code_hash(notebook) != before


LAID_OUT = """
total = sum(  # of three
    [1, 2, 3],
)
print(
    'the sum '
    'is', total)
"""


@pytest.mark.parametrize(
    ("source", "other", "same"),
    [
        ('total = sum([1, 2, 3])\nprint("the sum is", total)', LAID_OUT, True),
        ("f(a, b=1)", "f(a, b=2)", False),
        ("f(a, b=1)", "f(a, 1)", False),
        ("x = [1]", "x = (1,)", False),
        ("x = 1", "x = 1.0", False),
        ("x = None", "x = ''", False),
        ("if x:\n    a()\nb()", "if x:\n    a()\n    b()", False),
        ('def f():\n    """One."""\n    return 1', "def f():\n    return 1", True),
        ("class A:\n    x = 'one'", "class A:\n    x = 'two'", False),
        ("'shown below the cell'", "'shown otherwise'", False),
        ("plot()", "plot();", False),  # whose value is shown
        ("%pip install a", "%pip install b", False),
        ("if x:\n    %pip install a", "if x:  # why\n\n    %pip install a", True),
        ("y = %pwd", "y =  %pwd", False),  # no Python: by its text
    ],
)
def test_the_hash_follows_what_code_does_and_not_its_layout(source, other, same):
    assert (meaning(source) == meaning(other)) is same


def test_executing_twice_gives_the_same_file_and_one_fit_to_commit(tmp_path):
    notebook = good_notebook()
    notebook.cells[1].source = "for i in range(3):\n    print(i, flush=True)"
    for cell in notebook.cells:
        cell.outputs, cell.execution_count = [], None
    path = written(notebook, tmp_path)
    execute(path)
    first = path.read_bytes()
    assert list(problems(path)) == []
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "0\n1\n2\n"
    execute(path)
    assert path.read_bytes() == first


def test_a_failing_cell_leaves_the_file_as_it_was(tmp_path):
    notebook = good_notebook()
    notebook.cells[1].source = "1 / 0"
    path = written(notebook, tmp_path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
