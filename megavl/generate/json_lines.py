"""Lines of JSONL files, and errors that name them as `file:line`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megavl.config.errors import DataError
from megavl.foreign.reading import open_regular


def read_lines(path: Path, *, what: str) -> Iterator[tuple[str, str]]:
    """Location (`file:line`) and text of every line that is not blank.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot read the {what} ({reason}); give a JSONL file") from error
    # Not splitlines: it would also split at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def existing_images(names: Iterable[str | Path], *, path: Path, location: str) -> tuple[Path, ...]:
    """Image files named in a line, relative to the JSONL file.

    Raises:
        DataError: one does not exist, or is a folder, FIFO, socket or device.
    """
    images = tuple(path.parent / name for name in names)
    if absent := next((image for image in images if not image.is_file()), None):
        what = "is no regular file" if absent.exists() else "does not exist"
        raise DataError(f"{location}: images: {absent} {what}; paths are relative to the JSONL file")
    return images


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Put a location, unless it is empty, in front of the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{location}: {error}" if location else str(error)) from error
