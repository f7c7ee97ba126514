"""A file is complete or absent, and what forbids it is said of the file that was asked for."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest

from visionkd.files import check_writable, replacing, write_text


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError):
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_refusal_names_the_file_and_not_the_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", f"{given['dir']}/.a.txt.x.tmp")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    for attempt in (lambda: write_text(tmp_path / "a.txt", ""), lambda: check_writable(tmp_path / "a.txt")):
        with pytest.raises(PermissionError) as caught:
            attempt()
        assert caught.value.filename == str(tmp_path / "a.txt")


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a", "text")
    assert caught.value.filename == str(tmp_path / "a") and not isinstance(caught.value, PermissionError)
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_looking_whether_a_file_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deep" / "a.txt")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        check_writable(tmp_path / "file" / "a.txt")
    assert str(tmp_path / "file") in str(caught.value.filename)
    write_text(tmp_path / "there", "kept")
    check_writable(tmp_path / "there")
    assert (tmp_path / "there").read_text() == "kept"
