"""The directory of a run's checkpoints: names, search for the newest valid checkpoint, retention, clean-up.

- `iter_0000010/` is a committed checkpoint; only retention touches it again.
- `iter_0000010.tmp-*` is an uncommitted save, or a checkpoint that is being deleted; the next start removes it.
- `iter_0000010.bad-*` is a damaged directory whose name a save needed; it is kept for inspection.
- `latest` holds the name of the newest checkpoint. It is a hint for people and never trusted.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.checkpoint.fault import inject_fault
from megavl.checkpoint.manifest import MANIFEST, verify
from megavl.config.errors import CheckpointError
from megavl.files.durable import replace_durably, set_aside, sync_directory
from megavl.foreign.printing import DETAIL
from megavl.foreign.reading import read_limited

LATEST = "latest"
_TRACKER_SIZE = 1000
"""Bytes; a tracker holds one name."""
_NAME = re.compile(r"iter_(\d{7,})")
_UNCOMMITTED = re.compile(r"iter_\d{7,}\.tmp-.*")
_log = logging.getLogger(__name__)


def checkpoint_name(iteration: int) -> str:
    """Directory name of a committed checkpoint."""
    return f"iter_{iteration:07d}"


def temporary_name(iteration: int) -> str:
    """A fresh name for a directory that is not, or no longer, a checkpoint."""
    return f"{checkpoint_name(iteration)}.tmp-{uuid.uuid4().hex[:12]}"


def candidates(directory: Path) -> list[Path]:
    """Directories with a checkpoint's name, newest first, valid or not."""
    if not directory.is_dir():
        return []
    found = [
        (int(match[1]), entry)
        for entry in directory.iterdir()
        if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()
    ]
    return [entry for _, entry in sorted(found, reverse=True)]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """Result of the search for the newest valid checkpoint in a directory."""

    path: Path | None
    """Newest valid checkpoint."""
    rejected: list[str]
    """One line for each newer directory that did not verify, with the reason."""
    tracker: str | None
    """Warning about a tracker file that names no checkpoint; None when it is fine or absent."""

    def explain(self, directory: Path) -> str:
        """Message for a directory that holds something but no valid checkpoint."""
        remedy = "" if self.rejected else "; give a checkpoint, or the directory that holds folders iter_N"
        lines = [f"no valid checkpoint in {directory} (checked {len(self.rejected)}){remedy}", *self.rejected]
        return DETAIL.join(lines + ([self.tracker] if self.tracker else []))


def recover(directory: Path, *, skip_hash: bool, require: Callable[[Path], object] = lambda path: None) -> Recovery:
    """Find the newest checkpoint that verifies; the tracker file has no influence.

    Args:
        skip_hash: check sizes only, not hashes.
        require: raises a `CheckpointError` for a checkpoint that cannot serve.
    """

    def usable(candidate: Path) -> None:
        check(candidate, skip_hash=skip_hash)
        require(candidate)

    found, rejected = newest_usable(candidates(directory), usable)
    return Recovery(path=found, rejected=rejected, tracker=tracker_problem(directory))


def newest_usable(listed: Iterable[Path], check_one: Callable[[Path], object]) -> tuple[Path | None, list[str]]:
    """The first checkpoint for which a check raises no `CheckpointError`, and the errors of those before it."""
    rejected: list[str] = []
    for candidate in listed:
        try:
            check_one(candidate)
        except CheckpointError as error:
            rejected.append(str(error))
        else:
            return candidate, rejected
    return None, rejected


def check(path: Path, *, skip_hash: bool) -> None:
    """Verify a checkpoint directory, and compare its name with its manifest."""
    check_name(path, verify(path, skip_hash=skip_hash))


def check_name(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare the name of a checkpoint directory with its manifest."""
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest["iteration"]:
        raise CheckpointError(f"{path / MANIFEST}: is of iteration {manifest['iteration']}, not of {path.name}")


def remove_uncommitted(directory: Path) -> None:
    """Remove the leftovers of interrupted saves and deletions."""
    for entry in directory.iterdir():
        if not _UNCOMMITTED.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def update_latest(directory: Path, path: Path) -> None:
    """Write the name of `path` into the tracker file. A failure is only logged: the tracker is a hint."""
    tracker = directory / LATEST
    try:
        if tracker.is_dir():
            set_aside(tracker)
        replace_durably(tracker, f"{path.name}\n".encode())
    except OSError as error:
        _log.warning("%s: not updated (%s); recovery does not need it", tracker, error)


def apply_retention(directory: Path, *, keep: int, skip_hash: bool, step: int) -> None:
    """Delete checkpoints that are older than the `keep` newest valid ones and older than `step`, the latest save.

    A failure is only logged: nothing depends on it.
    """
    try:
        _apply_retention(directory, keep=keep, skip_hash=skip_hash, step=step)
    except OSError as error:
        _log.warning("retention: %s: not read (%s); older checkpoints stay", directory, error)


def _apply_retention(directory: Path, *, keep: int, skip_hash: bool, step: int) -> None:
    valid = 0
    for candidate in candidates(directory):
        if valid >= keep:
            if candidate.name < checkpoint_name(step):
                _delete(candidate, step=step)
            continue
        try:
            check(candidate, skip_hash=skip_hash)
        except CheckpointError as error:
            _log.warning("retention: not counted: %s", error)
        else:
            valid += 1


def _delete(path: Path, *, step: int) -> None:
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        # Renamed first, so that an interrupted deletion never looks like a checkpoint.
        path.rename(aside)
        sync_directory(path.parent)
        inject_fault("mid_retention", rank=0, step=step)
        shutil.rmtree(aside)
    except OSError as error:
        _log.warning("%s: not deleted (%s)", aside if aside.exists() else path, error)


def tracker_problem(directory: Path) -> str | None:
    """What is wrong with the tracker file; None if nothing is, or there is none."""
    tracker = directory / LATEST
    if not tracker.exists():
        return None
    try:
        named = read_limited(tracker, limit=_TRACKER_SIZE).decode("utf-8").strip()
    except (OSError, ValueError):
        return f"{tracker}: not readable as a tracker file; ignored"
    if not _NAME.fullmatch(named):
        return f"{tracker}: names {named[:60]!r}, which is no checkpoint name; ignored"
    if not (directory / named).is_dir():
        return f"{tracker}: names {named}, which does not exist; ignored"
    return None
