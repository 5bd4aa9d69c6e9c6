"""MMMU: questions of 30 subjects with interleaved images, Parquet files.

Source: MMMU-Benchmark/MMMU, `eval/eval_utils.py`, and lmms-eval, `tasks/mmmu`, which both choose at random where no
option is found; here that is a failed parse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megavl.data.template import IMAGE_TAG
from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE, WORD_LINE, option_lines
from megavl.evaluate.benchmarks.row import Row
from megavl.evaluate.benchmarks.sentences import key_phrases, matches, number_of, numbers_in
from megavl.generate.prompt import ImageSource

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_IMAGE = re.compile(r"<image (\d+)>")


def read(where: str) -> Iterator[Item]:
    """Questions of a file, of a folder of Parquet files of one split, or of a pattern."""
    for path in benchmark_files(where, names=("*.parquet",), several=True):
        yield from map(_item, read_rows(path))


def _item(row: Row) -> Item:
    name, question, closed = row.text("id"), row.text("question"), row.text("question_type") == "multiple-choice"
    options = row.options("options") if closed else {}
    body = f"{question}\n{option_lines(options)}\n\n{LETTER_LINE}" if closed else f"{question}\n\n{WORD_LINE}"
    prompt, images = with_images(row, body)
    answers = _answers(row)
    if closed and answers[0] not in options:
        raise row.error(f"answer: {answers[0][:40]!r} is none of the options {', '.join(options)}")
    return Item(
        id=name,
        location=row.location,
        prompt=prompt,
        images=images,
        options=options,
        answer=answers[0],
        answers=answers,
        choices=tuple(options),
        kind=subject_of(name),
    )


def subject_of(name: str) -> str:
    """`validation_Art_Theory_3` is of `Art_Theory`."""
    parts = name.split("_")
    return "_".join(parts[1:-1]) or name


def with_images(row: Row, text: str) -> tuple[str, tuple[ImageSource, ...]]:
    """The text with an image where `<image N>` is first named, and the images in that order."""
    images: list[ImageSource] = []
    seen: set[str] = set()

    def place(found: re.Match[str]) -> str:
        number = found.group(1)
        if number in seen:
            return f"image {number}"
        seen.add(number)
        if not row.has(f"image_{number}"):
            raise row.error(f"names image {number}, but column image_{number} is absent or empty")
        images.append(row.image(f"image_{number}"))
        return IMAGE_TAG

    return _IMAGE.sub(place, text), tuple(images)


def parse(item: Item, answer: str) -> str | None:
    """The letter of the option; of an open question its phrases and numbers, a line each."""
    if item.options:
        return _letter(answer, item)
    found = list(dict.fromkeys(_phrases(answer)))
    return "\n".join(found) or None


def is_right(item: Item, prediction: str) -> bool:
    """Letters must be equal; an open answer must hold a right text, or a right number to two decimals."""
    if item.options:
        return prediction == item.answer
    return matches(prediction.split("\n"), item.answers, as_text=_as_text)


def _letter(answer: str, item: Item) -> str | None:
    text = " ".join(answer.split())
    for mark in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(mark)
    text = f" {text} "
    # Each form in turn; the last of several options in the text counts.
    for form in ("({})", "{} ", "{}."):
        found = {letter: text.rfind(form.format(letter)) for letter in item.options}
        last = max(found, key=lambda letter: found[letter])
        if found[last] >= 0:
            if form == "{} ":
                alone = {letter: text.rfind(f" {letter} ") for letter in item.options if found[letter] >= 0}
                last = max(alone, key=lambda letter: alone[letter])
                if alone[last] < 0 and len(alone) > 1:
                    last = next(iter(alone))
            return last
    if len(text.split()) > 5 or text.strip().casefold() in map(str.casefold, item.options.values()):
        lower = text.lower()
        found = {letter: lower.rfind(option.lower()) for letter, option in item.options.items() if option}
        last = max(found, key=lambda letter: found[letter], default="")
        if last and found[last] >= 0:
            return last
    return None


def _phrases(answer: str) -> list[str]:
    text = answer.strip().rstrip(".").lower()
    phrases = key_phrases(re.split(r"\.\s+(?=[a-z])|\n", text), indicators=_INDICATORS) or [text]
    return [part for phrase in phrases for part in (phrase.replace("\n", " "), *numbers_in(phrase)) if part.strip()]


def _answers(row: Row) -> tuple[str, ...]:
    text = row.text("answer")
    if text == "?":
        raise row.error("answer: is '?', so this split cannot be scored; give the validation split")
    # Several right answers to an open question are spelled as a list.
    return row.texts("answer") if text.startswith("[") and text.endswith("]") and number_of(text) is None else (text,)


def _as_text(text: str) -> list[str]:
    lower = text.strip().lower()
    # A single letter must not be found inside a word.
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]
