"""MMBench and MMBench-CN: multiple choice with circular evaluation, TSV files with base64 images.

A question counts if it is answered right under every rotation of its options (MMBench, arXiv:2307.06281, section 4).
VLMEvalKit has the format: rotations share `index % 1e6`, and a short text in the column `image` is the index of the
row that holds the image (`vlmeval/dataset/image_mcq.py`, `utils/multiple_choice.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE, LETTER_LINE_CN, option_lines
from megavl.evaluate.benchmarks.row import Row
from megavl.generate.prompt import ImageSource

ROTATION = 1_000_000
_REFERENCE = 64
"""Most characters of the cell `image` that are the index of another row."""


def read(where: str, *, letter_line: str = LETTER_LINE) -> Iterator[Item]:
    """Questions of one split; `letter_line` ends their prompts."""
    for path in benchmark_files(where, names=("*.tsv", "*.parquet")):
        images: dict[str, ImageSource] = {}
        lent: list[tuple[Row, str]] = []
        rows = []
        for row in read_rows(path):
            index = row.text("index")
            cell = row.values.get("image")
            if isinstance(cell, str) and 0 < len(cell.strip()) <= _REFERENCE:
                lent.append((row, cell.strip()))
            elif index in images:
                raise row.error("index: stands twice in the file")
            else:
                images[index] = row.image("image")
            # Images take nearly all of the memory of a row.
            rows.append((replace(row, values={**row.values, "image": None}), index))
        for row, wanted in lent:
            if wanted not in images:
                raise row.error(f"image: is that of row {wanted}, which the file does not have or which has none")
            images[row.text("index")] = images[wanted]
        yield from (_item(row, images[index], letter_line=letter_line) for row, index in rows)


read_cn = partial(read, letter_line=LETTER_LINE_CN)


def _item(row: Row, image: ImageSource, *, letter_line: str) -> Item:
    options = {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
    if len(options) < 2 or list(options) != list("ABCDE"[: len(options)]):
        raise row.error(f"has options {', '.join(options) or 'none'}; a question needs A, B and so on without a gap")
    answer = row.text("answer")
    if answer not in options:
        raise row.error(f"answer: {answer[:20]!r} is none of the options {', '.join(options)}")
    hint, question = row.optional("hint"), row.text("question")
    lines = [f"Hint: {hint}"] * bool(hint) + [f"Question: {question}", "Options:", option_lines(options), letter_line]
    index = row.number("index")
    return Item(
        id=str(index),
        location=row.location,
        prompt="\n".join(lines),
        images=(image,),
        options=options,
        answer=answer,
        choices=tuple(options),
        kind=row.optional("category"),
        group=str(index % ROTATION),
    )
