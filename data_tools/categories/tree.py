"""The tree of categories, read from `taxonomy.yaml` or a file in the same form."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavl.config.errors import DataError, UsageError, one_line
from megavl.foreign.yaml_text import read_yaml

PAPER = Path(__file__).with_name("taxonomy.yaml")
"""The tree of the paper."""
_KEY = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True, kw_only=True)
class Category:
    """A node of the tree."""

    id: str
    """Keys from the top, joined by slashes."""
    name: str
    about: str
    leaf: bool

    @property
    def level(self) -> int:
        """1 at the top."""
        return self.id.count("/") + 1


@dataclass(frozen=True)
class Taxonomy:
    """All categories in the order of the file, each before its parts."""

    categories: dict[str, Category]

    def check(self, id: str, *, where: str) -> str:
        """The id, or a DataError that names the nearest category when there is none of this id."""
        if id in self.categories:
            return id
        raise DataError(f"{where}: unknown category {id!r}{self._hint(id)}; `taxonomy.py list` shows all")

    def _hint(self, id: str) -> str:
        spellings = {
            spelling: category.id
            for category in reversed(self.categories.values())
            for spelling in (category.id.rsplit("/", 1)[-1], category.name.lower(), category.id)
        }
        match = difflib.get_close_matches(id.lower(), list(spellings), n=1, cutoff=0.6)
        return f", the nearest is {spellings[match[0]]!r}" if match else ""

    def leaves(self) -> list[Category]:
        """Categories without parts."""
        return [category for category in self.categories.values() if category.leaf]


def within(id: str, ancestor: str) -> bool:
    """Whether a category is `ancestor` or below it."""
    return id == ancestor or id.startswith(f"{ancestor}/")


def read_taxonomy(path: Path = PAPER) -> Taxonomy:
    """Read a tree.

    Raises:
        UsageError: the file cannot be read, or differs in form from `taxonomy.yaml`.
    """
    content = read_mapping(path, option="--taxonomy")
    return Taxonomy({category.id: category for category in _walk(content, prefix="", where=f"--taxonomy {path}")})


def read_mapping(path: Path, *, option: str) -> dict[str, Any]:
    """A YAML file that holds a mapping with text keys.

    Raises:
        UsageError: it cannot be read, is not YAML, or holds something else.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read ({one_line(error)})") from error
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{option} {path}: expected a mapping from names, found {str(content)[:60]!r}")
    return content


def _walk(node: dict[str, Any], *, prefix: str, where: str) -> Iterator[Category]:
    for key, value in node.items():
        id = f"{prefix}{key}"
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise UsageError(
                f"{where}: key {key!r} below {prefix or 'the top'!r}; use small letters, digits and hyphens"
            )
        known = {"name": value} if isinstance(value, str) else value
        if (
            not isinstance(known, dict)
            or not isinstance(known.get("name"), str)
            or set(known) - {"name", "about", "parts"}
        ):
            raise UsageError(f"{where}: {id} must be a name, or have name, about and parts, found {str(value)[:60]!r}")
        parts = known.get("parts", {})
        if not isinstance(parts, dict):
            raise UsageError(f"{where}: {id}: parts must be a mapping, found {str(parts)[:60]!r}")
        yield Category(id=id, name=known["name"], about=str(known.get("about", "")), leaf=not parts)
        yield from _walk(parts, prefix=f"{id}/", where=where)
