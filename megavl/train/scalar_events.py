"""Scalars of each step for TensorBoard."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from megavl.files.durable import set_aside
from megavl.train.growing_file import GrowingFile, warn


class Board:
    """Scalars for TensorBoard, one event a step.

    torch's SummaryWriter writes in a thread that ends with a traceback when the disk is full.
    """

    def __init__(self, directory: Path, *, start_step: int, event: Any, summary: Any, writer: Any) -> None:
        self._event, self._summary, self._writer = event.Event, summary.Summary, writer.RecordWriter
        # Steps that run again replace those of the run before.
        again = self._event(step=start_step + 1, session_log=event.SessionLog(status=event.SessionLog.START))
        head = self._record(self._event(file_version="brain.Event:2")) + self._record(again)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{uuid4().hex[:8]}"
        self.file = GrowingFile(directory / name, head=head)

    def write(self, scalars: Mapping[str, float], *, step: int) -> None:
        """Append one step's scalars."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.file.append(self._record(self._event(step=step, summary=self._summary(value=values))))

    def _record(self, event: Any) -> bytes:
        event.wall_time = time.time()
        buffer = io.BytesIO()
        self._writer(buffer).write(event.SerializeToString())
        return buffer.getvalue()


def open_board(run_dir: Path, *, name: str = "", start_step: int) -> Board | None:
    """Scalars in a new file below `run_dir/tensorboard`; None if TensorBoard is not installed.

    Args:
        name: of a folder there for further scalars: TensorBoard reads one file of a folder after the other.
        start_step: steps done; TensorBoard drops what an earlier file of the folder says about later ones.
    """
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer
    except ImportError:
        return None
    directory = run_dir / "tensorboard"
    try:
        for folder in dict.fromkeys((directory, directory / name)):
            if os.path.lexists(folder) and not folder.is_dir():
                warn(f"{folder}: is no folder; renamed to {set_aside(folder).name}")
            folder.mkdir(exist_ok=True)
    except OSError as error:
        warn(f"{folder}: cannot be made ({error.strerror})")
    return Board(directory / name, start_step=start_step, event=event_pb2, summary=summary_pb2, writer=record_writer)
