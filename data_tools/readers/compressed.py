"""Compressed files, read as a stream in bounded blocks. zstd needs Python 3.14 or an optional package."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

from megavl.config.errors import DataError, UsageError

GZIP = b"\x1f\x8b"
ZSTD = (b"\x28\xb5\x2f\xfd", *(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)))
"""How zstd files begin; `pzstd` puts a frame to skip before the first one."""
_MAX_WINDOW_LOG = 27
"""zstd keeps 128 MiB at most; a frame that asks for more is refused."""


class Decompressed:
    """The content of a gzip or zstd file, from its beginning to its end."""

    def __init__(self, stream: BinaryIO, *, path: str, start: bytes) -> None:
        """Take over an open file that begins with `start`.

        Raises:
            UsageError: zstd, and no library for it is installed.
        """
        self._stream, self._path = stream, path
        self._errors: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
        self._inner: Any
        if start.startswith(GZIP):
            self._inner = gzip.GzipFile(fileobj=stream)
            return
        zstd = _zstd(path)
        self._errors = (*self._errors, zstd.ZstdError)
        options = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._inner = zstd.ZstdFile(stream, options=options)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end.

        Raises:
            DataError: the file is damaged or ends too early.
        """
        return self._checked(self._inner.read, size)

    def lines(self, *, longest: int) -> Iterator[bytes | None]:
        """Lines with their line feeds; None for one of more than `longest` bytes.

        Raises:
            DataError: the file is damaged or ends too early.
        """
        while line := self._checked(self._inner.readline, longest + 1):
            if len(line) <= longest:
                yield line
                continue
            while line and not line.endswith(b"\n"):
                line = self._checked(self._inner.readline, 1 << 20)
            yield None

    def __enter__(self) -> Decompressed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.close()
        self._stream.close()

    def _checked(self, read: Any, size: int) -> bytes:
        try:
            data: bytes = read(size)
        except self._errors as error:
            raise DataError(
                f"{self._path}: the compressed file is damaged or cut off ({error}); get it again"
            ) from error
        return data


def _zstd(path: str) -> Any:
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise UsageError(
                f"--input {path}: reading zstd needs backports.zstd, which is not installed; "
                "install it with: pip install 'megavl[zstd]', or decompress the file"
            ) from error
    return zstd
