"""MM-Vet: free answers that need several capabilities at once. The original JSON beside its images, TSV or Parquet.

Source: yuweihao/MM-Vet (`mm-vet.json`, `mm-vet_evaluator.ipynb`) and lmms-eval, `tasks/mmvet`. A language model grades
each answer from 0.0 to 1.0. Nothing else grades it; without a judge there is no score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from megavl.evaluate.benchmarks.files import benchmark_files, read_rows
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.row import Row

GRADING = """Grade a prediction against the ground truth with a number from 0.0 (all wrong) to 1.0 (all right), in \
steps of 0.1. Where the ground truth joins elements by <AND>, the prediction must have all of them, and gets the share \
that it has. Where it joins them by <OR>, any one of them is enough. Write the number alone.

Question: What are the two solutions?
Ground truth: 4 <AND> -4
Prediction: The solution is x = 4.
Grade: 0.5

Question: {question}
Ground truth: {answer}
Prediction: {prediction}
Grade:"""


def read(where: str) -> Iterator[Item]:
    """All questions."""
    for path in benchmark_files(where, names=("mm-vet.json", "*.tsv", "*.parquet")):
        yield from map(_item, read_rows(path))


def _item(row: Row) -> Item:
    capability = row.values.get("capability", row.values.get("category"))
    if isinstance(capability, str):
        kinds = [part.strip() for part in capability.split(",") if part.strip()]
    elif isinstance(capability, list):
        kinds = list(row.texts("capability"))
    else:
        kinds = [row.text("capability", "category")]
    image = row.image("image") if row.has("image") else None
    if image is None:
        image = row.file("imagename", row.text("imagename"), folders=("images", ""))
        row.check_opens("imagename", image)
    return Item(
        id=row.text("id", "question_id", "index"),
        location=row.location,
        prompt=row.text("question"),
        images=(image,),
        answer=row.text("answer"),
        answers=(row.text("answer"),),
        kind="+".join(sorted(kinds)),
    )


def question_to_judge(item: Item, answer: str) -> str:
    """What a language model is asked, so that it grades the answer."""
    truth = item.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return GRADING.format(question=item.prompt, answer=" ".join(truth.split()), prediction=answer)


def grade_of(reply: str) -> float | None:
    """The grade in a judge's reply; None if there is none from 0 to 1."""
    found = re.match(r"[\s*_]*(?:grade|score|correctness)?[\s*_:=]*(\d(?:\.\d+)?)(?![\d.e]*\d)", reply.strip().lower())
    grade = float(found.group(1)) if found else -1.0
    return grade if 0 <= grade <= 1 else None
