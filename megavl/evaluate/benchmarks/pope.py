"""POPE: is an object in the image, yes or no. Three files of JSON lines beside the images of COCO, Parquet or TSV.

Sources: RUCAIBox/POPE, `evaluate.py` and `output/coco/coco_pope_*.json`, and lmms-eval, `tasks/pope`. The original
takes every answer without `no` or `not` for a yes; here an answer that is neither is a failed parse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.letters import WORD_LINE
from megavl.evaluate.benchmarks.row import Row, names_a_file
from megavl.generate.prompt import ImageSource

CHOICES = ("Yes", "No")
_FOLDERS = ("", "val2014", "images", "image")
_KINDS = ("random", "popular", "adversarial")


def read(where: str) -> Iterator[Item]:
    """Questions of one file or, of a folder, of all three."""
    for path in benchmark_files(where, names=("*pope_*.json", "*pope_*.jsonl", "*.parquet", "*.tsv"), several=True):
        kind = next((kind for kind in _KINDS if kind in path.name.lower()), path.stem)
        yield from (_item(row, kind=kind) for row in read_rows(path))


def _item(row: Row, *, kind: str) -> Item:
    label = row.text("label", "answer").lower()
    if label not in ("yes", "no"):
        raise row.error(f"label: {label[:20]!r} is neither yes nor no")
    kind = row.optional("category") or kind
    # Questions of each file are numbered from 1.
    number = row.text("question_id", "index")
    return Item(
        id=f"{kind}-{number}",
        location=row.location,
        prompt=f"{row.text('text', 'question')}\n{WORD_LINE}",
        images=(_image(row),),
        answer=label.capitalize(),
        choices=CHOICES,
        kind=kind,
    )


def _image(row: Row) -> ImageSource:
    value = row.values.get("image")
    if names_a_file(value):
        path = row.file("image", value, folders=_FOLDERS)
        row.check_opens("image", path)
        return path
    return row.image("image")


def parse(item: Item, answer: str) -> str | None:
    """Yes or No, from the first sentence that says either."""
    for sentence in re.split(r"[.!?\n;]", answer.lower()):
        words = set(re.findall(r"[a-z']+", sentence.replace("’", "'")))
        no = bool(words & {"no", "nope", "not", "none", "cannot"}) or any(word.endswith("n't") for word in words)
        yes = bool(words & {"yes", "yeah", "yep", "yup"})
        if yes and no:
            # `Yes, there is not only one` begins with its answer.
            first = re.match(r"\W*(yes|no)\b", sentence)
            return first.group(1).capitalize() if first else None
        if yes or no:
            return "Yes" if yes else "No"
    return None
