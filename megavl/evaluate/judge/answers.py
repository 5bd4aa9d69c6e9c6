"""Answers of models to the same questions, as `megavl evaluate --out` and `megavl generate --prompts` write them.

A line is a JSON object with `id`, `question` (or `prompt`), `answer` (or `text`), and where it has some `images` (or
`image`) and `category`. What a line lacks is taken from a file of questions, by `id`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavl.config.errors import DataError
from megavl.data.image import ImageError
from megavl.data.template import IMAGE_TAG
from megavl.evaluate.endpoint import data_url
from megavl.foreign.parsing import parse_json
from megavl.foreign.reading import read_limited
from megavl.generate.json_lines import read_lines

LARGEST_FILE = 256 << 20
"""Bytes of a file of answers."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question, and an answer where the line has one."""

    id: str
    location: str
    """`file:line`, for messages."""
    question: str = ""
    answer: str | None = None
    images: tuple[Path, ...] = ()
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One question and the answers of all models, in their order."""

    id: str
    question: str
    answers: tuple[str, ...]
    images: tuple[Path, ...]
    category: str


def read_compared(
    paths: Sequence[Path],
    *,
    questions: Path | None = None,
    with_images: bool = True,
    limit: int | None = None,
    image_roots: Sequence[Path] = (),
) -> list[Compared]:
    """The questions that all files answer, in the order of the first.

    Args:
        questions: file with what the lines of answers lack.
        with_images: whether images are needed; each is then opened once, so that a damaged one is found now.
        limit: most questions.
        image_roots: folders of images, besides those of the files and the working folder. An image elsewhere is
            refused, since files of others must not choose what is shown.

    Raises:
        DataError: a line is malformed, an id comes twice or not in every file, questions differ, or an image cannot be
            read; with file:line.
    """
    asked = {} if questions is None else _by_id(questions)
    tables = [_by_id(path) for path in paths]
    for path, table in zip(paths[1:], tables[1:]):
        _require_same_ids(tables[0], table, paths=(paths[0], path))
    found = [_compared([table[id] for table in tables], asked.get(id)) for id in tables[0]][:limit]
    if with_images:
        files = [*paths, *([] if questions is None else [questions])]
        roots = [folder.resolve() for folder in (*(file.parent for file in files), Path(), *image_roots)]
        for one in found:
            _check_images(one, location=tables[0][one.id].location, roots=roots)
        return found
    return [replace(one, images=()) for one in found]


def _by_id(path: Path) -> dict[str, Item]:
    found: dict[str, Item] = {}
    try:
        # Before reading: a FIFO would wait without end, and a huge file would fill the memory.
        read_limited(path, limit=LARGEST_FILE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot read the answers ({reason}); give a JSONL file") from error
    for location, line in read_lines(path, what="answers"):
        try:
            fields = parse_json(line.encode())
        except ValueError as error:
            raise DataError(f"{location}: no JSON object ({error}); give one question a line") from error
        if not isinstance(fields, dict):
            raise DataError(f"{location}: a JSON object is expected, found {line[:80]!r}")
        if "evaluation" in fields and "key" not in fields:
            continue
        item = _item(fields, path=path, location=location)
        if item.id in found:
            raise DataError(f"{location}: id {item.id!r} was at {found[item.id].location} already; give each one once")
        found[item.id] = item
    if not found:
        raise DataError(f"{path}: no answer in it; give a JSONL file with one question a line")
    return found


def _item(fields: Mapping[str, Any], *, path: Path, location: str) -> Item:
    def text(*names: str) -> str | None:
        name = next((name for name in names if fields.get(name) is not None), None)
        if name is None:
            return None
        if not isinstance(fields[name], str):
            raise DataError(f"{location}: {name}: a text is expected, found {str(fields[name])[:80]!r}")
        return str(fields[name])

    id = fields.get("id")
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not isinstance(id, str) or not id:
        raise DataError(f"{location}: id: a text or a whole number is expected, found {str(id)[:80]!r}")
    images = fields.get("images") if fields.get("images") is not None else fields.get("image")
    names = [images] if isinstance(images, str) else images or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{location}: images: a list of files is expected, found {str(images)[:80]!r}")
    return Item(
        id=id,
        location=location,
        question=text("question", "prompt") or "",
        answer=text("answer", "text"),
        images=tuple(_image(Path(name), path=path) for name in names),
        # Of an id of the taxonomy, such as recognition/ocr/printed, the main category.
        category=(text("category", "kind") or "").partition("/")[0],
    )


def _image(name: Path, *, path: Path) -> Path:
    """Relative to the file, as elsewhere, or else to the working folder, as `megavl evaluate` was given it."""
    beside = path.parent / name
    return name if not beside.is_file() and name.is_file() else beside


def _require_same_ids(first: Mapping[str, Item], other: Mapping[str, Item], *, paths: tuple[Path, Path]) -> None:
    for path, here, there in ((paths[1], first, other), (paths[0], other, first)):
        missing = [one for id, one in here.items() if id not in there]
        if missing:
            others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
            raise DataError(
                f"{missing[0].location}: id {missing[0].id!r} is not in {path}{others}; "
                "give answers of both models to the same questions"
            )


def _compared(items: Sequence[Item], asked: Item | None) -> Compared:
    full = [asked, *items] if asked is not None else list(items)
    questions = [one for one in full if one.question]
    if not questions:
        raise DataError(f"{items[0].location}: question: is missing; add it, or give --questions FILE with it")
    for one in questions[1:]:
        if one.question.strip() != questions[0].question.strip():
            raise DataError(
                f"{one.location}: question: {one.question[:80]!r} is another one than {questions[0].question[:80]!r} "
                f"at {questions[0].location}; give answers to the same questions"
            )
    answers = []
    for one in items:
        if one.answer is None:
            raise DataError(f"{one.location}: answer: is missing; free-form answers are compared, not choices")
        answers.append(one.answer)
    return Compared(
        id=items[0].id,
        question=_with_numbers(questions[0].question),
        answers=tuple(answers),
        images=next((one.images for one in full if one.images), ()),
        category=next((one.category for one in full if one.category), ""),
    )


def _with_numbers(question: str) -> str:
    """A question that says `[image 1]` where its images stand; those in front of it go without saying."""
    text = question.strip()
    while text.startswith(IMAGE_TAG):
        text = text.removeprefix(IMAGE_TAG).lstrip()
    if IMAGE_TAG not in text:
        return text
    text, number = question.strip(), 0
    while IMAGE_TAG in text:
        number += 1
        text = text.replace(IMAGE_TAG, f"[image {number}]", 1)
    return text


def _check_images(one: Compared, *, location: str, roots: Sequence[Path]) -> None:
    for image in one.images:
        if not any(image.resolve().is_relative_to(root) for root in roots):
            raise DataError(
                f"{location}: images: {image}: is outside of the folder of the answers and of the working folder; "
                f"allow its folder with --image-root {image.resolve().parent}, or give --no-images"
            )
        try:
            data_url(image)
        except (OSError, ValueError) as error:
            reason = error if isinstance(error, ImageError) else getattr(error, "strerror", None) or error
            raise DataError(
                f"{location}: images: {image}: cannot be read ({reason}); give the file, relative to the JSONL file, "
                "or --no-images"
            ) from error
