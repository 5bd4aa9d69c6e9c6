"""JSON and YAML from outside: bounded in size, depth and number of values, before anything is built of them.

Python's parsers bound none of these. A kilobyte of YAML aliases stands for a billion values, and a value that is
nested 900 times can be read but not written again.
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

import yaml

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
YAML_FILE = Limit(size=256 << 10, values=10_000)
"""Recipes, and trees, names and rules of categories; PyYAML reads some thousand values a second."""
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
    _require("values", sum(bare.count(mark) for mark in b"[{,:"), limit.values)
    _require("levels", max(accumulate(map(_STEPS.__getitem__, bare)), default=0), MAX_DEPTH)
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


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file.

    Raises:
        OSError, ValueError: as `read_limited` and `parse_yaml`.
    """
    return parse_yaml(read_limited(path, limit=YAML_FILE.size).decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Value of a YAML text in the plain types of `yaml.safe_load`.

    Raises:
        ValueError: no valid YAML, or beyond the limits; an alias counts as often as it is used.
    """
    if len(text) > YAML_FILE.size:
        raise ValueError(f"{len(text):,} characters, at most {YAML_FILE.size:,} are read")
    try:
        return _BoundedLoader(text).get_single_data()
    except (yaml.YAMLError, LookupError, AttributeError, ArithmeticError) as error:
        # The library's constructors of numbers and dates raise nearly anything.
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError("not valid YAML: too deeply nested") from None


class _BoundedLoader(yaml.SafeLoader):
    """Counts nodes while it composes them, and what aliases stand for before it builds values."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # The scanner reads ahead of the composer, in steps that grow with the depth.
        _require("levels", self.flow_level + 1, MAX_DEPTH)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._count += 1
        _require("levels", self._depth, MAX_DEPTH)
        _require("values", self._count, YAML_FILE.values)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _require("values", _expanded(node, {}, depth=0), YAML_FILE.values)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float", ":timestamp")):
            _require("characters of a number", len(node.value), MAX_NUMBER)
        return super().construct_object(node, deep)


def _expanded(node: Any, known: dict[int, int], *, depth: int) -> int:
    """Number of values that a node stands for, with a copy of the target for every alias."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    _require("levels", depth, MAX_DEPTH)
    if id(node) not in known:
        # An alias inside its own target finds this and ends the count.
        known[id(node)] = YAML_FILE.values
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_expanded(child, known, depth=depth + 1) for child in children)
    return known[id(node)]


def _require(what: str, found: int, largest: int) -> None:
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
    _require("digits of a number", len(text), MAX_NUMBER)
    return int(text)


def _finite(text: str) -> float:
    _require("digits of a number", len(text), MAX_NUMBER)
    value = float(text)
    if isinf(value):
        raise ValueError(f"number {text[:100]} is too large")
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
