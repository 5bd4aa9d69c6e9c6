"""YAML from outside, with the bounds of `parsing.py`: a kilobyte of aliases stands for a billion values.

A module of its own, because only commands that read a recipe need PyYAML.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megavl.foreign.parsing import MAX_DEPTH, MAX_NUMBER, Limit, require_at_most
from megavl.foreign.reading import read_limited

YAML_FILE = Limit(size=256 << 10, values=10_000)
"""Recipes, and trees, names and rules of categories; PyYAML reads some thousand values a second."""


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file.

    Raises:
        OSError, ValueError: as `read_limited` and `parse_yaml`.
    """
    return parse_yaml(read_limited(path, limit=YAML_FILE.size).decode("utf-8"))


def parse_yaml(text: str) -> Any:
    """Value of a YAML text in the plain types of `yaml.safe_load`.

    Raises:
        ValueError: no valid YAML, a key that stands twice in a mapping, or beyond the limits; an alias counts as often
            as it is used.
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
        require_at_most("levels", self.flow_level + 1, MAX_DEPTH)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._count += 1
        require_at_most("levels", self._depth, MAX_DEPTH)
        require_at_most("values", self._count, YAML_FILE.values)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            # `<<` may come several times; what it brings in, keys beside it replace.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                # `true` and `yes` are one key, and so are 1 and 0x1.
                value, line = self.construct_object(key), key.start_mark.line + 1
                if value in lines:
                    first = lines[value]
                    raise ValueError(f"the key {key.value!r} stands in line {first} and again in line {line}; keep one")
                lines[value] = line
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        require_at_most("values", _expanded(node, {}, depth=0), YAML_FILE.values)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float", ":timestamp")):
            require_at_most("characters of a number", len(node.value), MAX_NUMBER)
        return super().construct_object(node, deep)


def _expanded(node: Any, known: dict[int, int], *, depth: int) -> int:
    """Number of values that a node stands for, with a copy of the target for every alias."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    require_at_most("levels", depth, MAX_DEPTH)
    if id(node) not in known:
        # An alias inside its own target finds this and ends the count.
        known[id(node)] = YAML_FILE.values
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_expanded(child, known, depth=depth + 1) for child in children)
    return known[id(node)]
