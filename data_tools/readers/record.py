"""A record of any input format: turns or text with images in their order, or the reason why it is rejected."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from megavl.config.errors import DataError
from megavl.data.template import IMAGE_TAG, Turn

SHORT_TAG = "<image>"
"""Other spelling of IMAGE_TAG in input files."""
TAG = re.compile(f"{re.escape(SHORT_TAG)}|{re.escape(IMAGE_TAG)}", re.IGNORECASE)
IMAGE_KEYS = (
    *("image", "images", "image_path", "image_paths", "image_url", "image_urls", "image_file", "img"),
    *("file_name", "file_names", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
)
"""Keys under which a record names its images: one, or a list."""
_IMAGE_KEYS = frozenset(IMAGE_KEYS)
NO_IMAGE = ("", "none", "null", "nan", "n/a", "[]", "{}")
"""What tables write where there is no image."""
IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff")
"""File names of images that can be read end so."""
MAX_RECORD = 72 << 20
"""Longest record in bytes, without images inside a tar or Parquet file; a longer one is rejected unread.

A text of 64 MB fits, with the escapes of JSON.
"""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_LONGEST_LITERAL = 256 << 10
"""Characters of a text in Python's notation, which takes a hundred times as much memory while it is parsed."""


class RecordError(DataError):
    """A record that is rejected; `reason` is the word under which the report counts it."""

    def __init__(self, message: str, reason: str = "record", *, held: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.held = dict(held or {})
        """Media of a record that is rejected before it is parsed, by kind."""


class Entry(NamedTuple):
    """One record of a file, before its format is looked at."""

    position: int
    """Line, item, member or row, from 1."""
    content: bytes | Mapping[str, Any] | RecordError
    """JSON text, the columns of a row, the members of a key, or the reason why it is rejected."""
    size: int
    """Bytes that it takes in memory, roughly."""


class Span(NamedTuple):
    """Bytes inside an input file."""

    path: str
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a record."""

    name: str
    """Path, address or data URL; with `data`, a name for messages."""
    data: bytes | Span | None = None
    """The image file or its position, when the record contains it."""
    optional: bool = False
    """Left out when there is no file for it, instead of rejecting the record."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A parsed record: a conversation, or a document."""

    turns: tuple[Turn, ...] = ()
    """A conversation, with one IMAGE_TAG per image; empty for a document."""
    images: tuple[Picture, ...] = ()
    """Images of the conversation, in the order of their tags."""
    parts: tuple[str | Picture, ...] = ()
    """A document: text, in which no tag is looked for, and images."""
    divisible: bool = False
    """Whether a document that is too long for one sequence becomes several samples."""
    messages: int = 0
    """Turns that the input has, with those that were left out."""
    untagged: int = 0
    """Images that were put first because no tag says where they stand."""
    image_empty: bool = False
    """Whether the input has a key for an image, which is null or empty."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Turns that were left out, by the reason."""

    @property
    def pictures(self) -> list[Picture]:
        """All images, in order."""
        return [*self.images, *(part for part in self.parts if isinstance(part, Picture))]


def parse_json(raw: bytes, *, name: str = "") -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark; `name` starts the messages.

    Raises:
        RecordError: `encoding` or `json`.
    """
    try:
        return json.loads(decode(raw, name=name).removeprefix("\ufeff"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{name}not valid JSON ({error})", "json") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that occurs twice one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"the key {twice!r} occurs twice in one object", "json")
    return found


def decode(raw: bytes, *, name: str = "") -> str:
    """UTF-8 to text.

    Raises:
        RecordError: `encoding`.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{name}not UTF-8 ({error.reason} at byte {error.start})", "encoding") from error


def mapping(value: object) -> Mapping[str, Any]:
    """A value that must be a JSON object."""
    if not isinstance(value, Mapping):
        raise RecordError(f"a record is a JSON object, found {type(value).__name__}")
    return value


@lru_cache(maxsize=4096)
def plain_key(key: str) -> str:
    """A key in lower case with underscores: `imageUrl`, `Image-URL` and `image url` are one."""
    return _CAMEL.sub("_", key).lower().replace("-", "_").replace(" ", "_")


def string(value: object, *, key: str) -> str:
    """A value that must be a string."""
    if not isinstance(value, str):
        raise RecordError(f"{key} must be a string, found {type(value).__name__}")
    return value


def picture(value: object, *, key: str) -> Picture:
    """An image: a path, address or data URL, or its bytes, alone or as {`bytes`, `path`}, where they may be base64."""
    if isinstance(value, Picture):
        return value
    if isinstance(value, str):
        return Picture(name=value)
    if isinstance(value, bytes):
        return Picture(name=key, data=value)
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path") or value.get("url")
        if isinstance(data, bytes):
            return Picture(name=path if isinstance(path, str) else key, data=data)
        if isinstance(data, str) and data:
            return Picture(name=data)
        if data is None and isinstance(path, str):
            return Picture(name=path)
    raise RecordError(f"{key} must be a string or {{bytes, path}}, found {type(value).__name__}")


def value_in_text(value: Any) -> Any:
    """The list or object that a text holds, as tables without nested columns have it; any other value itself.

    It is JSON, or Python's notation, in which pandas writes nested values to CSV.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return _python_value(value)


def _python_value(text: str) -> Any:
    """The value of a list or dict of literals; any other text itself."""
    if len(text) > _LONGEST_LITERAL:
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = ast.literal_eval(text.strip())
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        return text
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.COMMENT)]
    # numpy prints no commas, and Python joins neighbouring strings.
    joined = any(first == second == tokenize.STRING for first, second in pairwise(kinds))
    return found if isinstance(found, list | dict) and not joined else text


def record_images(record: Mapping[str, Any]) -> tuple[Picture, ...]:
    """The images under the first of IMAGE_KEYS that has any; files inside the record come before names of files.

    Text-only records spell their missing image as null, as an empty string or as a list of these.
    """
    found: list[tuple[Picture, ...]] = []
    for key in filter(record.__contains__, IMAGE_KEYS) if not _IMAGE_KEYS.isdisjoint(record) else ():
        value = value_in_text(record[key])
        items = value if isinstance(value, list | tuple) else [value]
        items = [item for item in items if not is_empty(item)]
        if items and not (key.startswith("file_name") and not _names_image(items)):
            found.append(tuple(picture(item, key=key) for item in items))
    return next((images for images in found if images[0].data is not None), found[0] if found else ())


def is_empty(item: object) -> bool:
    """Whether a value is what tables and lists write where there is no image."""
    if isinstance(item, str):
        return item.strip().lower() in NO_IMAGE
    if isinstance(item, list | tuple):
        return all(map(is_empty, item))
    return item is None or item is False or item != item or (isinstance(item, Mapping) and not any(item.values()))


def _names_image(items: Sequence[object]) -> bool:
    return all(isinstance(item, str) and item.lower().rpartition(".")[2] in IMAGE_SUFFIXES for item in items)
