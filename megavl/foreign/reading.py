"""Reads whole files of bounded size, and tells which files of a foreign folder may be read at all.

A foreign file is anything that a user downloaded or was given: a recipe, a checkpoint, a Hugging Face folder. Every
error here is an `OSError` or a `ValueError` whose text says what is wrong; the caller adds the path and the exit code.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_HUB_CACHE = re.compile(r"(models|datasets|spaces)--.+")
_SHOWN = 300


class NotRegularError(OSError, ValueError):
    """A folder, FIFO, socket or device stands where a file should."""

    def __init__(self, kind: str) -> None:
        super().__init__(errno.EINVAL, f"{kind}, not a regular file")

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type[NotRegularError], tuple[str]]:
        return type(self), (str(self.strerror).partition(",")[0],)


def open_regular(path: str | Path, *, buffered: bool = False) -> BinaryIO:
    """Open a regular file for reading.

    Nothing else is opened: reading a FIFO would wait for a writer, and opening a device can change it.

    Raises:
        FileNotFoundError: no such file, or a link that leads nowhere.
        NotRegularError: a folder, FIFO, socket or device.
        OSError: another error of the system.
        ValueError: a name that no file can have.
    """
    return os.fdopen(regular_descriptor(path), "rb", buffering=-1 if buffered else 0)


def regular_descriptor(path: str | Path) -> int:
    """Descriptor of a regular file, open for reading; the caller closes it.

    Raises:
        OSError, ValueError: as `open_regular`.
    """
    _require_regular(os.stat(path))
    # Without blocking, in case the name has become a FIFO since.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(os.fstat(descriptor))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def read_limited(path: str | Path, *, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        OSError, ValueError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        parts, size = [], 0
        while part := file.read(min(1 << 20, limit + 1 - size)):
            parts.append(part)
            size += len(part)
            if size > limit:
                raise ValueError(f"{max(size, os.fstat(file.fileno()).st_size):,} bytes, at most {limit:,} are read")
    return b"".join(parts)


def regular_file_in(folder: Path, name: str) -> Path | None:
    """The file of this name in a folder; None if there is nothing of that name.

    Raises:
        OSError, ValueError: it is no regular file, or a link that leaves the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    require_inside(path, folder=folder)
    _require_regular(os.stat(path))
    return path


def require_inside(path: Path, *, folder: Path) -> None:
    """Refuse a link that leads out of a folder, since its target could be any file of the user.

    The model cache of Hugging Face consists of links into `../../blobs`. So links may lead anywhere in the cache of one
    model.

    Raises:
        ValueError: naming the link's target.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cache = next((parent for parent in root.parents if _HUB_CACHE.fullmatch(parent.name)), root)
    if not real.is_relative_to(root) and not real.is_relative_to(cache):
        raise ValueError(
            f"a link to {str(real)[:_SHOWN]}, outside {str(root)[:_SHOWN]}; copy the file there if it belongs to it"
        )


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotRegularError(_KINDS.get(stat.S_IFMT(status.st_mode), "no file"))
