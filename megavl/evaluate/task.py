"""Multiple-choice tasks: JSON lines, checked before any of them is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megavl.config.errors import DataError
from megavl.data.template import IMAGE_TAG


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True))
class _Line:
    """A line as it is written; further keys are passed over."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    images: tuple[str, ...] = ()
    kind: str | None = None


_LINE = TypeAdapter(_Line)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its options."""

    id: str
    place: str
    """`file:line`, for messages."""
    images: tuple[Path, ...]
    prompt: str
    """With one IMAGE_TAG per image, or none: images then stand in front."""
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    kind: str
    """Group in the report; the file's name where the line gives none."""


def read_tasks(paths: Sequence[str | Path], *, limit: int | None = None) -> list[Question]:
    """Questions of all files, in order.

    Args:
        paths: JSONL files; images are relative to the file.
        limit: most questions taken from each file; None takes all.

    Raises:
        DataError: a file is missing or holds no question, or a line is malformed; the message gives file:line.
    """
    return [question for path in paths for question in _read_task(Path(path), limit=limit)]


def _read_task(path: Path, *, limit: int | None) -> list[Question]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot read the task ({reason}); give a JSONL file") from error
    questions: list[Question] = []
    for number, line in _lines(text):
        if len(questions) == limit:
            break
        questions.append(_question(line, path=path, place=f"{path}:{number}"))
    if not questions:
        raise DataError(f"{path}: no question in it; give a JSONL file with one question a line")
    return questions


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: it would also cut at U+2028 and the like, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _question(text: str, *, path: Path, place: str) -> Question:
    try:
        line = _LINE.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] in ("missing", "json_invalid") else f", found {str(first['input'])[:80]!r}"
        raise DataError(
            f"{place}: {key + ': ' if key else ''}{first['msg']}{found}; a line is one JSON object with id, prompt, "
            "choices and answer, and images and kind where it has them"
        ) from None
    if len(line.choices) < 2 or len(set(line.choices)) < len(line.choices) or not all(map(str.strip, line.choices)):
        raise DataError(f"{place}: choices: {list(line.choices)} must be two or more different, non-empty texts")
    if not 0 <= line.answer < len(line.choices):
        raise DataError(
            f"{place}: answer: {line.answer} is no index of the {len(line.choices)} choices; the first choice is 0"
        )
    if not line.prompt.strip():
        raise DataError(f"{place}: prompt: is empty; give the question")
    places = line.prompt.count(IMAGE_TAG)
    if places not in (0, len(line.images)):
        raise DataError(
            f"{place}: prompt: has {places} {IMAGE_TAG} for {len(line.images)} images; give one for each, "
            "or none to put all images in front"
        )
    images = tuple(path.parent / image for image in line.images)
    if absent := next((image for image in images if not image.is_file()), None):
        raise DataError(f"{place}: images: {absent} does not exist; paths are relative to the JSONL file")
    return Question(
        id=line.id,
        place=place,
        images=images,
        prompt=line.prompt,
        choices=line.choices,
        answer=line.answer,
        kind=line.kind or path.stem,
    )
