"""Tasks: JSON lines, checked before any of them is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megavl.config.errors import DataError
from megavl.data.template import IMAGE_TAG
from megavl.generate.json_lines import existing_images, read_lines
from megavl.generate.prompt import ImageSource

_STRICT = ConfigDict(strict=True)


class Asked(Protocol):
    """What is asked: a question of a task file, or of a benchmark."""

    @property
    def location(self) -> str:
        """`file:line`, for messages."""

    @property
    def prompt(self) -> str:
        """With one IMAGE_TAG for each image, or none."""

    @property
    def images(self) -> Sequence[ImageSource]:
        """Of the prompt."""

    def described(self) -> Mapping[str, Any]:
        """What `answers.jsonl` says about the question."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Entry:
    """What every entry of a task has; further keys of a line are ignored."""

    id: str
    location: Annotated[str, BeforeValidator(str)] = ""
    """`file:line`, for messages; never taken from the line."""
    images: tuple[Path, ...] = ()
    """Relative to the file, in a line."""
    kind: Annotated[str, BeforeValidator(lambda kind: "" if kind is None else kind)] = ""
    """Group in the report; the file's name where the line gives none."""

    def described(self) -> dict[str, Any]:
        """What `answers.jsonl` says about the entry."""
        return {"id": self.id, "category": self.kind, "images": [str(image.absolute()) for image in self.images]}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Question(Entry):
    """One question with its options."""

    prompt: str
    """With one IMAGE_TAG per image, or none: images then stand in front."""
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""

    def described(self) -> dict[str, Any]:
        """What `answers.jsonl` says about the question."""
        options = {"choices": list(self.choices), "reference": self.choices[self.answer]}
        return {**super().described(), "question": self.prompt, **options}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OpenQuestion(Entry):
    """One question with a free-form answer."""

    prompt: str
    """As in `Question`."""
    answers: tuple[str, ...]
    """Each of them is right."""

    def described(self) -> dict[str, Any]:
        """What `answers.jsonl` says about the question."""
        return {**super().described(), "question": self.prompt, "reference": list(self.answers)}


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Passage(Entry):
    """A text that is scored after its images."""

    text: str


Task = Question | OpenQuestion | Passage


def _shape(line: Any) -> str:
    shapes = ("choices", "answers", "text")
    return next((key for key in shapes if isinstance(line, dict) and key in line), "choices")


_LINE: TypeAdapter[Task] = TypeAdapter(
    Annotated[
        Annotated[Question, Tag("choices")] | Annotated[OpenQuestion, Tag("answers")] | Annotated[Passage, Tag("text")],
        Discriminator(_shape),
    ]
)


def read_tasks(paths: Sequence[str | Path], *, limit: int | None = None) -> list[Task]:
    """Entries of all files, in order.

    Args:
        paths: JSONL files; images are relative to the file.
        limit: most entries taken from each file; None takes all.

    Raises:
        DataError: a file is missing or holds no entry, or a line is malformed; the message gives file:line.
    """
    return [entry for path in paths for entry in _read_task(Path(path), limit=limit)]


def _read_task(path: Path, *, limit: int | None) -> list[Task]:
    lines = islice(read_lines(path, what="task"), limit)
    entries = [_entry(line, path=path, location=location) for location, line in lines]
    if not entries:
        raise DataError(f"{path}: no question in it; give a JSONL file with one question a line")
    return entries


def _entry(text: str, *, path: Path, location: str) -> Task:
    try:
        line = _LINE.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        # The first part is the shape that was tried.
        key = ".".join(str(part) for part in first["loc"][1:])
        found = "" if first["type"] in ("missing", "json_invalid") else f", found {str(first['input'])[:80]!r}"
        raise DataError(
            f"{location}: {key + ': ' if key else ''}{first['msg']}{found}; a line is one JSON object with id, and "
            "either prompt, choices and answer, or prompt and answers, or text; and images and kind where it has them"
        ) from None
    _check(line, location=location)
    images = existing_images(line.images, path=path, location=location)
    return replace(line, location=location, images=images, kind=line.kind or path.stem)


def _check(line: Task, *, location: str) -> None:
    if isinstance(line, Passage):
        _check_text(line, location=location)
        return
    _check_prompt(line.prompt, images=len(line.images), location=location)
    if isinstance(line, Question):
        _check_choices(line, location=location)
    elif not line.answers or not all(map(str.strip, line.answers)):
        raise DataError(f"{location}: answers: {list(line.answers)} must be one or more non-empty texts")


def _check_prompt(prompt: str, *, images: int, location: str) -> None:
    if not prompt.strip():
        raise DataError(f"{location}: prompt: is empty; give the question")
    places = prompt.count(IMAGE_TAG)
    if places not in (0, images):
        raise DataError(
            f"{location}: prompt: has {places} {IMAGE_TAG} for {images} images; give one for each, "
            "or none to put all images in front"
        )


def _check_choices(line: Question, *, location: str) -> None:
    if len(line.choices) < 2 or len(set(line.choices)) < len(line.choices) or not all(map(str.strip, line.choices)):
        raise DataError(f"{location}: choices: {list(line.choices)} must be two or more different, non-empty texts")
    if not 0 <= line.answer < len(line.choices):
        raise DataError(
            f"{location}: answer: {line.answer} is no index of the {len(line.choices)} choices; the first choice is 0"
        )


def _check_text(line: Passage, *, location: str) -> None:
    if not line.text:
        raise DataError(f"{location}: text: is empty; give the text to be read")
    if IMAGE_TAG in line.text and line.images:
        raise DataError(f"{location}: text: holds {IMAGE_TAG}, but images stand in front of a text; leave it out")
