"""The scripts in studies/, and the result files that the chapters quote."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from minidiff import critters
from minidiff.metrics import frechet_distance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "studies"))

import common  # noqa: E402
import guidance  # noqa: E402
import oracle  # noqa: E402
import quality  # noqa: E402
import words  # noqa: E402


def test_no_synonym_is_a_word_of_the_captions():
    listed = [word for group in words.SYNONYMS.values() for word in group]
    assert len(listed) == len(set(listed)) >= 40
    known = set(critters.vocabulary()) - {"hat"}
    for attribute, group in words.SYNONYMS.items():
        for synonym, stands_for in group.items():
            assert not known & set(synonym.split()), synonym
            assert stands_for in critters.ATTRIBUTES[attribute], synonym


@pytest.mark.parametrize("attribute", list(words.SYNONYMS))
def test_a_prompt_says_the_synonym_in_place_of_the_word(attribute):
    """Put the word back, and the caption grammar's own sentence comes out."""
    for synonym, stands_for in words.SYNONYMS[attribute].items():
        for text in words.prompts(attribute, synonym, stands_for, 6):
            assert text.count(synonym) == 1
            back = words.with_article(text.replace(synonym, stands_for))
            assert set(back.split()) <= set(critters.vocabulary()), back
            assert " an " not in f" {back}" or any(f" an {v}" in f" {back}" for v in "aeiou")
            if attribute in ("animal", "hat"):
                assert text.split()[-len(synonym.split()) :] == synonym.split() or attribute == "animal"


def test_the_effective_number_of_values():
    assert guidance.effective_number(["a"] * 1000, 25) == pytest.approx(1)
    even = [str(i % 5) for i in range(5000)]
    assert guidance.effective_number(even, 25) == pytest.approx(5, rel=1e-3)
    assert guidance.effective_number(even, 4) == 4
    # Two values with shares 3/4 and 1/4.
    assert guidance.effective_number(["a", "a", "a", "b"] * 2500, 25) == pytest.approx(1.7548, rel=1e-3)


def test_the_interval_over_runs_is_students():
    found = common.over_runs([1.0, 2.0, 3.0])
    assert found["mean"] == 2
    assert found["high"] - 2 == pytest.approx(4.30265 * 1 / 3**0.5, rel=1e-5)  # t(0.975, 2) of a table
    assert common.over_runs([0.5])["low"] == 0.5


def test_the_faster_frechet_distance_is_the_librarys() -> None:
    x, y = torch.randn(90, 6).double(), torch.randn(120, 6).double() @ torch.randn(6, 6).double() + 0.5
    value, without = quality.with_error(x, y)
    found = quality.interval(value, without, 90)
    expected = frechet_distance(x, y, groups=quality.GROUPS)
    assert (found["value"], found["low"], found["high"]) == pytest.approx(expected[:3], rel=1e-4)
    assert quality.frechet_of_few(x, y) == pytest.approx(value)


def test_results_say_how_they_were_made_and_not_where():
    for path in (ROOT / "notebooks" / "results").glob("*.json"):
        made_by = json.loads(path.read_text())["made_by"]
        program, what = made_by["command"].split()[:2]
        assert program == "minidiff" or (ROOT / what).is_file(), path.name
        assert str(ROOT) not in path.read_text(), path.name


def test_the_oracle_is_told_what_the_caption_says():
    """All of it, and no more: each value that it is told is a word of the caption, and those of the caption's
    words that name one value of the scene are told."""
    data = critters.Critters(300, count=2)
    for index in range(len(data)):
        said, scene = oracle.stated(data, index, 0), critters.words(data.scene(index))
        text = f" {data.caption(index).replace(',', ' ')} ".replace(" black and white ", " black&white ")
        once = [name for name in scene if list(scene.values()).count(scene[name]) == 1]
        for name in set(once) - {"relation"}:
            word = scene[name].replace("black and white", "black&white")
            assert (f" {word} " in text) == (name in said), (text, name, said)
        assert ("relation" in said) == any(f" {turn} " in text for turn in oracle.TURNS)


def test_the_vector_of_the_oracle_can_be_read():
    told = oracle.Oracle()
    scene = critters.sample_scene(random.Random(0))
    everything, nothing = told(told.ids([oracle.told(scene), oracle.told(scene, set())])).pooled
    assert not nothing.any()
    ones = iter(everything.gt(0).nonzero().flatten().tolist())
    start = 0
    for name, size in zip(critters.PAIR_ATTRIBUTES, told.sizes, strict=True):
        assert next(ones) - start == critters.labels(scene)[name]
        start += size
