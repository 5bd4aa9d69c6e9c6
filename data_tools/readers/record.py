"""A record of any input format: an ordered text with places for images, or a reason why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from megavl.config.errors import DataError
from megavl.data.template import IMAGE_TAG, Turn

SHORT_TAG = "<image>"
"""Other spelling of IMAGE_TAG in input files."""


class RecordError(DataError):
    """A record that is rejected; `reason` is the word under which the report counts it."""

    def __init__(self, message: str, reason: str = "record") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Record:
    """A parsed record."""

    turns: tuple[Turn, ...] = ()
    """A conversation; empty for a document."""
    text: str = ""
    """A document."""
    images: tuple[str, ...] = ()
    """Paths or data URLs, in the order of their tags."""
    tagged: bool = True
    """Whether tags in a document stand for images; a plain text file may spell them."""


def unify_tags(text: str) -> str:
    """Spell every image tag as IMAGE_TAG."""
    return text.replace(SHORT_TAG, IMAGE_TAG)


def check_tags(texts: list[str], *, images: int, where: str = "") -> None:
    """Raise RecordError `tag_count` unless there are as many tags as images."""
    tags = sum(text.count(IMAGE_TAG) for text in texts)
    if tags != images:
        raise RecordError(f"{where}{tags} image tags for {images} images", "tag_count")


def string(value: object, *, key: str) -> str:
    """A value that must be a string."""
    if not isinstance(value, str):
        raise RecordError(f"{key} must be a string, found {type(value).__name__}")
    return value


def strings(value: object, *, key: str) -> tuple[str, ...]:
    """A value that must be a list of strings."""
    if not isinstance(value, list):
        raise RecordError(f"{key} must be a list of strings, found {type(value).__name__}")
    return tuple(string(item, key=key) for item in value)
