"""Files are written whole or not at all."""

import pytest

from minidiff.files import fill_folder, first_line, locate, write_whole


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with write_whole(path) as unfinished:
            unfinished.write_text(text)
            assert unfinished.suffix == ".txt"
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with write_whole(path) as first, write_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last to end


def test_a_block_that_raises_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails() -> None:
        with write_whole(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_gets_its_config_last(tmp_path, monkeypatch):
    moved, replace = [], __import__("os").replace
    monkeypatch.setattr("os.replace", lambda a, b: (moved.append(b.name), replace(a, b)))
    (tmp_path / "mine.md").write_text("mine")
    with fill_folder(tmp_path) as scratch:
        for name in ("config.json", "a.json", "z.json"):
            (scratch / name).write_text("{}")
        (scratch / "z.json").chmod(0o600)
    assert moved == ["a.json", "z.json", "config.json"]
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1  # others may read what one may read
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "a.json", "config.json", "mine.md", "z.json",
    ]  # fmt: skip


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no model: model.safetensors missing$"):
        locate(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not shipped \(critters, critters-clip, crit"):
        locate("critters-reader")  # a reader is not loaded by this


def test_an_error_without_words_is_named_by_its_kind():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(TimeoutError()) == "TimeoutError"
