"""What the user gives as --input: files, folders of files, and JSONL; read twice, never held in memory as a whole."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.corpus.scripts import Script, script_of
from megavl.config.errors import DataError, UsageError

LONGEST_SOURCE = 16 << 20
"""Bytes of one document, notebook or page."""
JSONL = ".jsonl"
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a command accepts."""

    suffixes: Mapping[str, str]
    """Format by the ending of a file's name."""
    keys: Mapping[str, str]
    """Format by the key under which a JSONL record holds its text."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one text lies, and what is known of it."""

    name: str
    """Path below its --input; for a JSONL record its `source` or `id`, or the line number."""
    key: str
    """SHA-256 of its words, by which copies are recognised and the held-out ones are chosen."""
    group: str
    """The same for JSONL records that name the same `source`: pieces of one document, which one split gets whole."""
    format: str
    script: Script
    path: Path
    start: int
    """First byte."""
    size: int
    """Bytes."""


@dataclass(kw_only=True)
class Dropped:
    """What was left out: a count and the first examples for each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """Count one thing left out."""
        self.counts[reason] += 1
        found = self.examples.setdefault(reason, [])
        if len(found) < _EXAMPLES:
            found.append(f"{where}: {' '.join(detail.split())[:200]}" if detail else where)

    def merge(self, other: Dropped) -> None:
        """Add what another one has counted."""
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            found = self.examples.setdefault(reason, [])
            found += examples[: _EXAMPLES - len(found)]

    def summary(self) -> dict[str, dict[str, Any]]:
        """For the description of a corpus, by reason."""
        return {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]} for reason in sorted(self.counts)
        }


def find_sources(inputs: list[Path], *, kind: Kind, dropped: Dropped, limit: int | None = None) -> list[Source]:
    """List the different texts of the inputs, in the order of their names.

    Args:
        inputs: files, folders or JSONL files.
        kind: what the command accepts.
        dropped: takes what cannot be used, and copies.
        limit: stop after so many.

    Raises:
        UsageError: an input does not exist or has an unknown ending.
        DataError: nothing usable is found.
    """
    found: list[Source] = []
    seen: set[str] = set()
    for source, text in tqdm(_pieces(inputs, kind=kind, dropped=dropped), unit="source", desc="inputs", disable=None):
        if limit is not None and len(found) == limit:
            break
        if not text.strip():
            dropped.add("empty", source.name)
        elif source.key in seen:
            dropped.add("copy", source.name)
        else:
            seen.add(source.key)
            found.append(source)
    if not found:
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.counts.items()) or "no such files"
        raise DataError(f"--input {', '.join(map(str, inputs))}: nothing usable ({reasons}); give {_expected(kind)}")
    return found


def load(source: Source, *, kind: Kind) -> str:
    """The text of a source.

    Raises:
        DataError: the file has changed since it was listed.
    """
    try:
        with source.path.open("rb") as file:
            file.seek(source.start)
            data = file.read(source.size)
        text = data.decode("utf-8-sig")
        if source.path.suffix == JSONL:
            text = _text_of(json.loads(text), kind=kind)[1]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source.name}: was changed during the run ({error}); start again") from error
    if _key(text) != source.key:
        raise DataError(f"{source.name}: was changed during the run; start again")
    return text


def choose_heldout(keys: list[str], *, share: float, seed: int) -> set[str]:
    """Keys that are kept from training: exactly the share of them, rounded, but at least one of two or more.

    The choice depends on the contents alone, not on names or order.
    """
    count = round(share * len(keys))
    if share and len(keys) > 1:
        count = min(max(count, 1), len(keys) - 1)
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"heldout/{seed}/{key}".encode()).digest())
    return set(ranked[:count])


def heldout_sources(sources: list[Source], *, share: float, seed: int) -> set[str]:
    """Keys of the sources that are kept from training: a share of the groups, each of them whole."""
    groups: dict[str, list[str]] = {}
    for source in sources:
        groups.setdefault(source.group, []).append(source.key)
    # Names would make the choice depend on where a file lies.
    keys = {min(members): members for members in groups.values()}
    return {member for key in choose_heldout(list(keys), share=share, seed=seed) for member in keys[key]}


def _expected(kind: Kind) -> str:
    return f"{', '.join(kind.suffixes)} files, folders of them, or {JSONL} with one of the keys {', '.join(kind.keys)}"


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


def _pieces(inputs: list[Path], *, kind: Kind, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    for given in inputs:
        if given.is_dir():
            paths = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in {*kind.suffixes, JSONL}]
            paths = [path for path in paths if path.is_file() and not path.is_symlink()]
        elif not given.is_file():
            raise UsageError(f"--input {given}: no such file or folder; give {_expected(kind)}")
        elif given.suffix.lower() not in {*kind.suffixes, JSONL}:
            raise UsageError(f"--input {given}: unknown ending {given.suffix!r}; give {_expected(kind)}")
        else:
            paths = [given]
        for path in paths:
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            read = _records if path.suffix.lower() == JSONL else _whole
            yield from read(path, name=name, kind=kind, dropped=dropped)


def _whole(path: Path, *, name: str, kind: Kind, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    try:
        size = path.stat().st_size
        if size > LONGEST_SOURCE:
            dropped.add("too_long", name, f"{size} bytes, above {LONGEST_SOURCE}")
            return
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        dropped.add("unreadable", name, str(error))
        return
    yield _source(text, path=path, name=name, format=kind.suffixes[path.suffix.lower()], start=0, size=size), text


def _records(path: Path, *, name: str, kind: Kind, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    try:
        file = path.open("rb")
    except OSError as error:
        dropped.add("unreadable", name, str(error))
        return
    with file:
        start = number = 0
        while line := file.readline(LONGEST_SOURCE):
            begin, start, number = start, start + len(line), number + 1
            where = f"{name}:{number}"
            if len(line) == LONGEST_SOURCE and not line.endswith(b"\n"):
                dropped.add("too_long", where, f"above {LONGEST_SOURCE} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_SOURCE)
                    start += len(line)
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                format, text = _text_of(record, kind=kind)
            except (ValueError, RecursionError) as error:
                dropped.add("record", where, str(error))
                continue
            given = next((record[key] for key in ("source", "id") if isinstance(record.get(key), str)), where)
            source = _source(text, path=path, name=given[:200], format=format, start=begin, size=len(line))
            if isinstance(record.get("source"), str):
                source = replace(source, group=f"source {record['source']}")
            yield source, text


def _text_of(record: Any, *, kind: Kind) -> tuple[str, str]:
    """Format and text of a parsed record; a `format` of its own wins."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, found {type(record).__name__}")
    for key, format in kind.keys.items():
        text = record.get(key)
        if isinstance(text, str):
            text.encode("utf-8")  # a lone surrogate cannot be drawn or written
            named = record.get("format", format)
            if named not in kind.keys.values():
                raise ValueError(f"format {named!r}, known are {', '.join(dict.fromkeys(kind.keys.values()))}")
            return str(named), text
    raise ValueError(f"none of the keys {', '.join(kind.keys)} holds a string")


def _source(text: str, *, path: Path, name: str, format: str, start: int, size: int) -> Source:
    key, script = _key(text), script_of(text)
    return Source(name=name, key=key, group=key, format=format, script=script, path=path, start=start, size=size)
