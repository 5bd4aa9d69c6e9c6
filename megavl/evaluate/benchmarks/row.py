"""One row of a benchmark file, whatever the file's format: checked access to its cells, and its images unread."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

from megavl.config.errors import DataError, one_line
from megavl.data.image import ImageError, check_image
from megavl.data.template import IMAGE_TAG
from megavl.evaluate.benchmarks.letters import LETTERS, lettered
from megavl.generate.prompt import StoredImage

MAX_CELL = 1 << 20
"""Most characters of a cell that is read as text or as a list; images are not read as text."""
_SHOWN = 80


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table or an object of a JSON file."""

    location: str
    """`file:line` or `file: row N`, for messages."""
    folder: Path
    """Of the file; image files are below it."""
    values: Mapping[str, Any]
    stored: Callable[[str], StoredImage]
    """The image in a column of this row, read when it is needed."""

    def has(self, *names: str) -> bool:
        """Whether one of the columns exists and is not empty."""
        return any(not _is_empty(self.values.get(name)) for name in names)

    def text(self, *names: str, multiline: bool = True) -> str:
        """The text of a column that must be there and not empty.

        Args:
            names: of the column; other files of the benchmark call it differently.
            multiline: if false, the text is one line.

        Raises:
            DataError: no such column, or an empty or unusable cell.
        """
        found = self.optional(*names)
        if not found:
            name = next((name for name in names if name in self.values), None)
            if name is None:
                columns = ", ".join(map(str, list(self.values)[:30]))
                raise self.error(f"has no column {' or '.join(map(repr, names))}; its columns are {columns}")
            raise self.error(f"{name}: is empty; give a file with all answers, as published")
        return found if multiline else " ".join(found.split())

    def optional(self, *names: str) -> str:
        """The text of a column, or "" where there is none.

        Raises:
            DataError: the cell is neither text nor a number, or spells the image token.
        """
        for name in names:
            value = self.values.get(name)
            if _is_empty(value):
                continue
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise self.error(f"{name}: {str(value)[:_SHOWN]!r} is no text")
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            text = str(value).strip()
            if len(text) > MAX_CELL:
                raise self.error(f"{name}: {len(text):,} characters, at most {MAX_CELL:,} are read")
            if IMAGE_TAG in text:
                raise self.error(f"{name}: spells {IMAGE_TAG}, which only stands for images")
            return text
        return ""

    def number(self, *names: str) -> int:
        """A whole number.

        Raises:
            DataError: no such column, or the cell holds something else.
        """
        text = self.text(*names)
        try:
            return int(text)
        except ValueError:
            raise self.error(f"{names[0]}: {text[:_SHOWN]!r} is no whole number") from None

    def texts(self, *names: str) -> tuple[str, ...]:
        """A list of texts: a list, or a text that spells one in Python or JSON, which is parsed and never run.

        Raises:
            DataError: no such column, or the cell is no list of texts.
        """
        name = next((name for name in names if name in self.values), names[0])
        value = self.values.get(name)
        if isinstance(value, str):
            text = self.text(name)
            try:
                value = ast.literal_eval(text) if len(text) <= MAX_CELL else None
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                value = _json(text)
        elif value is None:
            self.text(*names)
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in value
        ):
            raise self.error(f"{name}: {str(self.values.get(name))[:_SHOWN]!r} is no list of texts")
        found = tuple(str(one).strip() for one in value)
        if any(IMAGE_TAG in one for one in found):
            raise self.error(f"{name}: spells {IMAGE_TAG}, which only stands for images")
        return found

    def options(self, *names: str) -> dict[str, str]:
        """A list of two options or more by their letter.

        Raises:
            DataError: as `texts`, or fewer options, or more than letters.
        """
        found = self.texts(*names)
        if not 2 <= len(found) <= len(LETTERS):
            fault = "are fewer than two" if len(found) < 2 else f"are {len(found)}, more than letters"
            raise self.error(f"{names[0]}: {str(list(found))[:_SHOWN]} {fault}")
        return lettered(found)

    def require_no_gap(self, options: Mapping[str, str]) -> None:
        """Check the options of a table that has a column for each letter.

        Raises:
            DataError: fewer than two, or a letter is missing among them.
        """
        if len(options) < 2 or list(options) != list(LETTERS[: len(options)]):
            raise self.error(
                f"has options {', '.join(options) or 'none'}; a question needs A, B and so on without a gap"
            )

    def image(self, *names: str) -> Path | StoredImage:
        """The image of a column: stored in the file, or a file below its folder. It is opened to see that it can be.

        Raises:
            DataError: no such column, no such file, broken base64, or an image that does not open.
        """
        name = next((name for name in names if not _is_empty(self.values.get(name))), names[0])
        value = self.values.get(name)
        if _is_empty(value):
            self.text(*names)
        source: Path | StoredImage
        if isinstance(value, Mapping):
            source = self.stored(name)
        elif names_a_file(value):
            source = self.file(name, value)
        elif isinstance(value, str):
            source = self.stored(name)
        else:
            raise self.error(f"{name}: {str(value)[:_SHOWN]!r} is no image")
        self.check_opens(name, source)
        return source

    def file(self, column: str, name: str, *, folders: Sequence[str] = ("", "images", "image")) -> Path:
        """A file below the folder of the benchmark's file.

        Args:
            column: for messages.
            name: as the row says it.
            folders: where it may be, below the folder or the two above it; the first that has it is taken.

        Raises:
            DataError: it leads out of the folder, or no such file is there.
        """
        parts = Path(name.strip()).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            raise self.error(f"{column}: {name[:_SHOWN]!r} is no file below {self.folder}")
        # A benchmark may keep its questions deeper in its folder than its images.
        for base in (self.folder, *self.folder.absolute().parents[:2]):
            for folder in folders:
                path = base / folder / Path(*parts)
                if _is_file(path):
                    return path
        places = ", ".join(str(self.folder / folder) for folder in folders)
        raise self.error(f"{column}: there is no file {name[:_SHOWN]!r} in {places}; put the images there")

    def check_opens(self, column: str, source: Path | StoredImage) -> None:
        """See that an image can be opened.

        Raises:
            DataError: it cannot; with the row and column.
        """
        if problem := _problem(source):
            raise self.error(f"{column}: the image does not open ({problem})")

    def error(self, message: str) -> DataError:
        """An error that begins with the row."""
        return DataError(f"{self.location}: {message}")


@lru_cache(maxsize=1 << 16)
def _problem(source: Path | StoredImage) -> str:
    """Why an image does not open; "" where it does. Questions share images, and each is opened once."""
    try:
        check_image(source.read_bytes() if isinstance(source, Path) else source.read())
    except (OSError, ImageError) as error:
        return one_line(error)
    return ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # A name that is too long.
        return False


def names_a_file(value: Any) -> TypeGuard[str]:
    """Whether an image's cell is the name of a file: base64 has no point in it."""
    return isinstance(value, str) and len(value) <= 1024 and "." in value and not value.startswith("data:")


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 text; white space and a data URL's head are passed over.

    Raises:
        ImageError: it is not base64.
    """
    head, comma, rest = text.partition(",")
    body = rest if comma and head.startswith("data:") else text
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"broken base64 ({error})", "image_format") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_empty(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip() in ("", "nan", "NaN")
