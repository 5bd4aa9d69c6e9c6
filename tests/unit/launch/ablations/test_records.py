"""Notes and logs of tasks that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.ablations.records import DONE, EVALUATION, METRICS, SPENT, is_done, read_done, read_rows, read_spent
from megavl.config.errors import DataError
from tests.unit.launch.ablations.test_runner import NOTE, TASK

DAMAGED = (
    *(b"", b'{"seconds": 1.0, "com', b"{}", b"[]", b'"done"', b"\xff\xfe", b"[" * 200_000),
    b'{"seconds": "x", "commits": []}',
)


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:12]))
def test_damaged_note_is_none(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / TASK.address
    folder.mkdir()
    (folder / DONE).write_bytes(content)
    (folder / SPENT).write_bytes(content)
    assert not is_done(TASK, cache=tmp_path)
    with pytest.raises(DataError, match=DONE):
        read_done(TASK, cache=tmp_path)
    assert read_spent(folder) == {"seconds": 0.0, "commits": [], "conditions": []}
    (folder / DONE).write_text(NOTE)
    assert is_done(TASK, cache=tmp_path)


@pytest.mark.parametrize("line", [b'{"step": }', b'{"step": 1, "\xff": 1}', b"{}", b'["step", {}'], ids=repr)
@pytest.mark.parametrize("name", [METRICS, EVALUATION])
def test_damaged_line_is_named(tmp_path: Path, name: str, line: bytes) -> None:
    path = tmp_path / name
    good = b'{"step": 1, "modality": "text", "tokens": 1, "step_time_s": 0.1}\n'
    path.write_bytes(good + line + b"\n" + good)
    if not line.endswith(b"}"):
        assert len(read_rows(path)) == 2, "a kill has cut this line"
        return
    with pytest.raises(DataError, match=rf"{name}: line 2 is damaged: .*; remove the folder of this run"):
        read_rows(path)
