"""The output directory: one run at a time, what it was started with, and which units are done."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from data_tools.pipeline.commit import remove_leftovers, sync_directory, write_file
from data_tools.readers.splits import Stretch
from megavl.config.errors import StorageError, UsageError
from megavl.config.model import STRICT
from megavl.data.manifest import ShardEntry, ShardManifest, read_manifest, to_json

_OURS = ("*.tokens.bin", "*.tokens.idx", "*.images.bin", "*.images.idx", "*.npy", "*.json", "rejects.jsonl", ".*.tmp")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UnitSummary:
    """Content of `units/NNNNN.json`; writing it commits the unit."""

    number: int
    config_sha256: str
    records: int
    cut: int
    """Documents longer than a sequence, cut into several samples."""
    shortened: int
    """Conversations above the limits of a sequence that end after an earlier answer."""
    images_without_file: int
    """Images of interleaved documents that were left out."""
    rejected: dict[str, int]
    shards: tuple[ShardEntry, ...]
    lengths: tuple[int, ...] = ()
    """Tokens of each sample; in dry runs only."""
    images: tuple[int, ...] = ()


class Output:
    """A dataset directory under construction."""

    def __init__(self, path: str) -> None:
        """Touch nothing yet."""
        self.path = Path(path)
        self._units = self.path / "units"

    def lock(self, *, task: int, num_tasks: int) -> list[Any]:
        """Keep other runs out of this directory; tasks of one run share it.

        Returns:
            Open files; the lock lasts as long as they do.

        Raises:
            UsageError: another run holds it, or it holds other files.
            StorageError: the directory cannot be made.
        """
        try:
            foreign = sorted(os.listdir(self.path)) if self.path.is_dir() and not self._units.is_dir() else []
            if foreign:
                raise UsageError(
                    f"--output {self.path}: holds {foreign[0]!r}, which preprocessing did not write; "
                    "choose an empty folder"
                )
            self._units.mkdir(parents=True, exist_ok=True)
            whole = (self._units / "lock").open("a")
            own = (self._units / f"lock-{task}-of-{num_tasks}").open("a")
        except OSError as error:
            raise StorageError(
                f"--output {self.path}: cannot write ({error.strerror}); choose another folder"
            ) from error
        try:
            fcntl.flock(whole, (fcntl.LOCK_EX if num_tasks == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output {self.path}: another run is writing here; wait for it or choose another folder"
            ) from None
        return [whole, own]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Two tasks that end at the same moment both find all shards done; the second waits here for the first."""
        with (self._units / "lock-finish").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def begin(self, config: dict[str, Any], *, resume: bool, alone: bool) -> None:
        """Record what this run makes, or check that it continues the same.

        Args:
            config: the job's configuration.
            resume: keep finished units; otherwise start anew.
            alone: whether no other task shares the directory.

        Raises:
            UsageError: the directory belongs to a run of other settings.
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

    def is_done(self, number: int, stretch: Stretch, *, config_sha256: str) -> bool:
        """Whether a unit is committed, its files have their sizes, and its input is what it was made from.

        Input that was written to after the unit was committed is hashed again.
        """
        summary = self.read_unit(number)
        if summary is None or summary.config_sha256 != config_sha256:
            return False
        changed = os.stat(stretch.path).st_mtime_ns > self._unit_path(number).stat().st_mtime_ns
        if changed and not summary.shards:
            return False
        for shard in summary.shards:
            path = self.path / f"{shard.name}.json"
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != shard.sha256:
                return False
            manifest = read_manifest(path, kind=ShardManifest)
            source = manifest.sources[0]
            if (source.name, source.start, source.end) != (stretch.path, stretch.start, stretch.end):
                return False
            if changed and source.sha256 != stretch.sha256():
                return False
            for entry in manifest.files:
                file = self.path / entry.name
                if not file.is_file() or file.stat().st_size != entry.size:
                    return False
        return True

    def commit_unit(self, summary: UnitSummary, *, rejects: Sequence[dict[str, str]]) -> None:
        """Write a unit's rejected records and then its summary."""
        lines = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
        # A file name in a record may be bytes that are no text.
        write_file(self.rejects_path(summary.number), lines.encode("utf-8", "backslashreplace"))
        write_file(self._unit_path(summary.number), to_json(summary))
        sync_directory(self._units)

    def rejects_path(self, number: int) -> Path:
        """Rejected records of one unit."""
        return self._units / f"{number:05d}.rejects.jsonl"

    def read_unit(self, number: int) -> UnitSummary | None:
        """A unit's summary, or None when it is not done."""
        content = self._read(self._unit_path(number))
        try:
            return None if content is None else TypeAdapter(UnitSummary).validate_python(content)
        except ValidationError:
            return None

    def remove_leftovers(self) -> None:
        """Remove temporary files of killed runs."""
        remove_leftovers(self.path)
        remove_leftovers(self._units)

    def _unit_path(self, number: int) -> Path:
        return self._units / f"{number:05d}.json"

    def _clear(self) -> None:
        # The manifest first: from here on this is no dataset.
        (self.path / "manifest.json").unlink(missing_ok=True)
        sync_directory(self.path)
        for pattern in _OURS:
            for file in self.path.glob(pattern):
                file.unlink()
        for file in self._units.glob("*.json*"):
            file.unlink()

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None
