"""SEED-Bench: multiple choice on images. TSV with base64 images, the original JSON beside its images, or Parquet.

Source: AILab-CVC/SEED-Bench (`SEED-Bench.json`: rows under `questions`, with `question_type` naming the types),
lmms-eval, `tasks/seedbench`, and VLMEvalKit's `SEEDBench_IMG.tsv`. Videos are not read: only the image part is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import LETTER_LINE, option_lines
from megavl.evaluate.benchmarks.row import Row
from megavl.generate.prompt import ImageSource

_FOLDERS = ("SEED-Bench-image", "images", "")


def read(where: str) -> Iterator[Item | None]:
    """Questions on images; None for a video."""
    for path in benchmark_files(where, names=("SEED*.json", "*.tsv", "*.parquet")):
        yield from (None if row.values.get("data_type") == "video" else _item(row) for row in read_rows(path))


def _item(row: Row) -> Item:
    options = {letter: text for letter in "ABCD" if (text := row.optional(f"choice_{letter.lower()}", letter))}
    if list(options) != list("ABCD"[: max(2, len(options))]):
        row.text("choice_a", "A")
        row.text("choice_b", "B")
        row.require_no_gap(options)
    answer = row.text("answer")
    if answer not in options:
        raise row.error(f"answer: {answer[:20]!r} is none of the options {', '.join(options)}")
    return Item(
        id=row.text("question_id", "index"),
        location=row.location,
        prompt=f"{row.text('question')}\n{option_lines(options)}\n{LETTER_LINE}",
        images=(_image(row),),
        options=options,
        answer=answer,
        choices=tuple(options),
        kind=row.optional("category", "question_type_id"),
    )


def _image(row: Row) -> ImageSource:
    value = row.values.get("image")
    if isinstance(value, list) and len(value) == 1:
        # lmms-eval keeps a list of frames, of one for an image.
        source = row.stored("image")
        row.check_opens("image", source)
        return source
    if row.has("image"):
        return row.image("image")
    path = row.file("data_id", row.text("data_id"), folders=_FOLDERS)
    row.check_opens("data_id", path)
    return path
