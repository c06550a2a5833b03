"""Every symbol of a numbered equation is explained on the page of notation."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOTATION = (ROOT / "book" / "notation.md").read_text()

# What a formula is laid out with, and the functions that every reader knows: nothing to explain.
LAYOUT = r"""
\, \; \: \! \\ \{ \} \left \right \big \Big \bigl \bigr \Bigl \Bigr \quad \qquad \frac \dfrac \tfrac \sqrt
\underbrace \widehat \mid \vert \lVert \rVert \lvert \rvert \cdot \times \dots \le \ge \ne \approx
\sim \propto \in \to \leftarrow \Rightarrow \Longrightarrow \top \infty \exists \log \exp \sin \cos \tanh
\min \max \sum \prod \int \partial \Vert \longrightarrow
"""
# A word explains itself, and so does the d of an integral.
WORDS = re.compile(r"\\(?:text|mathrm|operatorname|begin|end)\*?\{[^{}]*\}|\\mathrm d")
ACCENT = r"\\(?:hat|tilde|bar|mathbb|mathcal)\s*\{?\s*(?:\\[A-Za-z]+|[A-Za-z])\}?"  # it belongs to its letter
SYMBOL = re.compile(ACCENT + r"|\\(?:[A-Za-z]+|.)|[A-Za-z]", re.DOTALL)


def symbols(formula: str) -> set[str]:
    """The letters and commands of a formula, a letter with a hat or the like as one."""
    found = (re.sub(r"[{}\s]", "", symbol) for symbol in SYMBOL.findall(WORDS.sub(" ", formula)))
    return set(found) - {*LAYOUT.split(), "\\"}


def formulas(text: str) -> list[str]:
    """What stands between dollars, single or double."""
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL) + re.findall(
        r"\$([^$]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    )


def numbered(path: Path) -> list[tuple[str, str]]:
    """(label, formula) of a chapter's numbered equations: `$$ (label)` and `:label:`."""
    found = []
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            text = "".join(cell["source"])
            found += [(label, body) for body, label in re.findall(r"\$\$([^$]+)\$\$ *\(([\w-]+)\)", text)]
            found += re.findall(r"```\{math\}\n:label: *([\w-]+)\n(.*?)```", text, re.DOTALL)
    return found


def explained() -> tuple[set[str], dict[str, set[str]]]:
    """The symbols of the whole book, and those that the last table keeps for one chapter."""
    book, _, table = NOTATION.partition("## Letters of one chapter")
    book = re.sub(r"^## Translating.*?(?=^## )", "", book, flags=re.MULTILINE | re.DOTALL)  # others' letters
    chapters: dict[str, set[str]] = {}
    for chapter, letters, meaning in re.findall(r"^\| *(.*?) *\| (.*?) \| (.*) \|$", table, re.MULTILINE):
        now = chapters.setdefault(chapter or list(chapters)[-1], set())
        now |= {symbol for formula in formulas(f"{letters} {meaning}") for symbol in symbols(formula)}
    return {symbol for formula in formulas(book) for symbol in symbols(formula)}, chapters


def test_symbols_are_told_from_layout():
    formula = (
        r"\hat x_0 = \frac{\tilde{\sigma}^2}{\text{one}} \mathcal N(0, I) \,\Big(\alpha_t\Big) \bar\theta"
    )
    assert symbols(formula) == {r"\hatx", r"\tilde\sigma", r"\mathcalN", "I", r"\alpha", "t", r"\bar\theta"}
    assert symbols(r"\varsigma") == {r"\varsigma"}
    assert symbols(r"\alpha_{t|s}") == symbols(r"\alpha_{t \vert s}") == {r"\alpha", "t", "s"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_symbol_of_a_numbered_equation_is_on_the_page_of_notation(path):
    book, chapters = explained()
    number = [p for p in NOTEBOOKS if p.stem[:2] != "00"].index(path) + 1 if path.stem[:2] != "00" else 0
    known = book | chapters["several"] | chapters.get(str(number), set())
    for label, formula in numbered(path):
        missing = sorted(symbols(formula) - known)
        assert not missing, f"equation {label}: book/notation.md does not say what {missing} is"


def test_the_equations_and_the_letters_are_found():
    assert sum(len(numbered(path)) for path in NOTEBOOKS) > 50
    book, chapters = explained()
    assert {r"\alpha", r"\sigma", "x", "t"} <= book
    assert {"Q", "K", "V"} <= chapters["3"]
    assert not {"Q", "d", "w"} & book
