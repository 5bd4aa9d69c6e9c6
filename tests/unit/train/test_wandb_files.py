"""Files that W&B left in run.dir."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from megavl.train.tracker_notes import TrackerNotes
from megavl.train.wandb_files import WandbFiles

HEAD = b":W&B" + bytes(3)


def part(data: bytes) -> bytes:
    """A whole record; the checksum is not read."""
    return struct.pack("<IHB", 0, len(data), 1) + data


def row(step: int) -> bytes:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    record = pb.Record()
    record.history.item.add(key="train/step", value_json=str(step))
    return part(bytes(record.SerializeToString()))


@pytest.fixture
def notes(tmp_path: Path) -> TrackerNotes:
    found = TrackerNotes(tmp_path / "tracker_wandb.json")
    found.begin(identifier="a" * 32, recipe="r")
    return found


def leave(tmp_path: Path, notes: TrackerNotes, start: str, content: bytes) -> Path:
    path = tmp_path / f"wandb/{start}-{notes.identifier}/run-{notes.identifier}.wandb"
    path.parent.mkdir(parents=True)
    path.write_bytes(HEAD + content)
    return path


def test_rows_before_damage_count(tmp_path: Path, notes: TrackerNotes, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave(tmp_path, notes, "offline-run-1", row(4) + part(b"\xff" * 40) + row(9))
    assert WandbFiles(tmp_path, notes).last_step("train", online=False) == 4
    assert f"{path} is damaged" in capsys.readouterr().err


def test_an_online_start_reads_no_file_of_online_starts(
    tmp_path: Path, notes: TrackerNotes, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, notes, "run-1", row(7) + part(b"\xff" * 40))
    found = WandbFiles(tmp_path, notes)
    assert found.last_step("train", online=False) == -1 and not capsys.readouterr().err
    assert found.last_step("train", online=True) == 7
    assert "is damaged" in capsys.readouterr().err
