"""JSON from outside: bounded in size, depth and number of values, before anything is built of it.

Python's parser bounds none of these, and a value that is nested 900 times can be read but not written again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import isinf
from pathlib import Path
from typing import Any

from megavl.foreign.reading import read_limited


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest file of a kind."""

    size: int
    """Bytes."""
    values: int
    """Values, keys included; each takes up to 200 bytes of memory."""


JSON_FILE = Limit(size=16 << 20, values=500_000)
"""Configurations, indices, and manifests of checkpoints; the index of a model of 1,000 files has 5 MB."""
LARGE_JSON_FILE = Limit(size=64 << 20, values=4_000_000)
"""`tokenizer.json`, of which the largest public ones have 33 MB, and manifests of datasets."""
MAX_DEPTH = 64
"""Lists and objects inside each other."""
MAX_NUMBER = 400
"""Characters of one number."""

_STRING = re.compile(rb'"[^"]*"')
_STRUCTURE = b'[]{}",:'
_OTHERS = bytes(set(range(256)) - set(_STRUCTURE))
_STEPS = [0] * 256
for _char, _step in zip(b"[{]}", (1, 1, -1, -1)):
    _STEPS[_char] = _step


def read_json(path: str | Path, *, limit: Limit = JSON_FILE) -> Any:
    """Content of a JSON file.

    Raises:
        OSError, ValueError: as `read_limited` and `parse_json`.
    """
    return parse_json(read_limited(path, limit=limit.size), limit=limit)


def parse_json(raw: bytes, *, limit: Limit = JSON_FILE) -> Any:
    """Value of a JSON text in UTF-8. Keys are unique, numbers finite, and strings free of lone surrogates.

    Raises:
        ValueError: anything else, or a text beyond the limits.
    """
    if len(raw) > limit.size:
        raise ValueError(f"{len(raw):,} bytes, at most {limit.size:,} are read")
    # What is left without strings and scalars: backslashes stand in strings only.
    bare = _STRING.sub(b"", raw.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS))
    require_at_most("values", sum(bare.count(mark) for mark in b"[{,:"), limit.values)
    require_at_most("levels", max(accumulate(map(_STEPS.__getitem__, bare)), default=0), MAX_DEPTH)
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError("too deeply nested") from None
    if b"\\ud" in raw or b"\\uD" in raw:
        # A lone surrogate can neither be written nor be part of a file name.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def require_at_most(what: str, found: int, largest: int) -> None:
    """Raise ValueError for more than is read."""
    if found > largest:
        raise ValueError(f"{found:,} {what}, at most {largest:,} are read")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key[:100]!r} stands twice in one object")
        content[key] = value
    return content


def _integer(text: str) -> int:
    require_at_most("digits of a number", len(text), MAX_NUMBER)
    return int(text)


def _finite(text: str) -> float:
    require_at_most("digits of a number", len(text), MAX_NUMBER)
    value = float(text)
    if isinf(value):
        raise ValueError(f"number {text[:100]} is too large")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
