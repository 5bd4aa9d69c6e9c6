"""MMBench and MMBench-CN: multiple choice with circular evaluation, TSV files with base64 images.

A question counts if it is answered right under every rotation of its options (MMBench, arXiv:2307.06281, section 4).
VLMEvalKit has the format: rotations share `index % 1e6`, and a short text in the column `image` is the index of the
row that holds the image (`vlmeval/dataset/image_mcq.py`, `utils/multiple_choice.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE, LETTER_LINE_CN, option_lines
from megavl.evaluate.benchmarks.row import Row

ROTATION = 1_000_000


def read(where: str, *, letter_line: str = LETTER_LINE) -> Iterator[Item]:
    """Questions of one split; `letter_line` ends their prompts."""
    for path in benchmark_files(where, names=("*.tsv", "*.parquet")):
        yield from (_item(row, letter_line=letter_line) for row in read_rows(path))


read_cn = partial(read, letter_line=LETTER_LINE_CN)


def _item(row: Row, *, letter_line: str) -> Item:
    options = {letter: text for letter in "ABCDE" if (text := row.optional(letter))}
    row.require_no_gap(options)
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
        images=(row.image("image"),),
        options=options,
        answer=answer,
        choices=tuple(options),
        kind=row.optional("category"),
        group=str(index % ROTATION),
    )
