"""The output folder: it admits one run at a time, records the settings of the run, and knows which tasks are done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.pipeline.output_lock import lock_merge, lock_output
from data_tools.readers.splits import Split
from megavl.config.errors import StorageError, UsageError
from megavl.data.manifest import ShardEntry, ShardManifest, read_manifest, to_json
from megavl.files.new_file import remove_leftovers, sync_directory, write_file
from megavl.foreign.typed import typed

_OURS = ("*.tokens.bin", "*.tokens.idx", "*.images.bin", "*.images.idx", "*.npy", "*.json", "rejects.jsonl", ".*.tmp")


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """Content of `units/NNNNN.json`; writing it commits the task."""

    number: int
    config_sha256: str
    records: int
    cut: int
    """Number of documents longer than a sequence, which were divided into several samples."""
    shortened: int
    """Number of conversations that were truncated after an earlier answer."""
    images_without_file: int
    """Number of images of interleaved documents that had no file."""
    untagged: int
    """Number of images that came first because no tag said where they stand."""
    image_empty: int
    """Number of records stored as text whose image is null or empty."""
    balance: dict[str, int]
    """What became of all images, videos, audio clips and turns; the images that are stored are counted from shards."""
    templates: tuple[str, ...]
    """Templates of its samples."""
    rejected: dict[str, int]
    shards: tuple[ShardEntry, ...]
    lengths: tuple[int, ...] = ()
    """Tokens of each sample; in dry runs only."""
    images: tuple[int, ...] = ()


class Output:
    """The folder of a dataset under construction."""

    def __init__(self, path: str) -> None:
        """Does not touch the folder."""
        self.path = Path(path)
        self._tasks = self.path / "units"

    @property
    def is_begun(self) -> bool:
        """Whether a run has recorded its settings here."""
        return (self.path / "job.json").is_file()

    def lock(self, *, array_task: int, array_tasks: int) -> ExitStack:
        """Keep other runs out of this folder; the array tasks of one run share it.

        Returns:
            What releases the locks when it is closed; the end of the process releases them too.

        Raises:
            UsageError: another run holds the lock, or the folder contains other files.
            StorageError: the folder cannot be made.
        """
        try:
            foreign = sorted(os.listdir(self.path)) if self.path.is_dir() and not self._tasks.is_dir() else []
            if foreign:
                raise UsageError(
                    f"--output {self.path}: holds {foreign[0]!r}, which preprocessing did not write; "
                    "choose an empty folder"
                )
            self._tasks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"--output {self.path}: cannot write ({error.strerror}); choose another folder"
            ) from error
        return lock_output(self.path, folder=self._tasks, array_task=array_task, array_tasks=array_tasks)

    def alone(self) -> AbstractContextManager[None]:
        """Admit one process at a time: two array tasks that end together both find all shards done."""
        return lock_merge(self.path, folder=self._tasks)

    def begin(self, config: dict[str, Any], *, resume: bool, alone: bool) -> None:
        """Record the settings of this run, or check that they equal those of the run that it resumes.

        Without `resume`, a run that is `alone` starts anew.

        Raises:
            UsageError: the folder belongs to a run with other settings.
        """
        record = self.path / "job.json"
        old = self._read(record)
        if not resume and alone:
            self._clear()
        elif old is not None and old != config:
            changed = ", ".join(sorted(key for key in {*old, *config} if old.get(key) != config.get(key)))
            raise UsageError(
                f"--output {self.path}: was started with other settings or inputs ({changed}); "
                "choose another folder, or start anew with --no-resume"
            )
        if self._read(record) != config:
            write_file(record, to_json(config))

    def is_done(self, number: int, split: Split, *, config_sha256: str) -> bool:
        """Whether a task is committed, its files have their sizes, and its input is unchanged.

        The input is hashed again only where it was written to after the commit.
        """
        summary = self.read_task(number)
        if summary is None or summary.config_sha256 != config_sha256:
            return False
        changed = os.stat(split.path).st_mtime_ns > self._task_path(number).stat().st_mtime_ns
        if changed and not summary.shards:
            return False
        for shard in summary.shards:
            path = self.path / f"{shard.name}.json"
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard.sha256:
                return False
            manifest = read_manifest(path, kind=ShardManifest)
            source = manifest.sources[0]
            if (source.name, source.start, source.end) != (split.path, split.start, split.end):
                return False
            if changed and source.sha256 != split.sha256():
                return False
            for entry in manifest.files:
                file = self.path / entry.name
                if not file.is_file() or file.stat().st_size != entry.size:
                    return False
        return True

    def commit_task(self, summary: TaskSummary, *, rejects: Sequence[dict[str, str]]) -> None:
        """Write the rejected records of a task and then its summary."""
        lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
        # A file name in a record may hold bytes that are not text.
        write_file(self.rejects_path(summary.number), lines.encode("utf-8", "backslashreplace"))
        write_file(self._task_path(summary.number), to_json(summary))
        sync_directory(self._tasks)

    def rejects_path(self, number: int) -> Path:
        """File with the rejected records of a task."""
        return self._tasks / f"{number:05d}.rejects.jsonl"

    def read_task(self, number: int) -> TaskSummary | None:
        """The summary of a task, or None when it is not done."""
        content = self._read(self._task_path(number))
        try:
            return None if content is None else typed(TaskSummary, content)
        except ValueError:
            return None

    def remove_leftovers(self) -> None:
        """Remove temporary files of killed runs."""
        remove_leftovers(self.path)
        remove_leftovers(self._tasks)

    def _task_path(self, number: int) -> Path:
        return self._tasks / f"{number:05d}.json"

    def _clear(self) -> None:
        # The manifest goes first: without it the folder is no dataset.
        (self.path / "manifest.json").unlink(missing_ok=True)
        sync_directory(self.path)
        for pattern in _OURS:
            for file in self.path.glob(pattern):
                file.unlink()
        for file in self._tasks.glob("*.json*"):
            file.unlink()

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None
