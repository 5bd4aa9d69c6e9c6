"""Names in a checkpoint directory that are no directories of a save."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavl.checkpoint.commit import free_name, make_temporary
from megavl.checkpoint.directory import checkpoint_name, remove_uncommitted
from megavl.config.errors import UsageError
from megavl.files.owner import Owner
from megavl.files.ownership import take


@pytest.mark.parametrize("kind", ["dangling link", "link to itself", "link to a folder", "file", "folder", "fifo"])
def test_name_of_the_next_checkpoint_is_freed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / checkpoint_name(5)
    other = tmp_path / "other"
    other.mkdir()
    make = {
        "dangling link": lambda: path.symlink_to("nowhere"),
        "link to itself": lambda: path.symlink_to(path),
        "link to a folder": lambda: path.symlink_to(other),
        "file": lambda: path.write_text("x"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    make[kind]()
    free_name(tmp_path, 5, skip_hash=False)
    make_temporary(tmp_path, 5).rename(path)
    aside = [name for name in os.listdir(tmp_path) if name.startswith("iter_0000005.bad-")]
    assert len(aside) == 1 and path.is_dir() and not path.is_symlink() and other.is_dir()


def test_leftovers_of_any_kind_are_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    (tmp_path / "iter_0000001.tmp-a").mkdir()
    (tmp_path / "iter_0000002.tmp-b").symlink_to("kept")
    (tmp_path / "iter_0000003.tmp-c").symlink_to("nowhere")
    (tmp_path / "iter_0000004.tmp-d").write_text("x")
    remove_uncommitted(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept/file").exists()


def test_weights_are_not_written_into_an_owned_directory(tmp_path: Path) -> None:
    from megavl.checkpoint.writer import write_model_checkpoint
    from megavl.config.load import load_model_config

    with take(tmp_path, Owner.this_process(), name="checkpoint.dir"):
        with pytest.raises(UsageError, match="in use by another process"):
            write_model_checkpoint(tmp_path, config=load_model_config("tiny-siglip"), tensors=[], files={})
        assert [path.name for path in tmp_path.iterdir()] == ["owner-1.json"]
