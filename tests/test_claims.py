"""What the chapters claim, and the cell, file, equation or paper that holds it: tests/claims.toml.

A claim is a sentence that compares and has a number in it, or one that gives a cause. Each stands in the
list with its evidence, or with the reason why it is none. Its numbers are looked up where the evidence prints
them, and its ratios are computed from there. So prose cannot drift from the outputs, and no new claim comes
in without something that holds it.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LISTED = tomllib.loads((ROOT / "tests" / "claims.toml").read_text(encoding="utf-8"))
CLAIMS = LISTED["claim"]
NO_CLAIMS = LISTED["no_claim"]
DONE = LISTED["chapters"]
EVERY = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
REASONS = {"setting", "definition", "derivation", "exercise", "question", "remark"}
EVIDENCE = ("cells", "cards", "pictures", "equations", "cites", "tests", "argument")

# --- what a claim is --------------------------------------------------------------------------------------

SHARES = (
    r"twice|half|halv\w+|doubl(?!e precision)\w+|\w+fold"
    r"|(?:a|one|two|few|nearly|about) (?:third|quarter|fifth|tenth|hundredth)s?"
)
COUNTS = r"(?:two|three|four|five|six|seven|eight|nine|ten|twelve)"
NUMBER = re.compile(
    rf"\d|\b(?:{SHARES}|fifteen|twenty|dozens?|hundreds?|thousands?|one in \w+"
    rf"|{COUNTS} (?:times|per cent|in|of|out|hundred\w*))\b",
    re.IGNORECASE,
)
MARKER = re.compile(
    rf"%|\b(?:{SHARES}|times|per cent|one in \w+|cases? (?:of|in)|than|nearly|why|agree\w*|grows?|falls?"
    r"|rises?|lost|missing|faster|slower|better|best(?! guess)|worse|worst|most|fewer|less|larger|smaller"
    r"|nearer|closer|higher|lower|stronger|wider|narrower)\b",
    re.IGNORECASE,
)
CAUSE = re.compile(r"\b(?:because|is why|to blame|the reason)\b")
RATIO = re.compile(rf"\b(?:{SHARES}|times)\b", re.IGNORECASE)  # words for what two printed numbers give
PLAIN = re.compile(r"\$\s*[-+]?[\d.,]+\s*(?:\\?%)?\s*\$")  # a number that happens to stand in dollars


def normal(text: str) -> str:
    return " ".join(text.split())


def paragraphs(source: str) -> Iterator[str]:
    """The running text of a markdown cell: no headings, tables, fences or displayed formulas."""
    source = re.sub(r"\$\$.*?\$\$(?:[ \t]*\([\w-]+\))?", "\n", source, flags=re.DOTALL)
    lines: list[str] = []
    for line in [*source.split("\n"), ""]:
        line = line.strip()
        item = re.match(r"(?:[-*]|\d+\.)\s+", line)
        if lines and (item or not line or re.match(r"#|\||:::|```|:\w+:", line)):
            yield normal(" ".join(lines))
            lines = []
        if line and not re.match(r"#|\||:::|```|:\w+:", line):
            lines.append(line[item.end() :] if item else line)


def sentences(source: str) -> Iterator[str]:
    for paragraph in paragraphs(source):
        yield from re.split(r"(?<=[.!?])(?<!\beq\.)[*)]*\s+(?=[A-Z0-9$*`{(\"“])", paragraph)


def without_references(text: str) -> str:
    """Without what has numbers that say nothing: citations, links, code, numbers of chapters and sections."""
    text = re.sub(r"\{[\w:]+\}`[^`]*`(?:,? (?:section|appendix|equation|eq\.|table)s? [\w.]+)?", " ", text)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", " ", text)
    return re.sub(
        r"\b(?:[Cc]hapters?|[Ss]ections?|[Ee]xercises?|equations?|eq\.) [\d.]+(?: and \d+)?", " ", text
    )


def without_formulas(text: str) -> str:
    return re.sub(r"\$[^$]*\$", lambda m: m[0] if PLAIN.fullmatch(m[0]) else " ", text)


def is_claim(sentence: str) -> bool:
    text = without_formulas(without_references(sentence))
    return bool((NUMBER.search(text) and MARKER.search(text)) or CAUSE.search(text))


def pattern(text: str) -> str:
    """A listed text, in which an ellipsis stands for what is left out, such as a formula."""
    return ".*?".join(map(re.escape, normal(text).split("…")))


def covers(text: str, sentence: str) -> bool:
    return sentence in normal(text) or re.fullmatch(pattern(text), sentence) is not None


# --- what holds it ----------------------------------------------------------------------------------------


@cache
def chapter(name: str) -> dict[str, Any]:
    """{cell id: cell} of a chapter, in order."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: cell for cell in cells}


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def printed(cell: dict[str, Any]) -> list[str]:
    """The lines of what a cell printed."""
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.get("outputs", [])]
    return "\n".join("".join(text) for text in texts).split("\n")


def shows(cell: dict[str, Any]) -> bool:
    return any({"image/png", "image/gif"} & set(out.get("data", {})) for out in cell.get("outputs", []))


def named(claim: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The code cells that a claim names as `kind`: of its own chapter, or "chapter:cell"."""
    found = []
    for name in claim.get(kind, []):
        where, _, cell = name.rpartition(":")
        cells = chapter(where or claim["chapter"])
        assert cell in cells, f"no cell {name!r} in {where or claim['chapter']}: {normal(claim['text'])}"
        assert cells[cell]["cell_type"] == "code", f"{name} is no code cell"
        assert cells[cell]["outputs"], f"{name} has no output"
        found.append(cells[cell])
    return found


def numbers(text: str) -> list[tuple[float, int, bool]]:
    """(value without its sign, decimals, is it in per cent?) of each number in the text."""
    text = re.sub(r"(?<=\d)_(?=\d{3})", "", text)  # 100_000 in code
    found = re.findall(
        r"(?<![\w.])[-+±]?(\d[\d,]*(?:\.\d+)?)(?:e([-+]?\d+))?(?![\d_])(\s?(?:%|per cent))?", text
    )
    out = []
    for digits, power, per_cent in found:
        digits = digits.rstrip(",").replace(",", "")
        decimals = len(digits.partition(".")[2])
        out.append((float(digits) * 10 ** int(power or 0), decimals, bool(per_cent)))
    return out


def is_printed(number: tuple[float, int, bool], pool: set[float]) -> bool:
    """Some number of the pool rounds to it: 14 % is printed as 0.137, as 13.7 and as 14."""
    value, decimals, per_cent = number
    half = 0.5 * 10**-decimals + 1e-9
    return any(abs(k * x - value) <= half for x in pool for k in ((1, 100) if per_cent else (1,)))


def words(line: str) -> list[str]:
    return [word.strip("[](),;:") for word in line.split()]


def value(word: str) -> float | None:
    number = re.fullmatch(r"([-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)%?", word)
    return float(number[1].replace(",", "")) if number else None


def read(wanted: str, lines: list[str]) -> float:
    """What stands at a place: "Cosine #2" is the second number after "Cosine".

    The line is the first one that has all the words, in order; "real > limit #1" looks below one with "real".
    """
    *above, row = wanted.split(" > ")
    for heading in above:
        lines = lines[next((i + 1 for i, line in enumerate(lines) if heading in line), len(lines)) :]
    *labels, place = words(row)
    for line in lines:
        rest = iter(words(line))
        if all(label in rest for label in labels):
            found = [number for word in rest if (number := value(word)) is not None]
            count = int(place.removeprefix("#"))
            assert count <= len(found), f"{wanted!r}: only {len(found)} numbers in {line!r}"
            return found[count - 1]
    raise AssertionError(f"no line reads {wanted!r}")


# --- the tests --------------------------------------------------------------------------------------------


def first_words(entry: dict[str, Any]) -> str:
    return f"{entry['chapter'][:2]}: {normal(entry['text'])[:50]}"


@cache
def prose(name: str) -> str:
    cells = chapter(name).values()
    return " \n ".join(" ".join(paragraphs(source(c))) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("name", DONE)
def test_every_claim_of_a_chapter_is_on_the_list(name):
    listed = [entry["text"] for entry in (*CLAIMS, *NO_CLAIMS) if entry["chapter"] == name]
    cells = [cell for cell in chapter(name).values() if cell["cell_type"] == "markdown"]
    missing = [
        f"[{cell['id']}] {sentence}"
        for cell in cells
        for sentence in sentences(source(cell))
        if is_claim(sentence) and not any(covers(text, sentence) for text in listed)
    ]
    assert not missing, "give these their evidence in tests/claims.toml:\n" + "\n".join(missing)


@pytest.mark.parametrize("entry", (*CLAIMS, *NO_CLAIMS), ids=first_words)
def test_what_is_listed_stands_in_its_chapter(entry):
    stands = re.search(pattern(entry["text"]), prose(entry["chapter"]))
    assert stands, f"not in {entry['chapter']}: {entry['text']}"
    known = (
        {"chapter", "text", *EVIDENCE, "results", "reads", "holds", "given"}
        if "why" not in entry
        else {"chapter", "text", "why"}
    )
    assert set(entry) <= known, f"unknown: {set(entry) - known}"


@pytest.mark.parametrize("entry", NO_CLAIMS, ids=first_words)
def test_what_is_listed_as_no_claim_would_be_taken_for_one(entry):
    assert entry["why"] in REASONS
    assert any(is_claim(sentence) for sentence in sentences(entry["text"])), "it needs no entry"


@pytest.mark.parametrize("claim", CLAIMS, ids=first_words)
def test_what_holds_a_claim_is_there(claim):
    assert any(kind in claim for kind in EVIDENCE), "no evidence"
    assert "results" not in claim or "cells" in claim, "name the cell that reads the file"
    assert "reads" not in claim or {"cells", "cards"} & set(claim), "name the cell that prints it"
    for cell in named(claim, "pictures"):
        assert shows(cell), "shows no picture"
    for file in claim.get("results", []):
        assert (ROOT / file).is_file(), file
        code = "\n".join(source(c) for c in chapter(claim["chapter"]).values() if c["cell_type"] == "code")
        assert re.search(rf"[\"'/]{Path(file).stem}[\"'.]", code), f"{claim['chapter']} does not read {file}"
    for label in claim.get("equations", []):
        texts = (source(cell) for name in EVERY for cell in chapter(name).values())
        assert any(f"$$ ({label})" in text for text in texts), f"no equation {label}"
    for file, test in (name.split("::") for name in claim.get("tests", [])):
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"no test {file}::{test}"
    everything = "\n".join(map(source, chapter(claim["chapter"]).values()))
    for key in claim.get("cites", []):
        assert re.search(rf"`[^`]*\b{key}\b[^`]*`", everything), f"{claim['chapter']} does not cite {key}"


@pytest.mark.parametrize("claim", [c for c in CLAIMS if {"cells", "cards"} & set(c)], ids=first_words)
def test_the_numbers_of_a_claim_are_printed(claim):
    cells = named(claim, "cells")
    lines = [line for cell in cells for line in printed(cell)]
    lines += [line for file in claim.get("cards", []) for line in (ROOT / file).read_text().split("\n")]
    values = [read(wanted, lines) for wanted in claim.get("reads", [])]
    names = dict(zip("abcdefghijklmnop", values, strict=False))
    if RATIO.search(without_references(claim["text"])):
        assert "holds" in claim, "a ratio in words: let `holds` compute it from `reads`"
    if "holds" in claim:
        functions = {"__builtins__": {"abs": abs, "max": max, "min": min}}
        assert eval(claim["holds"], functions, names), f"{claim['holds']}: {names}"
    pool = {number for text in (*lines, *map(source, cells)) for number, *_ in numbers(text)}
    text = without_formulas(without_references(claim["text"]))
    for number in claim.get("given", []):  # a size or a setting, which no output has to repeat
        assert number in text, f"{number} is given and not said"
        text = text.replace(number, " ")
    absent = [number for number in numbers(text) if not is_printed(number, pool)]
    assert not absent, f"{claim.get('cells', claim.get('cards'))} do not print {absent}"


def test_the_list_says_which_chapters_it_covers():
    assert set(DONE) <= EVERY
    assert {entry["chapter"] for entry in (*CLAIMS, *NO_CLAIMS)} == set(DONE)


@pytest.mark.parametrize(
    "sentence",
    [
        "Twice as many steps make about half the error.",
        "The error is 14 % larger.",
        "It falls from 0.90 to 0.63, because the pictures are more typical.",
        "One in twenty is a straggler.",
        "Three times as many were lost.",
        "That is 3 dB better.",
        "It forgets, because the labels share all weights.",
    ],
)
def test_a_sentence_that_compares_is_a_claim(sentence):
    assert is_claim(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "Take 512 dots.",
        "It is better.",
        "This is explained better in [chapter 5](05_sampling.ipynb).",
        "It is better in {cite:t}`ho2020denoising`, section 3.",
        r"For small $h^{3/2}$ the error falls.",
    ],
)
def test_a_sentence_without_a_number_or_a_comparison_is_none(sentence):
    assert not is_claim(sentence)


def test_an_ellipsis_leaves_out_the_middle_of_a_sentence():
    assert covers("For $F$ of them … grows.\nMore.", "More.")
    assert covers("For $F$ of them … grows.", "For $F$ of them $x^2$ grows.")
    assert not covers("For $F$ of them … grows.", "For $F$ of them $x^2$ falls.")


def test_prose_is_split_at_its_sentences():
    text = "# Head 1\nOne *half*. Two (eq. 3) 2.\n\n- a list, of two\n  lines. 70 % of it.\n"
    text += "\n$$\nx = 1.\n$$ (label)\n\n| a | 1. |"
    assert list(sentences(text)) == ["One *half*.", "Two (eq. 3) 2.", "a list, of two lines.", "70 % of it."]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("14 %", True),
        ("12 %", False),
        ("0.14", True),
        ("2,048", True),
        ("2,049", False),
        ("1.1", True),
        ("1.2", False),
    ],
)
def test_a_number_is_looked_up_as_rounded(said, found):
    pool = {number for number, *_ in numbers("a 0.137  b 2,048 [1.06, 3e-54]")}
    assert is_printed(numbers(said)[0], pool) is found


def test_a_number_is_read_where_it_stands():
    lines = ["steps   5   10", "Linear  0.291   12.4%", "Cosine  0.148 (0.091)", "again:", "Linear 1e-3"]
    assert read("Cosine #2", lines) == 0.091
    assert read("Linear #2", lines) == 12.4
    assert read("again > Linear #1", lines) == 0.001
    for nowhere in ("Flow #1", "again > Cosine #1", "nothing > Linear #1"):
        with pytest.raises(AssertionError, match="no line reads"):
            read(nowhere, lines)
    with pytest.raises(AssertionError, match="only 2 numbers"):
        read("Linear #3", lines)
