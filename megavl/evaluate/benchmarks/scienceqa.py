"""ScienceQA: multiple choice on science, with an image or without; Parquet, TSV or the original `problems.json`.

Source: lupantech/ScienceQA and lmms-eval, `tasks/scienceqa`: `Context: ...`, the question, and lettered choices.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE, option_lines
from megavl.evaluate.benchmarks.row import Row, names_a_file
from megavl.generate.prompt import ImageSource


def read(where: str) -> Iterator[Item | None]:
    """All questions, those without an image too. `problems.json` has all splits; None stands for another than test."""
    number = 0
    for path in benchmark_files(where, names=("problems.json", "*.parquet", "*.tsv")):
        for row in read_rows(path):
            number += 1
            yield None if path.suffix == ".json" and row.text("split") != "test" else _item(row, number)


def _item(row: Row, number: int) -> Item:
    tabular = row.has("A", "B")
    if tabular:
        options = {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
        row.require_no_gap(options)
    else:
        options = row.options("choices")
    text = row.text("answer")
    answer = text if text in options else _letter_at(row, options)
    hint = row.optional("hint")
    lines = [f"Context: {hint}"] * bool(hint) + [row.text("question"), option_lines(options), LETTER_LINE]
    return Item(
        id=row.optional("id", "index", "question_id") or str(number),
        location=row.location,
        prompt="\n".join(lines),
        images=_images(row),
        options=options,
        answer=answer,
        choices=tuple(options),
        kind=row.optional("subject", "category"),
    )


def _letter_at(row: Row, options: dict[str, str]) -> str:
    index = row.number("answer")
    if not 0 <= index < len(options):
        raise row.error(f"answer: {index} is no index of its {len(options)} choices; the first is 0")
    return list(options)[index]


def _images(row: Row) -> tuple[ImageSource, ...]:
    name = row.values.get("image")
    if not row.has("image"):
        return ()
    if names_a_file(name) and "id" in row.values:
        # The original keeps the image of problem 5 as test/5/image.png.
        folder = f"{row.optional('split')}/{row.text('id')}"
        path = row.file("image", name, folders=(folder, f"images/{folder}", "", "images"))
        row.check_opens("image", path)
        return (path,)
    return (row.image("image"),)
