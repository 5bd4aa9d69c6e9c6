"""A new file appears complete or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megavl.config.errors import StorageError
from megavl.files.new_file import FileEntry, NewFile, remove_leftovers, write_file


def test_commit_gives_name_size_and_hash(tmp_path: Path) -> None:
    with NewFile(tmp_path / "x.bin") as file:
        file.write(b"abc")
        file.write(memoryview(b"de"))
        assert file.read_back(1, 3) == b"bcd"
        assert not (tmp_path / "x.bin").exists()
        entry = file.commit()
    assert entry == FileEntry(name="x.bin", size=5, sha256=hashlib.sha256(b"abcde").hexdigest())
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_error_removes_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), NewFile(tmp_path / "x.bin") as file:
        file.write(b"abc")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with NewFile(tmp_path / "x") as first, NewFile(tmp_path / "x") as second:
        first.write(b"first")
        second.write(b"second")
        second.commit()
        first.commit()
    assert (tmp_path / "x").read_bytes() == b"first"


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    write_file(tmp_path / "kept", b"x")
    NewFile(tmp_path / "killed")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write .No such file or directory"):
        NewFile(tmp_path / "none" / "x")
