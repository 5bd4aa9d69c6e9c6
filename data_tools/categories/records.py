"""Fine-tuning records of any JSON form: their texts and image paths, and output files that appear complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.readers.json_file import divide_json, json_records
from data_tools.readers.record import value_in_text
from data_tools.readers.references import is_origin, references
from megavl.config.errors import DataError, StorageError, UsageError
from megavl.data.inline_image import is_inline
from megavl.files.new_file import NewFile, sync_directory

_SPLIT_BYTES = 64 << 20
_QUESTION_ROLES = ("human", "user", "User")
_ANSWER_ROLES = ("gpt", "assistant", "Assistant")


@dataclass(frozen=True, kw_only=True)
class TaggedRecord:
    """One record and its position."""

    path: Path
    where: str
    """File and line, or item of an array."""
    content: dict[str, Any]


def read_records(inputs: list[Path]) -> Iterator[TaggedRecord]:
    """Every record of JSONL files and JSON arrays, in order.

    Raises:
        UsageError: a file cannot be read.
        DataError: names the record that is no JSON object.
    """
    for path in inputs:
        if not path.is_file():
            raise UsageError(f"--input {path}: no such file; give JSONL files or JSON arrays of records")
        for split in divide_json(path, size=_SPLIT_BYTES):
            for position, raw in json_records(split):
                where = f"{path}:{position}" if split.position_kind == "line" else f"{path}, item {position}"
                if raw is not None and not raw.strip():
                    continue
                try:
                    content = json.loads(raw or b"null")
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not valid JSON ({error}); repair or remove the record") from error
                if not isinstance(content, dict):
                    raise DataError(f"{where}: a record with a category is an object, found {str(content)[:60]!r}")
                yield TaggedRecord(path=path, where=where, content=content)


def questions(content: dict[str, Any]) -> str:
    """What the users say in a record."""
    return "\n".join([*_said(content, _QUESTION_ROLES), *_strings(content, ("prompt", "question"))])


def answers(content: dict[str, Any]) -> str:
    """What the model says in a record; the whole text of a caption."""
    return "\n".join([*_said(content, _ANSWER_ROLES), *_strings(content, ("text", "answer"))])


def _said(content: dict[str, Any], roles: tuple[str, ...]) -> Iterator[str]:
    for key in ("conversations", "messages"):
        turns = content.get(key)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and (turn.get("from") in roles or turn.get("role") in roles):
                said = turn.get("value", turn.get("content"))
                parts = said if isinstance(said, list) else [{"text": said}]
                yield from (
                    part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)
                )


def _strings(content: dict[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    return (content[key] for key in keys if isinstance(content.get(key), str))


def moved(record: TaggedRecord, *, root: Path) -> dict[str, Any]:
    """The content of a record, with image paths relative to `root` instead of the folder of its file.

    Raises:
        UsageError: an image is outside `root`, where no preprocessing run would read it.
    """
    paths = {
        reference.keys
        for reference in references(record.content)
        if reference.kind == "image" and not is_origin(reference)
    }
    moved_content: dict[str, Any] = _moved(record.content, record, root=root, paths=paths, keys=())
    return moved_content


def _moved(value: Any, record: TaggedRecord, *, root: Path, paths: set[tuple[str | int, ...]], keys: Any) -> Any:
    """`value`, which `keys` lead to, with other paths where `paths` lead to."""
    if isinstance(value, dict) and keys not in paths:
        return {k: _moved(item, record, root=root, paths=paths, keys=(*keys, k)) for k, item in value.items()}
    if isinstance(value, dict):
        return {**value, "path": _moved_path(value.get("path"), record, root=root)}
    if isinstance(value, list):
        return [_moved(item, record, root=root, paths=paths, keys=(*keys, n)) for n, item in enumerate(value)]
    if keys in paths:
        return _moved_path(value, record, root=root)
    if isinstance(value, str) and any(path[: len(keys)] == keys for path in paths):
        # A list or an object that is written as text.
        inner = _moved(value_in_text(value), record, root=root, paths=paths, keys=keys)
        return json.dumps(inner, ensure_ascii=False)
    return value


def _moved_path(value: Any, record: TaggedRecord, *, root: Path) -> Any:
    if not isinstance(value, str) or "://" in value or is_inline(value) or os.path.isabs(value):
        return value
    target = os.path.relpath(os.path.join(os.path.abspath(record.path.parent), value), os.path.abspath(root))
    if target.split(os.sep)[0] == os.pardir:
        raise UsageError(
            f"{record.where}: image {value} is outside {root}; give --image-root with a folder above all inputs, "
            "and the same to preprocess.py"
        )
    return target


class TextFile:
    """Takes text for a file under construction."""

    def __init__(self, file: NewFile) -> None:
        self._file = file

    def write(self, text: str) -> None:
        """Append in UTF-8."""
        self._file.write(text.encode("utf-8"))


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[TextFile]:
    """A text file that appears, complete and synced, only when the block ends without an exception.

    Raises:
        UsageError: the file exists and `force` is not set.
        StorageError: it cannot be written.
    """
    if path.is_dir() or (path.exists() and not force):
        raise UsageError(f"--output {path}: exists; choose another, or replace it with --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(path) as file:
            yield TextFile(file)
            file.commit()
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"--output {path}: cannot write ({error.strerror}); choose another path") from error
