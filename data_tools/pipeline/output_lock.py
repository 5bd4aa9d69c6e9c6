"""Locks of an output folder: one run at a time writes there, and the array tasks of one run share it.

Files are locked with flock, which the kernel releases when a process ends. Some network file systems lack it. There, a
file names the owner of each lock, as for the directories of training runs (`megavl/files/ownership.py`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from megavl.config.errors import StorageError, UsageError
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, current_owner, take
from megavl.foreign.printing import say

_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without flock answers."""
_WHOLE = "whole"
_POLL_S = 0.5


def lock_output(output: Path, *, folder: Path, array_task: int, array_tasks: int) -> ExitStack:
    """Keep other runs out of an output folder.

    Args:
        output: as the user calls it.
        folder: where the locks are.
        array_task: number of this array task.
        array_tasks: their number; 1: this run shares the folder with none.

    Returns:
        What releases the locks when it is closed; the end of the process releases them too.

    Raises:
        UsageError: another run holds a lock.
        StorageError: the folder cannot be written.
    """
    with ExitStack() as held, _storage_errors(output):
        alone = array_tasks == 1
        kept = _flock(folder / "lock", held, flags=(fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        name = f"{array_task}-of-{array_tasks}"
        if not (kept and _flock(folder / f"lock-{name}", held, flags=fcntl.LOCK_EX | fcntl.LOCK_NB)):
            held.callback(_own(output, folder=folder, name=_WHOLE if alone else name).release)
        return held.pop_all()
    raise AssertionError("the block returns or raises")


@contextlib.contextmanager
def lock_merge(output: Path, *, folder: Path) -> Iterator[None]:
    """Admit one process at a time: two array tasks that end together both find all shards done."""
    with ExitStack() as held:
        with _storage_errors(output):
            if not _flock(folder / "lock-finish", held, flags=fcntl.LOCK_EX):
                held.callback(_wait_and_own(output, folder=folder).release)
        yield


def _flock(path: Path, held: ExitStack, *, flags: int) -> bool:
    """Lock a file as long as `held` is open; returns whether the file system can.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    file = held.enter_context(path.open("a"))
    try:
        fcntl.flock(file, flags)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return False
    return True


def _own(output: Path, *, folder: Path, name: str) -> Ownership:
    """Become the owner of one lock, after a look at those that exclude it."""
    owners = folder / "lock-owners"
    owner = _take(output, owners / name)
    try:
        if name == _WHOLE:
            # One after the other: what their owners left when they were killed goes, too.
            for other in sorted(path for path in owners.iterdir() if path.name not in (_WHOLE, "finish")):
                _take(output, other).release()
        elif (found := current_owner(owners / _WHOLE)) and found.process.is_alive() is not False:
            raise UsageError(
                f"--output {output}: another run is writing here ({found}); wait for it or choose another folder. If "
                f"it is gone, delete {owners / _WHOLE}"
            )
    except BaseException:
        owner.release()
        raise
    return owner


def _wait_and_own(output: Path, *, folder: Path) -> Ownership:
    while True:
        try:
            return _take(output, folder / "lock-owners" / "finish")
        except UsageError:
            time.sleep(_POLL_S)


def _take(output: Path, path: Path) -> Ownership:
    return take(path, Owner.this_process(), name=f"--output {output}", on_lost=_end)


def _end(error: UsageError) -> None:
    """End a process that stood still while another one took over; its worker processes end with it."""
    say(f"error: {error}", to_errors=True)
    os._exit(error.exit_code)


@contextlib.contextmanager
def _storage_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise UsageError(
            f"--output {output}: another run is writing here; wait for it or choose another folder"
        ) from None
    except OSError as error:
        raise StorageError(f"--output {output}: cannot write ({error.strerror}); choose another folder") from error
