"""Panics of libraries written in Rust, which Python sees as exceptions outside `Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Turn a panic into a `ValueError`: the tokenizers library panics at damaged normalizers and endless patterns."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the library gave up: {error}") from None
