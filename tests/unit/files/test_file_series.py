"""Files written one after the other: content, hashes, and errors of a sync in another thread."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from megavl.files import file_series
from megavl.files.file_series import FileSeries

CONTENT = {"a": [b"head", os.urandom(3 << 20), b"tail"], "b": [b"x"]}


@pytest.mark.parametrize("hashed", [False, True])
def test_files_and_records_agree(tmp_path: Path, hashed: bool) -> None:
    with FileSeries(tmp_path, hashed=hashed) as files:
        for name, parts in CONTENT.items():
            files.begin(name)
            for part in parts:
                assert files.write(part) == len(part)
            assert files.tell() == sum(map(len, parts))
    whole = {name: b"".join(parts) for name, parts in CONTENT.items()}
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole
    expected = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in whole.items()}
    assert files.records == (expected if hashed else {})


def test_failed_sync_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(stream: object) -> None:
        raise OSError("sync failed")

    monkeypatch.setattr(file_series, "_sync_and_close", failing)
    with pytest.raises(OSError, match="sync failed"), FileSeries(tmp_path, hashed=True) as files:
        files.begin("a")
    with pytest.raises(KeyError), FileSeries(tmp_path, hashed=True) as files:
        files.begin("b")
        raise KeyError
