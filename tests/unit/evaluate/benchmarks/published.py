"""Small benchmark files in the schemas in which the real ones are published, with pictures of their own."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, *, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def base64_picture(seed: int) -> str:
    return base64.b64encode(picture(seed, kind="JPEG")).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """As pandas writes it: quoted where a cell holds a tab, quotes or line breaks."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), str(path), row_group_size=2)
    return path


def stored(seed: int) -> dict[str, Any]:
    """An image as `datasets` stores it in Parquet."""
    return {"bytes": picture(seed), "path": f"{seed}.png"}


def mmbench_rows() -> list[dict[str, Any]]:
    """Two questions; the first in all three rotations, of which two share its image."""
    first = {"question": 'Which "colour"\nis it?', "hint": "It is warm.", "category": "colour", "split": "dev"}
    texts = ["red", "green", "None"]
    rows: list[dict[str, Any]] = []
    for turn in range(3):
        turned = texts[turn:] + texts[:turn]
        row = {"index": 7 + 1_000_000 * turn, **first, **dict(zip("ABC", turned)), "D": ""}
        row |= {"answer": "ABC"[turned.index("red")], "l2-category": "attribute"}
        rows.append({**row, "image": base64_picture(1) if not turn else "7"})
    second = {"index": 8, "question": "Is it a cat?", "hint": "", "category": "object", "split": "dev", "A": "yes"}
    rows.append(
        {**second, "B": "no", "C": "", "D": "", "answer": "B", "l2-category": "kind", "image": base64_picture(2)}
    )
    return rows


def mmbench(folder: Path) -> str:
    return str(write_tsv(folder / "mmbench_dev.tsv", mmbench_rows()))


def seed_bench(folder: Path) -> str:
    """The original JSON beside its images; one question is on a video."""
    (folder / "SEED-Bench-image").mkdir(exist_ok=True)
    rows = []
    for number in range(4):
        (folder / "SEED-Bench-image" / f"{number}_{number}").write_bytes(picture(number, kind="JPEG"))
        rows.append(
            {
                **{f"choice_{letter}": f"thing {letter}" for letter in "abcd"},
                "answer": "ABCD"[number],
                "data_id": f"{number}_{number}",
                "data_type": "image",
                "question": f"What is number {number}?",
                "question_id": str(100 + number),
                "question_type_id": 1 + number % 2,
            }
        )
    rows.append({**rows[0], "data_type": "video", "data_id": "v.mp4", "question_id": "200", "question_type_id": 10})
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    path = folder / "SEED-Bench.json"
    path.write_text(json.dumps({"questions": rows, "question_type": types}))
    return str(path)


def mmmu(folder: Path) -> str:
    """Interleaved images, an option that is an image, and two open questions."""
    empty = {f"image_{number}": None for number in range(1, 8)}
    base = {"explanation": "", "topic_difficulty": "Easy", "subfield": "x", "img_type": "['Plots']", **empty}
    closed = {**base, "question_type": "multiple-choice"}
    opened = {**base, "question_type": "open", "options": "[]"}
    rows = [
        {
            **closed,
            "id": "validation_Art_Theory_1",
            "question": "What do <image 1> and <image 2> share?",
            "options": "['line', \"the artist's hand\", 'colour']",
            "answer": "B",
            "image_1": stored(1),
            "image_2": stored(2),
        },
        {
            **closed,
            "id": "validation_Math_2",
            "question": "<image 1> Which one follows? See <image 1>.",
            "options": "['<image 2>', 'none of them']",
            "answer": "A",
            "image_1": stored(3),
            "image_2": stored(4),
        },
        {**opened, "id": "validation_Math_3", "question": "<image 1> Sum?", "answer": "12", "image_1": stored(5)},
        {
            **opened,
            "id": "validation_Math_4",
            "question": "<image 1> Root?",
            "answer": "['24/7', '3.429']",
            "image_1": stored(6),
        },
    ]
    (folder / "Math").mkdir(exist_ok=True)
    write_parquet(folder / "Math" / "validation-00000-of-00001.parquet", rows)
    return str(folder)


def cmmmu(folder: Path) -> str:
    base: dict[str, Any] = {"category": "科学", "subcategory": "数学", "difficulty_level": "easy"}
    for number in range(1, 6):
        base |= {f"image_{number}": None, f"image_{number}_filename": None}
    options = {f"option{number}": text for number, text in enumerate(["汉代", "唐代", "明代", "宋代"], start=1)}
    no_options = dict.fromkeys(options, "-")
    named = {"image_1": stored(1), "image_1_filename": "1.png"}
    rows = [
        {**base, **options, **named, "id": 1, "type": "选择", "question": '<img="1.png">是何时的?', "answer": "D"},
        {**base, **options, **named, "id": 2, "type": "选择", "question": '<img="1.png">属于', "answer": "AB"},
        {**base, **no_options, **named, "id": 3, "type": "判断", "question": '<img="1.png">是圆。', "answer": "错"},
        {**base, **no_options, **named, "id": 4, "type": "填空", "question": '<img="1.png">共__个', "answer": "12"},
    ]
    write_parquet(folder / "val-00000-of-00001.parquet", rows)
    return str(folder)


def scienceqa(folder: Path) -> str:
    base = {"task": "closed choice", "grade": "grade8", "topic": "physics", "lecture": "", "solution": ""}
    rows = [
        {**base, "image": stored(1), "question": "Which force?", "choices": ["pull", "push"], "answer": 0, "hint": ""},
        {**base, "image": None, "question": "Which is hot?", "choices": ["ice", "sun", "sea"], "answer": 1}
        | {"hint": "Think of summer."},
        {**base, "image": stored(2), "question": "Why?", "choices": ["a", "b", "c", "d", "e"], "answer": 4, "hint": ""},
        {**base, "image": None, "question": "When?", "choices": ["now", "then"], "answer": 1, "hint": None},
    ]
    for number, row in enumerate(rows):
        row["subject"] = ("natural science", "language science")[number % 2]
    return str(write_parquet(folder / "test-00000-of-00001.parquet", rows))


def mathvista(folder: Path) -> str:
    (folder / "images").mkdir(exist_ok=True)
    base = {"choices": None, "unit": None, "precision": None, "question_type": "free_form", "query": "?"}
    rows = {
        "1": {**base, "question": "How far?", "unit": "m", "precision": 1.0, "answer": "1.2", "answer_type": "float"},
        "2": {**base, "question": "Which?", "choices": ["3/11", "8/11"], "answer": "8/11", "answer_type": "text"}
        | {"question_type": "multi_choice"},
        "3": {**base, "question": "How many?", "answer": "14", "answer_type": "integer"},
        "4": {**base, "question": "When?", "answer": "[2007, 2008]", "answer_type": "list"},
    }
    for pid, row in rows.items():
        (folder / "images" / f"{pid}.jpg").write_bytes(picture(int(pid), kind="JPEG"))
        row |= {"pid": pid, "image": f"images/{pid}.jpg", "metadata": {"task": "geometry", "split": "testmini"}}
    (folder / "testmini.json").write_text(json.dumps(rows))
    return str(folder)


def ocrbench(folder: Path) -> str:
    (folder / "OCRBench_Images" / "IIIT5K").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, answers in enumerate([["CENTRE"], "12.50", ["coca cola", "coca-cola"], [r"\frac { 1 } { 2 }"]]):
        name = f"IIIT5K/{number}.png"
        (folder / "OCRBench_Images" / name).write_bytes(picture(number))
        formula = number == 3
        kind = "Handwritten Mathematical Expression Recognition" if formula else "Regular Text Recognition"
        row = {"dataset_name": "HME100k" if formula else "IIIT5K", "id": 0, "image_path": name}
        rows.append({**row, "question": "what is written in the image?", "answers": answers, "type": kind})
    (folder / "OCRBench.json").write_text(json.dumps(rows))
    return str(folder)


def pope(folder: Path) -> str:
    """Three files of JSON lines that are called `.json`."""
    (folder / "val2014").mkdir(exist_ok=True)
    for kind in ("random", "popular", "adversarial"):
        lines = []
        for number, label in enumerate(["yes", "no"], start=1):
            name = f"COCO_val2014_{number:012}.jpg"
            (folder / "val2014" / name).write_bytes(picture(number, kind="JPEG"))
            text = f"Is there a {kind} thing in the image?"
            lines.append(json.dumps({"question_id": number, "image": name, "text": text, "label": label}))
        (folder / f"coco_pope_{kind}.json").write_text("\n".join(lines) + "\n")
    return str(folder)


def mm_vet(folder: Path) -> str:
    (folder / "images").mkdir(exist_ok=True)
    rows = {}
    for number, answer in enumerate(["-1 <AND> -5", "red <OR> crimson", "a long story", "7"]):
        (folder / "images" / f"v1_{number}.png").write_bytes(picture(number))
        capability = [["ocr", "math"], ["rec"], ["rec", "know", "gen"], ["math", "ocr"]][number]
        row = {"imagename": f"v1_{number}.png", "question": f"What is x {number}?", "answer": answer}
        rows[f"v1_{number}"] = {**row, "imagesource": "x", "capability": capability}
    (folder / "mm-vet.json").write_text(json.dumps(rows))
    return str(folder)


WRITERS = {
    "mmbench": mmbench,
    "mmbench-cn": mmbench,
    "seed-bench": seed_bench,
    "mmmu": mmmu,
    "cmmmu": cmmmu,
    "scienceqa": scienceqa,
    "mathvista": mathvista,
    "ocrbench": ocrbench,
    "pope": pope,
    "mm-vet": mm_vet,
}
"""Each writes a benchmark into a folder and returns what `NAME=` takes."""
