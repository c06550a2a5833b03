"""Which changes run the notebooks again."""

import os

import pytest

from tools.fingerprint import fingerprint, main

SOURCE = '''"""A module."""

RATE = 2
"""What it is."""


class Scale:
    """Doc."""

    def twice(self, x: int) -> int:
        """Doc."""
        return RATE * x  # why
'''


def changed(tmp_path, old: str, new: str) -> bool:
    assert old in SOURCE
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "a.py").write_text(SOURCE)
    before = fingerprint([folder])
    (folder / "a.py").write_text(SOURCE.replace(old, new))
    return fingerprint([folder]) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""A module."""', '"""Another text."""'),
        ('"""What it is."""', ""),
        ('        """Doc."""\n        return', "        return"),
        ("# why", "# because"),
        ("RATE * x", "RATE*x"),
    ],
)
def test_words_and_layout_do_not_count(tmp_path, old, new):
    assert not changed(tmp_path, old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [("RATE = 2", "RATE = 3"), ("RATE * x", "x * RATE"), ("twice", "double"), ("x: int", "x: float")],
)
def test_code_counts(tmp_path, old, new):
    assert changed(tmp_path, old, new)


def test_weights_new_files_and_names_count_and_caches_do_not(tmp_path):
    folder = tmp_path / "library"
    (folder / "__pycache__").mkdir(parents=True)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"1")
    seen = [fingerprint([folder])]
    weights.write_bytes(b"2")
    seen.append(fingerprint([folder]))
    weights.rename(folder / "other.safetensors")
    seen.append(fingerprint([folder]))
    (folder / "b.py").write_text("")
    seen.append(fingerprint([folder]))
    assert len(set(seen)) == 4
    (folder / "__pycache__" / "b.pyc").write_bytes(b"3")
    assert fingerprint([folder]) == seen[-1]


def test_the_stamp_is_new_only_when_something_is(tmp_path):
    folder, stamp = tmp_path / "library", tmp_path / "build" / "stamp"
    folder.mkdir()
    (folder / "a.py").write_text(SOURCE)
    main(stamp, [folder])
    os.utime(stamp, (1, 1))
    (folder / "a.py").write_text(SOURCE.replace("Doc", "Text"))
    main(stamp, [folder])
    assert stamp.stat().st_mtime == 1
    (folder / "a.py").write_text(SOURCE.replace("2", "3"))
    main(stamp, [folder])
    assert stamp.stat().st_mtime > 1
