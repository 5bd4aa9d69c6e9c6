"""Categories of records: from a field of the record, from names of the user, or from keyword rules of the user.

Nothing is guessed: a record that neither has a category nor matches a rule stays without one and is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.categories.records import TaggedRecord, answers, questions
from data_tools.categories.tree import Taxonomy, read_mapping
from data_tools.corpus.scripts import is_han
from megavl.config.errors import DataError, UsageError

_WHERE: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "question": questions,
    "answer": answers,
    "any": lambda content: f"{questions(content)}\n{answers(content)}",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Records with one of these words belong to the category."""

    category: str
    pattern: re.Pattern[str]
    where: str
    """`question`, `answer` or `any`."""


@dataclass(frozen=True, kw_only=True)
class Tagger:
    """Finds the category of a record."""

    taxonomy: Taxonomy
    key: str
    """Key of a record that may hold its category."""
    names: Mapping[str, str]
    """Category by the name that the user has for it."""
    rules: tuple[Rule, ...]
    """Tried in order on records without a category."""
    origin: Counter[str] = field(default_factory=Counter)
    """Number of records with a category by `field`, by `rule`, and of those with `none`."""

    def tag(self, record: TaggedRecord) -> str | None:
        """Find and count the category of a record.

        Raises:
            DataError: the record names an unknown category.
        """
        given = record.content.get(self.key)
        if given is not None:
            if not isinstance(given, str):
                raise DataError(f"{record.where}: {self.key} must be a category's id, found {str(given)[:60]!r}")
            self.origin["field"] += 1
            return self.taxonomy.check(self.names.get(given, given), where=f"{record.where}: {self.key}")
        texts: dict[str, str] = {}
        for rule in self.rules:
            if rule.where not in texts:
                texts[rule.where] = _WHERE[rule.where](record.content)
            if rule.pattern.search(texts[rule.where]):
                self.origin["rule"] += 1
                return rule.category
        self.origin["none"] += 1
        return None


def read_names(path: Path, *, taxonomy: Taxonomy) -> dict[str, str]:
    """The user's names of categories: a YAML mapping from name to id.

    Raises:
        UsageError: the file is no such mapping.
        DataError: it names an unknown category.
    """
    names = read_mapping(path, option="--names")
    return {name: taxonomy.check(str(id), where=f"--names {path}: {name}") for name, id in names.items()}


def read_rules(path: Path, *, taxonomy: Taxonomy) -> tuple[Rule, ...]:
    """Keyword rules: a YAML mapping from id to a list of words, or to {words: [...], in: question|answer|any}.

    Raises:
        UsageError: the file is no such mapping.
        DataError: it names an unknown category.
    """
    rules = []
    for id, value in read_mapping(path, option="--rules").items():
        where = f"--rules {path}: {id}"
        taxonomy.check(id, where=where)
        settings = {"words": value} if isinstance(value, list) else value
        if not isinstance(settings, dict) or set(settings) - {"words", "in"}:
            raise UsageError(f"{where}: expected a list of words, or words and in, found {str(value)[:60]!r}")
        words, part = settings.get("words"), settings.get("in", "any")
        if (
            not isinstance(words, list)
            or not words
            or not all(isinstance(word, str) and word.strip() for word in words)
        ):
            raise UsageError(f"{where}: words must be a list of texts, found {str(words)[:60]!r}")
        if part not in _WHERE:
            raise UsageError(f"{where}: in must be one of {', '.join(_WHERE)}, found {part!r}")
        pattern = "|".join(_pattern(word.strip()) for word in words)
        rules.append(Rule(category=id, pattern=re.compile(pattern, re.IGNORECASE), where=part))
    return tuple(rules)


def _pattern(word: str) -> str:
    """Matches whole words; Chinese has no borders between words, so there it matches anywhere."""
    before = "" if is_han(word[0]) or not word[0].isalnum() else r"(?<!\w)"
    after = "" if is_han(word[-1]) or not word[-1].isalnum() else r"(?!\w)"
    return before + r"\s+".join(re.escape(part) for part in word.split()) + after
