"""What the files of Weights & Biases in run.dir say about the rows that earlier starts have given it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from megavl.foreign.printing import say
from megavl.train.growing_file import warn
from megavl.train.tracker_notes import TrackerNotes

_MEMORY, _EVERY_S = "offline", 30.0
"""Where the notes have the last steps of offline starts, and the seconds between two notes."""


class WandbFiles:
    """Last step of each kind of rows.

    Files of offline starts wait for `wandb sync`, after which they may be removed. So the notes have their steps too:
    of a start under way, at most half a minute late.
    """

    def __init__(self, run_dir: Path, notes: TrackerNotes) -> None:
        self._notes, self._name = notes, ""
        self._written: dict[str, int] = {}
        self._noted_at = time.monotonic()
        self._pattern = f"wandb/{{}}-*-{notes.identifier}/run-{notes.identifier}.wandb"
        self._run_dir = run_dir
        found = self._found("offline-run")
        memory = notes.memory(_MEMORY)
        self._offline = _latest(
            _steps(memory.get("before")),
            # A file that is still there knows better what was written before a kill.
            {} if memory.get("file") in found else _steps(memory.get("steps")),
            *found.values(),
        )

    def last_step(self, kind: str, *, online: bool) -> int:
        """Last step of which files have a row of this kind; -1 if they have none.

        Args:
            online: count files of online starts, where the service cannot say what it got from them.
        """
        offline = self._offline.get(kind, -1)
        sent = self._online.get(kind, -1) if online else -1
        if sent > offline:
            say(f"run.trackers: wandb is offline; {kind} rows up to step {sent} count as sent by an online start")
        return max(offline, sent)

    @cached_property
    def _online(self) -> Mapping[str, int]:
        """Last steps of online starts; their files are large, and only an offline start needs them."""
        return _latest(*self._found("run").values())

    def _found(self, kind: str) -> dict[str, dict[str, int]]:
        """Last steps by folder of the starts of a kind."""
        paths = sorted(self._run_dir.glob(self._pattern.format(kind)))
        return {path.parent.name: _last_steps(path) for path in paths}

    def begin(self, name: str) -> None:
        """Note that an offline start writes into a folder of this name."""
        self._name = name
        self.note()

    def wrote(self, kind: str, step: int) -> None:
        """Take in a row of the offline start."""
        self._written[kind] = step
        if time.monotonic() - self._noted_at >= _EVERY_S:
            self.note()

    def note(self) -> None:
        """Note the last steps, if this is an offline start. A failure costs the note alone."""
        self._noted_at = time.monotonic()
        if self._name:
            with contextlib.suppress(OSError):
                value = {"file": self._name, "before": self._offline, "steps": self._written}
                self._notes.remember(_MEMORY, value)


def _steps(found: object) -> dict[str, int]:
    return {kind: step for kind, step in found.items() if type(step) is int} if isinstance(found, dict) else {}


def _latest(*found: Mapping[str, int]) -> dict[str, int]:
    kinds = {kind for steps in found for kind in steps}
    return {kind: max(steps.get(kind, -1) for steps in found) for kind in kinds}


_BLOCK, _FILE_HEAD, _PART_HEAD = 1 << 15, 7, 7
"""Bytes of a block, of what stands before the first, and of what stands before each part of a record."""


def _last_steps(path: Path) -> dict[str, int]:
    """Last values of the scalars `KIND/step` of a file: LevelDB's log format, with its protocol buffers.

    A kill leaves rows out of the file that W&B has not written yet, and may tear the last one.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    records: Any = wandb_internal_pb2
    last: dict[str, int] = {}
    try:
        for data in records_in(path.read_bytes()):
            for item in records.Record.FromString(data).history.item:
                kind, slash, name = (item.key or "/".join(item.nested_key)).rpartition("/")
                if slash and name == "step":
                    step = json.loads(item.value_json)
                    last[kind] = max(last.get(kind, -1), step if isinstance(step, int) else -1)
    except (DecodeError, ValueError):
        warn(f"run.trackers: {path} is damaged; rows that it has after the damage are sent again")
    return last


def records_in(data: bytes) -> Iterator[bytes]:
    """Records of a file, without a torn one at its end."""
    position, record = _FILE_HEAD, b""
    while position + _PART_HEAD <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _PART_HEAD:
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        start, position = position + _PART_HEAD, position + _PART_HEAD + size
        if position > len(data):
            return
        # 1: whole, 2: first, 3: middle, 4: last part.
        record = data[start:position] if kind in (1, 2) else record + data[start:position]
        if kind in (1, 4):
            yield record
