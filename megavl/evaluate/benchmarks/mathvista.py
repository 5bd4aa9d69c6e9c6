"""MathVista: mathematics in pictures, with choices or free answers; JSON by id beside its images, or Parquet.

Source: lupantech/MathVista (`evaluation/build_query.py`, `extract_answer.py`, `calculate_score.py`) and lmms-eval,
`tasks/mathvista`. The official extraction asks a language model; without one, rules extract. Where no option is found,
the original takes the option of the most similar spelling; here that is a failed parse.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import letter_of
from megavl.evaluate.benchmarks.row import Row

_TYPES = ("text", "integer", "float", "list")
_PLACES = {1: "one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4,"}
_PLACES[2] = "two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45,"
_STATED = re.compile(r"(?i)(?:answer|result|value)(?:\s+(?:is|would be|equals)|\s*[:=])\s*([^\n]*)|\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?<![\d.])-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
    r"(?:\s?/\s?\d+(?:\.\d+)?)?"
)
"""With separators of thousands, an exponent, or a denominator."""
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
EXTRACTION = """Read the question and the response to it. Write only the final answer that the response gives, with no \
other word: the letter of the option for a question with choices, otherwise a number, or a list such as [1, 2]. \
Write NONE if the response gives no answer.

{question}

Response: {answer}

Final answer:"""


def read(where: str) -> Iterator[Item]:
    """Questions of `testmini.json`, or of Parquet files of one split."""
    for path in benchmark_files(where, names=("testmini.json", "*.parquet", "*.tsv")):
        yield from map(_item, read_rows(path))


def _item(row: Row) -> Item:
    closed, answer_type = row.text("question_type") == "multi_choice", row.text("answer_type")
    if answer_type not in _TYPES:
        raise row.error(f"answer_type: {answer_type[:20]!r} is none of {', '.join(_TYPES)}")
    options = row.options("choices") if closed else {}
    answer = row.text("answer")
    letters = [letter for letter, text in options.items() if text == answer]
    if closed and not letters:
        raise row.error(f"answer: {answer[:40]!r} is none of the choices {list(options.values())}")
    places = row.number("precision") if row.has("precision") else 0
    lines = [_hint(closed, answer_type, places), f"Question: {row.text('question')}"]
    if unit := row.optional("unit"):
        lines[-1] += f" (Unit: {unit})"
    if options:
        lines += ["Choices:", *(f"({letter}) {text}" for letter, text in options.items())]
    metadata = row.values.get("metadata")
    task = metadata.get("task", "") if isinstance(metadata, dict) else ""
    return Item(
        id=row.text("pid", "id"),
        location=row.location,
        prompt="\n".join(lines),
        images=(row.image("decoded_image") if row.has("decoded_image") else row.image("image"),),
        options=options,
        answer=letters[0] if closed else answer,
        answers=(answer,),
        choices=tuple(options),
        kind=task if isinstance(task, str) else "",
        details={"type": answer_type, "places": str(places)},
    )


def _hint(closed: bool, answer_type: str, places: int) -> str:
    if closed:
        return "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    wanted = {
        "integer": "an integer answer and provide the final value, e.g., 1, 2, 3,",
        "float": f"a floating-point number with {_PLACES.get(places, f'{places} decimal places')}",
        "list": "a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4],",
        "text": "a short answer and provide it",
    }[answer_type]
    return f"Hint: Please answer the question requiring {wanted} at the end."


def parse(item: Item, answer: str) -> str | None:
    """The letter of the option, or the answer in the form of its type."""
    if item.options:
        return letter_of(answer, item.options)
    text = answer.strip()
    if item.details["type"] == "list":
        lists = [one for one in map(_list, re.findall(r"\[[^\[\]]{0,1000}\]", text)) if one]
        return lists[-1] if lists else None
    if item.details["type"] == "text":
        return text or None
    text = _FRACTION.sub(r"\1/\2", text.replace("\u2212", "-"))
    # The first number of what is stated as the answer, or else the last of all: the prompt asks for it at the end.
    stated = _NUMBER.findall("".join((_STATED.findall(text) or [""])[-1]))
    numbers = stated[:1] or _NUMBER.findall(text)[-1:]
    return _number(numbers[0], item) if numbers else None


def is_right(item: Item, prediction: str) -> bool:
    """Equal letters; or equal answers in the form of their type."""
    if item.options:
        return prediction == item.answer
    if item.details["type"] == "list":
        return prediction == (_list(item.answer) or item.answer)
    if item.details["type"] == "text":
        return prediction.casefold() == item.answer.casefold()
    return prediction == (_number(item.answer, item) or item.answer)


def question_to_judge(item: Item, answer: str) -> str:
    """What a language model is asked, so that it extracts the answer."""
    return EXTRACTION.format(question=item.prompt, answer=answer)


def parse_reply(item: Item, reply: str) -> str | None:
    """What the language model extracted; None where it says that the response gives no answer."""
    return None if reply.strip(" \t\r\n.*`'\"").upper() == "NONE" else parse(item, reply)


def _number(text: str, item: Item) -> str | None:
    try:
        above, _, below = text.replace(",", "").partition("/")
        value = float(above) / float(below or 1)
        return str(int(value)) if item.details["type"] == "integer" else str(round(value, int(item.details["places"])))
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _list(text: str) -> str | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    return str(value) if isinstance(value, list) else None
