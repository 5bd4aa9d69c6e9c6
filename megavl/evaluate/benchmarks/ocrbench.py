"""OCRBench: text in images. The original JSON beside its images, Parquet or TSV.

Source: Yuliang-Liu/MultimodalOCR, `OCRBench/OCRBench.json` and `example.py`, and lmms-eval, `tasks/ocrbench`. An answer
is right if it contains a right text. Case does not count, except in formulas of HME100k, where blanks do not.
"""

from __future__ import annotations

from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.row import Row

_FOLDERS = ("OCRBench_Images", "images", "")
_FORMULAS = "Handwritten Mathematical Expression Recognition"
"""The type of HME100k; files as TSV name types alone."""


def read(where: str) -> Iterator[Item]:
    """All questions."""
    number = 0
    for path in benchmark_files(where, names=("OCRBench.json", "*.parquet", "*.tsv")):
        for row in read_rows(path):
            number += 1
            yield _item(row, number)


def _item(row: Row, number: int) -> Item:
    name = "answers" if "answers" in row.values or "answer" not in row.values else "answer"
    value = row.values.get(name)
    spelled = isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")
    answers = row.texts(name) if spelled or not isinstance(value, (str, int, float)) else (row.text(name),)
    if not answers or not all(answers):
        raise row.error(f"{name}: {list(answers)} must be one or more texts that are not empty")
    if row.has("image"):
        image = row.image("image")
    else:
        image = row.file("image_path", row.text("image_path"), folders=_FOLDERS)
        row.check_opens("image_path", image)
    return Item(
        # The original numbers its rows within each data set.
        id=row.optional("index") or str(number),
        location=row.location,
        prompt=row.text("question"),
        images=(image,),
        answer=answers[0],
        answers=answers,
        kind=row.text("type", "question_type", "category"),
        details={"data set": row.optional("dataset_name", "dataset")},
    )


def parse(item: Item, answer: str) -> str | None:
    """The answer itself; None if it is empty."""
    return answer.strip() or None


def is_right(item: Item, prediction: str) -> bool:
    """Whether a right text occurs in the answer."""
    formula = item.details["data set"] == "HME100k" or item.kind == _FORMULAS

    def plain(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if formula else text.lower()

    return any(plain(answer) in plain(prediction) for answer in item.answers)
