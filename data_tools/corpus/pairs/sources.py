"""Sources from `--input`: files, folders of files, and JSONL. They are read twice, and never all held in memory."""

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

MAX_SOURCE_BYTES = 16 << 20
"""Size of one document, notebook or page."""
JSONL = ".jsonl"
_MAX_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class InputFormats:
    """Formats that a command accepts."""

    suffixes: Mapping[str, str]
    """Format by file suffix."""
    keys: Mapping[str, str]
    """Format by the key of a JSONL record that holds the text."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One text: where to read it, and its hash, format and script."""

    name: str
    """Path relative to its `--input`; for a JSONL record its `source`, its `id`, or its line number."""
    key: str
    """SHA-256 of its words; finds copies and decides which sources are held out."""
    group: str
    """Equal for JSONL records with the same `source`: they are parts of one document and share one split."""
    format: str
    script: Script
    path: Path
    start: int
    """Offset in the file, in bytes."""
    size: int
    """Bytes."""


@dataclass(kw_only=True)
class Dropped:
    """Dropped inputs and records: a count and the first examples of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str, detail: str = "") -> None:
        """Count one dropped item."""
        self.counts[reason] += 1
        found = self.examples.setdefault(reason, [])
        if len(found) < _MAX_EXAMPLES:
            found.append(f"{where}: {' '.join(detail.split())[:200]}" if detail else where)

    def merge(self, other: Dropped) -> None:
        """Add the counts and examples of another one."""
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            found = self.examples.setdefault(reason, [])
            found += examples[: _MAX_EXAMPLES - len(found)]

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts and examples by reason, for `corpus.json`."""
        return {
            reason: {"count": self.counts[reason], "examples": self.examples[reason]} for reason in sorted(self.counts)
        }


def find_sources(
    inputs: list[Path], *, formats: InputFormats, dropped: Dropped, limit: int | None = None
) -> list[Source]:
    """List the distinct texts of the inputs, sorted by file name.

    Args:
        inputs: files, folders or JSONL files.
        formats: accepted formats.
        dropped: counts unusable texts and copies.
        limit: stop after this many texts.

    Raises:
        UsageError: an input does not exist or has an unknown ending.
        DataError: no usable text is found.
    """
    found: list[Source] = []
    seen: set[str] = set()
    texts = _read_inputs(inputs, formats=formats, dropped=dropped)
    for source, text in tqdm(texts, unit="source", desc="inputs", disable=None):
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
        raise DataError(f"--input {', '.join(map(str, inputs))}: nothing usable ({reasons}); give {_expected(formats)}")
    return found


def load(source: Source, *, formats: InputFormats) -> str:
    """Read the text of a source.

    Raises:
        DataError: the file has changed since it was listed.
    """
    try:
        with source.path.open("rb") as file:
            file.seek(source.start)
            data = file.read(source.size)
        text = data.decode("utf-8-sig")
        if source.path.suffix.lower() == JSONL:
            text = _text_of(json.loads(text), formats=formats)[1]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{source.name}: was changed during the run ({error}); start again") from error
    if _key(text) != source.key:
        raise DataError(f"{source.name}: was changed during the run; start again")
    return text


def choose_heldout(keys: list[str], *, share: float, seed: int) -> set[str]:
    """Choose `round(share * len(keys))` keys to hold out, but at least one of two or more.

    The choice depends on the keys and the seed, not on the order.
    """
    count = round(share * len(keys))
    if share and len(keys) > 1:
        count = min(max(count, 1), len(keys) - 1)
    ranked = sorted(keys, key=lambda key: hashlib.sha256(f"heldout/{seed}/{key}".encode()).digest())
    return set(ranked[:count])


def heldout_sources(sources: list[Source], *, share: float, seed: int) -> set[str]:
    """Keys of the held-out sources: a share of the groups, where a group is never divided."""
    groups: dict[str, list[str]] = {}
    for source in sources:
        groups.setdefault(source.group, []).append(source.key)
    # A group is ranked by content, because names would make the choice depend on where a file is stored.
    keys = {min(members): members for members in groups.values()}
    return {member for key in choose_heldout(list(keys), share=share, seed=seed) for member in keys[key]}


def _expected(formats: InputFormats) -> str:
    suffixes, keys = ", ".join(formats.suffixes), ", ".join(formats.keys)
    return f"{suffixes} files, folders of them, or {JSONL} with one of the keys {keys}"


def _key(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


def _read_inputs(inputs: list[Path], *, formats: InputFormats, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    for given in inputs:
        if given.is_dir():
            paths = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in {*formats.suffixes, JSONL}]
            paths = [path for path in paths if path.is_file() and not path.is_symlink()]
        elif not given.is_file():
            raise UsageError(f"--input {given}: no such file or folder; give {_expected(formats)}")
        elif given.suffix.lower() not in {*formats.suffixes, JSONL}:
            raise UsageError(f"--input {given}: unknown ending {given.suffix!r}; give {_expected(formats)}")
        else:
            paths = [given]
        for path in paths:
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            read = _read_jsonl if path.suffix.lower() == JSONL else _read_file
            yield from read(path, name=name, formats=formats, dropped=dropped)


def _read_file(path: Path, *, name: str, formats: InputFormats, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    try:
        size = path.stat().st_size
        if size > MAX_SOURCE_BYTES:
            dropped.add("too_long", name, f"{size} bytes, above {MAX_SOURCE_BYTES}")
            return
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        dropped.add("unreadable", name, str(error))
        return
    yield _source(text, path=path, name=name, format=formats.suffixes[path.suffix.lower()], start=0, size=size), text


def _read_jsonl(path: Path, *, name: str, formats: InputFormats, dropped: Dropped) -> Iterator[tuple[Source, str]]:
    try:
        file = path.open("rb")
    except OSError as error:
        dropped.add("unreadable", name, str(error))
        return
    with file:
        start = number = 0
        while line := file.readline(MAX_SOURCE_BYTES):
            begin, start, number = start, start + len(line), number + 1
            where = f"{name}:{number}"
            if len(line) == MAX_SOURCE_BYTES and not line.endswith(b"\n"):
                dropped.add("too_long", where, f"above {MAX_SOURCE_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_SOURCE_BYTES)
                    start += len(line)
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
                format, text = _text_of(record, formats=formats)
            except (ValueError, RecursionError) as error:
                dropped.add("record", where, str(error))
                continue
            given = next((record[key] for key in ("source", "id") if isinstance(record.get(key), str)), where)
            source = _source(text, path=path, name=given[:200], format=format, start=begin, size=len(line))
            if isinstance(record.get("source"), str):
                source = replace(source, group=f"source {record['source']}")
            yield source, text


def _text_of(record: Any, *, formats: InputFormats) -> tuple[str, str]:
    """Format and text of a parsed record; its own key `format` takes precedence."""
    if not isinstance(record, dict):
        raise ValueError(f"a record is a JSON object, found {type(record).__name__}")
    for key, format in formats.keys.items():
        text = record.get(key)
        if isinstance(text, str):
            text.encode("utf-8")  # a lone surrogate can neither be rendered nor written
            named = record.get("format", format)
            if named not in formats.keys.values():
                raise ValueError(f"format {named!r}, known are {', '.join(dict.fromkeys(formats.keys.values()))}")
            return str(named), text
    raise ValueError(f"none of the keys {', '.join(formats.keys)} holds a string")


def _source(text: str, *, path: Path, name: str, format: str, start: int, size: int) -> Source:
    key, script = _key(text), script_of(text)
    return Source(name=name, key=key, group=key, format=format, script=script, path=path, start=start, size=size)
