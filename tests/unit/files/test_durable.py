"""A file has its old content or its new content, and an error of the storage says what was being done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data_tools.categories.records import new_file
from data_tools.corpus.output import new_folder
from megavl.config.errors import StorageError
from megavl.files.durable import copy_durably, replace_durably, storage_errors, write_durably
from megavl.files.hashing import file_sha256


def failing(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_replaced_file_has_only_new_content(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    for content in (b"a longer first content", b"second"):
        replace_durably(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_failed_replacement_keeps_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "latest"
    replace_durably(path, b"old")
    monkeypatch.setattr(os, "fsync", failing)
    with (
        pytest.raises(StorageError, match="writing latest: Input/output error; free space"),
        storage_errors("writing latest"),
    ):
        replace_durably(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_copy_has_the_same_hash(tmp_path: Path) -> None:
    write_durably(tmp_path / "a", os.urandom(3 << 20))
    copy_durably(tmp_path / "a", tmp_path / "b")
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")


def test_hidden_write_error_of_torch_is_translated() -> None:
    with pytest.raises(StorageError, match="saving: incomplete write"), storage_errors("saving"):
        raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match="shape mismatch"), storage_errors("saving"):
        raise RuntimeError("shape mismatch")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is synced, in order, under the names of that moment."""
    found: list[Path] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return found


def test_folder_is_synced_before_it_gets_its_name(tmp_path: Path, synced: list[Path]) -> None:
    with new_folder(tmp_path / "out", force=False) as folder:
        (folder / "images").mkdir()
        (folder / "images/a.png").write_bytes(b"a")
        (folder / "train.jsonl").write_text("{}")
    held = {folder, folder / "images", folder / "images/a.png", folder / "train.jsonl"}
    owner, *content, parent = synced
    assert owner.name == "owner-1.json" and set(content) == held and parent == tmp_path


def test_text_file_is_synced_before_it_gets_its_name(tmp_path: Path, synced: list[Path]) -> None:
    with new_file(tmp_path / "out.jsonl", force=False) as file:
        file.write("é\n")
    assert (tmp_path / "out.jsonl").read_bytes() == "é\n".encode()
    assert [path.parent for path in synced] == [tmp_path, tmp_path.parent] and synced[0].suffix == ".tmp"
    with pytest.raises(KeyError), new_file(tmp_path / "other.jsonl", force=False) as file:
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
