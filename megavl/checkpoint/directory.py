"""The directory that holds a run's checkpoints: names, candidates, recovery (newest valid), retention, clean-up.

iter_0000010/        a committed checkpoint; never touched again, except by retention
iter_0000010.tmp-*   an uncommitted save, or a checkpoint on its way to deletion; removed at start
iter_0000010.bad-*   a damaged directory that stood in the way of a save; kept for the user to look at
latest               name of the newest checkpoint; a hint for people, never trusted
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from megavl.checkpoint.durable import replace_durably, sync_directory
from megavl.checkpoint.fault import strike
from megavl.checkpoint.manifest import MANIFEST, verify
from megavl.config.errors import CheckpointError

LATEST = "latest"
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
    """Directories with a checkpoint's name, newest first; whether they are valid is not looked at."""
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
    """What recovery found in a directory."""

    path: Path | None
    """Newest valid checkpoint."""
    rejected: list[str]
    """One line for each newer directory that was refused, with its reason."""
    tracker: str | None
    """Warning about a tracker file that is no help; None when it is fine or absent."""

    def explain(self, directory: Path) -> str:
        """Message for a directory that holds something but no valid checkpoint."""
        lines = [f"no valid checkpoint in {directory} (checked {len(self.rejected)})", *self.rejected]
        return "\n  ".join(lines + ([self.tracker] if self.tracker else []))


def recover(directory: Path, *, skip_hash: bool) -> Recovery:
    """Find the newest checkpoint that verifies; the tracker file decides nothing."""
    rejected: list[str] = []
    found = None
    for candidate in candidates(directory):
        try:
            check(candidate, skip_hash=skip_hash)
        except CheckpointError as error:
            rejected.append(str(error))
            continue
        found = candidate
        break
    return Recovery(path=found, rejected=rejected, tracker=_tracker_problem(directory))


def check(path: Path, *, skip_hash: bool) -> None:
    """Verify a checkpoint directory, its name against its manifest included."""
    manifest = verify(path, skip_hash=skip_hash)
    match = _NAME.fullmatch(path.name)
    if match and int(match[1]) != manifest["iteration"]:
        raise CheckpointError(f"{path / MANIFEST}: is of iteration {manifest['iteration']}, not of {path.name}")


def sweep(directory: Path) -> None:
    """Remove what interrupted saves and deletions left behind."""
    for entry in directory.iterdir():
        if _UNCOMMITTED.fullmatch(entry.name):
            shutil.rmtree(entry)


def set_aside(path: Path) -> Path:
    """Rename a directory that is no checkpoint so that its name becomes free; nothing is deleted."""
    aside = path.with_name(f"{path.name}.bad-{uuid.uuid4().hex[:12]}")
    path.rename(aside)
    sync_directory(path.parent)
    return aside


def point_latest(directory: Path, path: Path) -> None:
    """Let the tracker file name `path`. A failure is only logged: the tracker is a hint."""
    tracker = directory / LATEST
    try:
        if tracker.is_dir():
            set_aside(tracker)
        replace_durably(tracker, f"{path.name}\n".encode())
    except OSError as error:
        _log.warning("%s: not updated (%s); recovery does not need it", tracker, error)


def retire(directory: Path, *, keep: int, skip_hash: bool, step: int) -> None:
    """Delete what is older than the `keep` newest valid checkpoints and older than `step`, which was just committed.

    A failure is only logged: nothing depends on it.
    """
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
        strike("mid_retention", rank=0, step=step)
        shutil.rmtree(aside)
    except OSError as error:
        _log.warning("%s: not deleted (%s)", aside if aside.exists() else path, error)


def _tracker_problem(directory: Path) -> str | None:
    tracker = directory / LATEST
    if not tracker.exists():
        return None
    try:
        named = tracker.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return f"{tracker}: not readable as a tracker file; ignored"
    if not _NAME.fullmatch(named):
        return f"{tracker}: names {named[:60]!r}, which is no checkpoint name; ignored"
    if not (directory / named).is_dir():
        return f"{tracker}: names {named}, which does not exist; ignored"
    return None
