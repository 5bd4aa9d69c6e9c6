"""One owner of a directory at a time, on any file system: no hard links, no flock, no clocks that must agree.

The owner is named in `owner-N.json`, the file with the highest number. It is created exclusively, so only one process
gets a number. Whoever takes over from an owner that is gone creates the next number, checks that the file it follows is
still there, and removes the older files, lowest number first. No file is ever replaced, so two processes that take over
at the same time cannot both succeed. The owner counts up `beat` in its file.

An owner on this machine is gone when its process is. An owner elsewhere is gone when its counter stands still for
`SILENCE_S`, as watched from here, or at once if it is an earlier start of the same job.
"""

from __future__ import annotations

import errno
import os
import random
import re
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megavl.config.errors import StorageError, UsageError
from megavl.files.owner import Owner
from megavl.foreign.printing import say

BEAT_S = 2.0
"""Time between two counts of an owner, seconds."""
SILENCE_S = 60.0
"""An owner elsewhere whose counter stands still for so long is taken for gone, seconds."""
SHORT_SILENCE_S = 10.0
"""The same for an owner of the same job, and for a file that names no owner, which a killed process left."""
_POLL_S = 0.2
_LOOKS = 5
_VANISHED = 5
"""How often the directory may be gone when a file is to be made in it."""
_MOST_BYTES = 1 << 16
_NAME = re.compile(r"owner-([1-9]\d{0,8})\.json")


class Ownership:
    """A directory that this process owns until `release`; a thread counts meanwhile."""

    def __init__(self, path: Path, owner: Owner, *, name: str, on_lost: Callable[[UsageError], None] | None) -> None:
        """Start counting in `path`, which `take` has created."""
        self.token = owner.token
        self._path, self._owner, self._name, self._on_lost = path, owner, name, on_lost
        self._beat = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, name="megavl-owner", daemon=True)
        self._thread.start()

    def confirm(self) -> None:
        """Check that nobody has taken over, as somebody may if this process was suspended.

        Raises:
            UsageError: somebody has.
        """
        # A process that takes over too late also makes a file, and removes it at once.
        found = None
        for _ in range(_LOOKS):
            try:
                found = _newest(self._path.parent)
            except OSError:
                return
            if found is None or found.is_of(self.token):
                return
            time.sleep(_POLL_S)
        other = found.owner if found else None
        raise UsageError(
            f"{self._name}: {self._path.parent} was taken over by another run ({other}) while this process "
            "stood still; this run ends here"
        )

    def release(self) -> None:
        """Give the directory up; further calls do nothing."""
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=_POLL_S)
        try:
            if (found := _newest(self._path.parent)) is not None and found.is_of(self.token):
                found.path.unlink(missing_ok=True)
        except OSError:
            # It stays, and the next process finds that its owner is gone.
            return

    def __enter__(self) -> Ownership:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _count(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._beat += 1
            try:
                self.confirm()
                self._write()
            except UsageError as error:
                if self._on_lost is not None and not self._ended.is_set():
                    self._on_lost(error)
                return
            except OSError:
                # A storage in trouble is reported by those whose files are lost.
                continue

    def _write(self) -> None:
        content = self._owner.encode(self._beat)
        # Closed after every write, since network file systems show a change to others when a file is closed.
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        except FileNotFoundError:
            # Somebody has tidied up.
            if not self._ended.is_set():
                _create(self._path, content)
            return
        try:
            os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class _Found:
    path: Path
    number: int
    content: bytes
    owner: Owner | None

    def is_of(self, token: str) -> bool:
        return self.owner is not None and self.owner.token == token

    def is_same(self, other: _Found) -> bool:
        """Whether both are of the same owner, whatever its count is."""
        if self.owner is None:
            return self.number == other.number and self.content == other.content
        return self.number == other.number and other.is_of(self.owner.token)


def is_owner_file(path: Path) -> bool:
    """Whether this is the name of a file that states an owner."""
    return _NAME.fullmatch(path.name) is not None


def current_owner(directory: Path) -> Owner | None:
    """The owner that a directory names, whether it is gone or not."""
    try:
        found = _newest(directory)
    except (OSError, ValueError):
        return None
    return found.owner if found else None


def take(
    directory: Path,
    owner: Owner,
    *,
    name: str,
    say: Callable[[str], None] | None = None,
    patience_s: float = 0.0,
    on_lost: Callable[[UsageError], None] | None = None,
) -> Ownership:
    """Become the owner of a directory, which is created if needed.

    Args:
        owner: this process.
        name: what the user calls the directory, for messages.
        say: told why this waits, and from whom it takes over; default: prints on standard error.
        patience_s: how long to wait for the ranks of a killed launcher, which leave by themselves, seconds.
        on_lost: called from a thread if another process takes over, because this one stood still.

    Raises:
        UsageError: somebody else owns the directory.
        StorageError: the directory cannot be made or written.
    """
    say, vanished = say or _print_error, 0
    try:
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            before = _newest(directory)
            if before is not None:
                _require_successor(before, name=name)
                _wait_until_gone(before, directory, owner, name=name, say=say, patience_s=patience_s)
            path = directory / _file_name(before.number + 1 if before else 1)
            try:
                if _create(path, owner.encode(0)):
                    if _is_confirmed(path, before, directory):
                        break
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                # Somebody removed the directory since, or no file can be made in it, as in /proc.
                vanished += 1
                if vanished == _VANISHED:
                    raise
            time.sleep(random.uniform(0.01, 0.1))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name}: {str(directory)!r} is no path ({error}); choose another directory") from error
    except OSError as error:
        raise StorageError(
            f"{name}: cannot write to {directory} ({error.strerror or error}); choose a writable directory, or free or "
            "repair the storage and start again"
        ) from error
    return Ownership(path, owner, name=name, on_lost=on_lost)


def _print_error(text: str) -> None:
    say(text, to_errors=True)


def _wait_until_gone(
    before: _Found, directory: Path, owner: Owner, *, name: str, say: Callable[[str], None], patience_s: float
) -> None:
    """Return when the owner is gone or has changed.

    Raises:
        UsageError: it is there, or its orphaned ranks have not left in time.
    """
    began, told = time.monotonic(), False
    while True:
        found = _newest(directory)
        if found is None or not found.is_same(before):
            return
        other, waited = found.owner, time.monotonic() - began
        alive = other.process.is_alive() if other else None
        if other is not None and alive is False:
            say(f"{name}: {directory} is taken over from a process that is gone ({other})")
            return
        if other is not None and alive:
            if other.launcher is None or other.launcher.is_alive() is not False or waited > patience_s:
                raise _in_use(other, directory, name=name)
            reason = (
                f"rank orphans of a killed launcher are still leaving ({other}); waiting for at most {patience_s:.0f} s"
            )
        else:
            if found.content != before.content:
                raise _in_use(other, directory, name=name)
            silence = _silence(other, owner)
            if waited >= silence:
                say(f"{name}: {directory} is taken over from {other or found.path}, which gave no sign of life")
                return
            reason = f"watching for {silence:.0f} s whether {other or found.path} gives a sign of life"
        if not told:
            say(f"{name}: {directory}: {reason}")
            told = True
        time.sleep(_POLL_S)


def _require_successor(before: _Found, *, name: str) -> None:
    if _NAME.fullmatch(_file_name(before.number + 1)) is None:
        raise UsageError(
            f"{name}: {before.path} has a number that no run has come to; remove the file if nothing runs there"
        )


def _file_name(number: int) -> str:
    return f"owner-{number}.json"


def _silence(other: Owner | None, owner: Owner) -> float:
    """How long an owner that cannot be seen from here must be silent to be taken for gone, seconds."""
    if other is None:
        return SHORT_SILENCE_S
    if other.job and other.job == owner.job:
        return 0.0 if owner.restarts > other.restarts else SHORT_SILENCE_S
    return SILENCE_S


def _in_use(other: Owner | None, directory: Path, *, name: str) -> UsageError:
    orphan = other is not None and other.launcher is not None and other.launcher.is_alive() is False
    what = "rank orphans of a killed launcher, which are still leaving" if orphan else "another process"
    return UsageError(
        f"{name}: {directory} is in use by {what} ({other}); wait for its end, end it, or choose another directory"
    )


def _is_confirmed(path: Path, before: _Found | None, directory: Path) -> bool:
    """Whether the new file is the newest, and the one that it follows is still there.

    Otherwise others were faster: they took over from `before`, and may even have released the directory again.
    """
    numbers = _numbers(directory)
    own = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
    older = [number for number in numbers if number != own]
    if before is None:
        return not older
    if older and max(older) > own or (still := _read(before.path, before.number)) is None or not still.is_same(before):
        return False
    # Lowest first: as long as a file is there, so is every one that follows it.
    for number in older:
        try:
            (directory / _file_name(number)).unlink(missing_ok=True)
        except OSError:
            # Not ours to remove, or a folder; it is older, so it does not count.
            continue
    return True


def _newest(directory: Path) -> _Found | None:
    while numbers := _numbers(directory):
        found = _read(directory / _file_name(numbers[-1]), numbers[-1])
        if found is not None:
            return found
    return None


def _numbers(directory: Path) -> list[int]:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def _read(path: Path, number: int) -> _Found | None:
    """What a file says; None if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        # A dangling link has a name, but nothing behind it.
        return _Found(path=path, number=number, content=b"", owner=None) if path.is_symlink() else None
    try:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        content = os.read(descriptor, _MOST_BYTES) if regular else b""
    finally:
        os.close(descriptor)
    return _Found(path=path, number=number, content=content, owner=Owner.decode(content))


def _create(path: Path, content: bytes) -> bool:
    """Create a file; returns whether it was not there before."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        if os.write(descriptor, content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return True
