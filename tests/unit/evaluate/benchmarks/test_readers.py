"""Benchmarks read from files in their published schemas, and rows that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.config.errors import DataError, UsageError
from megavl.data.template import IMAGE_TAG
from megavl.evaluate.benchmarks.ask import EncodedBenchmark, outcome_of, read_benchmarks, report_of
from megavl.evaluate.benchmarks.item import Item, Outcome
from megavl.evaluate.benchmarks.letters import LETTER_LINE, LETTER_LINE_CN, WORD_LINE
from megavl.evaluate.benchmarks.table import BENCHMARKS
from megavl.evaluate.run_tasks import fingerprint
from megavl.generate.prompt import read_canvases
from tests.unit.evaluate.benchmarks import published
from tests.unit.generate import models

GEOMETRY = models.config_of("tiny-hybrid").image_geometry


def items_of(name: str, folder: Path) -> tuple[Item, ...]:
    (task,) = read_benchmarks([f"{name}={published.WRITERS[name](folder)}"])
    return task.items


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_read_and_scored(name: str, tmp_path: Path) -> None:
    """The right answers score fully, empty ones nothing; images are opened when they are needed."""
    items = items_of(name, tmp_path)
    assert 4 <= len(items) <= 8 and len({item.id for item in items}) == len(items)
    for item in items:
        canvases = read_canvases(item.images, geometry=GEOMETRY)
        assert len(canvases) == len(item.images) and item.prompt.count(IMAGE_TAG) in (0, len(item.images))
        assert not item.choices or 0 <= item.right_choice < len(item.choices)
    benchmark = BENCHMARKS[name]
    right = [
        outcome_of(benchmark, item, item.answer, reply={"text": "1.0"} if benchmark.grade else None) for item in items
    ]
    wrong = [outcome_of(benchmark, item, "", reply={"text": "0"} if benchmark.grade else None) for item in items]
    found, none = benchmark.aggregate(right), benchmark.aggregate(wrong)
    assert found["score"] == 1 and found["failed_parses"] == 0 and found["interval"][1] == 1
    assert none["score"] == 0 and none["failed_parses"] == len(items)
    assert set(found["by_kind"]) == {
        part for item in items for part in (item.kind.split("+") if name == "mm-vet" else [item.kind])
    }


def test_mmbench_prompt_and_shared_image(tmp_path: Path) -> None:
    first, second, third, other = items_of("mmbench", tmp_path)
    assert first.prompt == (
        'Hint: It is warm.\nQuestion: Which "colour"\nis it?\nOptions:\nA. red\nB. green\nC. None\n' + LETTER_LINE
    )
    assert first.images == second.images == third.images != other.images
    assert (first.group, second.group, third.answer) == ("7", "7", "B") and list(other.options) == ["A", "B"]
    (chinese, *_) = items_of("mmbench-cn", tmp_path)
    assert chinese.prompt.endswith(LETTER_LINE_CN)


def test_circular_question_counts_once(tmp_path: Path) -> None:
    items = items_of("mmbench", tmp_path)
    said = {"7": "A", "1000007": "C", "2000007": "C", "8": "B"}
    outcomes = [outcome_of(BENCHMARKS["mmbench"], item, said[item.id]) for item in items]
    figures = BENCHMARKS["mmbench"].aggregate(outcomes)
    assert (figures["score"], figures["n"], figures["rows"], figures["plain"]) == (0.5, 2, 4, 1.0)
    assert figures["chance"] == pytest.approx((1 / 27 + 1 / 2) / 2)
    assert figures["by_kind"] == {"colour": {"score": 0.0, "n": 1}, "object": {"score": 1.0, "n": 1}}


def test_pope_counts_yes_and_no(tmp_path: Path) -> None:
    items = items_of("pope", tmp_path)
    assert [item.kind for item in items] == [kind for kind in ("adversarial", "popular", "random") for _ in range(2)]
    assert items[0].prompt == f"Is there a adversarial thing in the image?\n{WORD_LINE}"
    said = ["Yes", "Yes", "No", "No", "Yes", "I cannot tell; perhaps"]
    figures = BENCHMARKS["pope"].aggregate([outcome_of(BENCHMARKS["pope"], *pair) for pair in zip(items, said)])
    # "cannot" makes the last one a no.
    assert figures["accuracy"] == pytest.approx(4 / 6) and figures["failed_parses"] == 0
    assert (figures["precision"], figures["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert figures["yes_rate"] == 0.5 and figures["score"] == pytest.approx(2 / 3)
    assert figures["by_kind"]["random"]["score"] == 1.0 and figures["by_kind"]["popular"]["recall"] == 0.0


def test_interleaved_images_keep_their_order(tmp_path: Path) -> None:
    first, second, *_ = items_of("mmmu", tmp_path)
    assert first.prompt.startswith(f"What do {IMAGE_TAG} and {IMAGE_TAG} share?\nA. line\nB. the artist's hand")
    assert second.prompt.startswith(f"{IMAGE_TAG} Which one follows? See image 1.\nA. {IMAGE_TAG}\nB. none of them")
    assert (first.kind, second.kind) == ("Art_Theory", "Math")


def test_questions_without_one_right_choice_are_not_scored(tmp_path: Path) -> None:
    assert [len(item.choices) for item in items_of("cmmmu", tmp_path)] == [4, 0, 2, 0]


def test_other_published_forms_hold_the_same_questions(tmp_path: Path) -> None:
    """A TSV whose rows share images, as VLMEvalKit keeps them, and Parquet with lists of frames, as lmms-eval does."""
    row = {"question": "What?", "A": "one", "B": "two", "C": "", "D": "", "answer": "B", "category": "x"}
    rows = [{"index": 1, **row, "image": "2"}, {"index": 2, **row, "image": published.base64_picture(1)}]
    tsv = published.write_tsv(tmp_path / "SEEDBench_IMG.tsv", rows)
    named = {f"choice_{letter.lower()}": row[letter] for letter in "ABCD"}
    base = {**named, "question": "What?", "answer": "B", "data_type": "image", "question_type_id": 1}
    frames = [{"question_id": str(number), **base, "image": [published.stored(1)]} for number in (1, 2)]
    parquet = published.write_parquet(tmp_path / "test-00000-of-00001.parquet", frames)
    found = [read_benchmarks([f"seed-bench={path}"])[0].items for path in (tsv, parquet)]
    for items in found:
        assert [(item.id, item.prompt, item.answer) for item in items] == [
            (number, f"What?\nA. one\nB. two\n{LETTER_LINE}", "B") for number in "12"
        ]
        canvases = read_canvases([image for item in items for image in item.images], geometry=GEOMETRY)
        assert torch.equal(canvases[0], canvases[1])


def test_formulas_of_a_tsv_count_without_blanks(tmp_path: Path) -> None:
    """VLMEvalKit's file has no names of data sets, but types."""
    row = {"question": "?", "answer": r"['\\frac { 1 } { 2 }']"}
    types = ("Handwritten Mathematical Expression Recognition", "Regular Text Recognition")
    rows = [
        {"index": number, "image": published.base64_picture(number), **row, "category": kind}
        for number, kind in enumerate(types)
    ]
    (task,) = read_benchmarks([f"ocrbench={published.write_tsv(tmp_path / 'OCRBench.tsv', rows)}"])
    assert [item.kind for item in task.items] == list(types)
    assert [BENCHMARKS["ocrbench"].is_right(item, r"$\frac{1}{2}$") for item in task.items] == [True, False]


def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path) -> None:
    """As Excel saves a TSV, also with a quoted header."""
    path = published.write_tsv(tmp_path / "dev.tsv", published.mmbench_rows())
    (plain,) = read_benchmarks([f"mmbench={path}"])
    text = path.read_bytes().replace(b"\n", b"\r\n").replace(b"index", b'"index"', 1)
    path.write_bytes(b"\xef\xbb\xbf" + text)
    (task,) = read_benchmarks([f"mmbench={path}"])
    assert [item.id for item in task.items] == [item.id for item in plain.items]
    assert [item.options for item in task.items] == [item.options for item in plain.items]
    assert len(read_canvases([image for item in task.items for image in item.images], geometry=GEOMETRY)) == 4


def test_options_of_a_table_have_no_gap(tmp_path: Path) -> None:
    row = {"question": "Which?", "hint": "", "A": "ice", "B": "", "C": "sun", "D": "", "answer": "C", "category": "x"}
    path = published.write_tsv(tmp_path / "ScienceQA_TEST.tsv", [{"index": 1, **row, "image": ""}])
    with pytest.raises(DataError, match=r"ScienceQA_TEST.tsv:2 \(index 1\): has options A, C; a question needs A, B"):
        read_benchmarks([f"scienceqa={path}"])


def test_right_options_may_be_listed_in_any_form(tmp_path: Path) -> None:
    where = published.cmmmu(tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    rewrite(path, setting(1, "answer", "D, A"))
    (task,) = read_benchmarks([f"cmmmu={where}"])
    assert task.items[1].answer == "AD"


def test_rows_that_are_passed_over_are_counted(tmp_path: Path) -> None:
    (task,) = read_benchmarks([f"seed-bench={published.seed_bench(tmp_path)}"])
    assert (len(task.items), task.passed_over) == (4, 1)
    folder = tmp_path / "test/2"
    folder.mkdir(parents=True)
    (folder / "image.png").write_bytes(published.picture(1))
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None, "subject": "x"}
    rows = {"1": {**row, "split": "train"}, "2": {**row, "split": "test", "image": "image.png"}}
    (tmp_path / "problems.json").write_text(json.dumps(rows))
    (task,) = read_benchmarks([f"scienceqa={tmp_path / 'problems.json'}"])
    assert ([item.id for item in task.items], task.passed_over) == (["2"], 1)
    assert task.items[0].images == (folder / "image.png",)


def test_images_are_found_above_their_questions(tmp_path: Path) -> None:
    published.pope(tmp_path)
    (tmp_path / "output/coco").mkdir(parents=True)
    for path in list(tmp_path.glob("*.json")):
        path.rename(tmp_path / "output/coco" / path.name)
    assert len(read_benchmarks([f"pope={tmp_path}"])[0].items) == 6


def test_limit_reads_no_further_row(tmp_path: Path) -> None:
    published.pope(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    path.write_text(path.read_text().replace('"no"', '"perhaps"'))
    (task,) = read_benchmarks([f"POPE={path}"], limit=1)
    assert [item.answer for item in task.items] == ["Yes"]
    with pytest.raises(DataError, match="perhaps"):
        read_benchmarks([f"POPE={path}"], limit=2)


@pytest.mark.parametrize(("limit", "ids"), [(1, ["7", "1000007", "2000007"]), (2, ["7", "8", "1000007", "2000007"])])
def test_limit_counts_questions_with_all_rotations(limit: int, ids: list[str], tmp_path: Path) -> None:
    first, second, third, other = published.mmbench_rows()
    path = published.write_tsv(tmp_path / "few.tsv", [first, other, second, third])
    (task,) = read_benchmarks([f"mmbench={path}"], limit=limit)
    assert [item.id for item in task.items] == ids
    outcomes = [Outcome(item=item, text="", prediction=None, score=1.0) for item in task.items]
    assert report_of(task, outcomes, mode="generate", notes=()).figures["n"] == limit


def test_fingerprint_follows_stored_images(tmp_path: Path) -> None:
    """Also where location and size of an image are the same."""

    def found(image: str, suffix: str) -> str:
        rows = published.mmbench_rows()
        rows[3]["image"] = image
        path = tmp_path / f"few.{suffix}"
        path.write_text(json.dumps(rows[3])) if suffix == "json" else published.write_tsv(path, rows)
        (task,) = read_benchmarks([f"mmbench={path}"])
        return fingerprint([], [], [], [EncodedBenchmark(task=task, mode="generate")])

    first = published.base64_picture(2)
    other = first[:-8] + ("AAAA" if first[-8:-4] != "AAAA" else "BBBB") + first[-4:]
    for suffix in ("tsv", "json"):
        assert found(first, suffix) == found(first, suffix) != found(other, suffix)


Change = Callable[[list[dict[str, Any]]], None]


def without(column: str) -> Change:
    return lambda rows: [row.pop(column) for row in rows] and None


def setting(number: int, column: str, value: Any) -> Change:
    return lambda rows: rows[number].update({column: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("question"), r"few.tsv:\d+ \(index 7\): has no column 'question'; its columns are index, "),
        (without("answer"), "has no column 'answer'"),
        (without("image"), "has no column 'image'"),
        (without("index"), "few.tsv:2: has no column 'index'"),
        (
            setting(3, "image", "A" * 1200 + "!"),
            r"few.tsv:8 \(index 8\): image: the image does not open \(broken base64",
        ),
        (setting(3, "image", "QUJD" * 400), r"\(index 8\): image: the image does not open \(not one of JPEG"),
        (setting(3, "image", ""), r"\(index 8\): image: is empty"),
        (setting(1, "image", "99"), r"\(index 1000007\): image: is that of row '99', which the file does not have"),
        (setting(1, "answer", "E"), r"\(index 1000007\): answer: 'E' is none of the options A, B, C"),
        (setting(3, "answer", ""), r"\(index 8\): answer: is empty"),
        (setting(3, "B", ""), r"\(index 8\): has options A; a question needs A, B and so on"),
        (setting(3, "index", "x1"), "index: 'x1' is no whole number"),
        (setting(3, "index", "7"), "id '7' is also that of"),
        (setting(3, "question", f"see {IMAGE_TAG}"), "question: spells <image_placeholder>"),
    ],
)
def test_bad_tsv_row_is_named(change: Change, message: str, tmp_path: Path) -> None:
    rows = published.mmbench_rows()
    change(rows)
    path = published.write_tsv(tmp_path / "few.tsv", rows)
    with pytest.raises(DataError, match=message):
        read_benchmarks([f"mmbench={path}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no question of MMBench"),
        (b"index\tquestion\n1\n", "few.tsv:2: has 1 cells for 2 columns"),
        (b'index\tquestion\n1\t"open\n2\tx\n', "cannot be read as TSV"),
        (b"index\tindex\n", "two columns are called 'index'"),
        (b"index\tquestion\n1\t\xff\xfe\n", "cannot be read as TSV"),
        (b"\x00\x01\x02", "few.tsv"),
    ],
)
def test_damaged_tsv_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "few.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_benchmarks([f"mmbench={path}"])


@pytest.mark.parametrize(
    ("name", "file", "key", "value", "message"),
    [
        ("ocrbench", "OCRBench.json", "answers", {"a": 1}, "row 2: answers: .* is no list of texts"),
        ("ocrbench", "OCRBench.json", "answers", [], "row 2: answers: .* must be one or more"),
        ("ocrbench", "OCRBench.json", "image_path", "../x.png", "image_path: '../x.png' is no file below"),
        ("ocrbench", "OCRBench.json", "image_path", "/etc/passwd", "is no file below"),
        ("ocrbench", "OCRBench.json", "image_path", "gone.png", "there is no file 'gone.png'"),
        ("ocrbench", "OCRBench.json", "image_path", "x" * 600, "there is no file 'xxx"),
        ("ocrbench", "OCRBench.json", "image_path", "a\0.png", "is no file below"),
        ("ocrbench", "OCRBench.json", "type", None, "row 2: type: is empty"),
        ("mathvista", "testmini.json", "choices", "[open('x')]", "row '2': choices: .* is no list of texts"),
        ("mathvista", "testmini.json", "choices", None, "row '2': choices: is empty"),
        ("mathvista", "testmini.json", "answer", "", "row '2': answer: is empty"),
        ("mathvista", "testmini.json", "answer_type", "tuple", "answer_type: 'tuple' is none of"),
        ("mm-vet", "mm-vet.json", "capability", None, "capability: is empty"),
        ("seed-bench", "SEED-Bench.json", "choice_b", "", "row 2: choice_b: is empty"),
        ("seed-bench", "SEED-Bench.json", "data_id", "5_5", "row 2: data_id: there is no file '5_5'"),
        ("pope", "coco_pope_random.json", "label", "maybe", "random.json:2: label: 'maybe' is neither yes nor no"),
        ("pope", "coco_pope_random.json", "question_id", 1, "id 'random-1' is also that of"),
    ],
)
def test_bad_json_row_is_named(name: str, file: str, key: str, value: Any, message: str, tmp_path: Path) -> None:
    """The second object of the file is changed."""
    where = published.WRITERS[name](tmp_path)
    path = tmp_path / file
    if name == "pope":
        lines = path.read_text().splitlines()
        path.write_text(f"{lines[0]}\n{json.dumps({**json.loads(lines[1]), key: value})}\n")
    else:
        content = json.loads(path.read_text())
        rows = content["questions"] if name == "seed-bench" else content
        rows[list(rows)[1] if isinstance(rows, dict) else 1][key] = value
        path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_benchmarks([f"{name}={where}"])


def rewrite(path: Path, change: Change) -> None:
    from pyarrow import parquet

    rows = parquet.read_table(str(path)).to_pylist()
    change(rows)
    published.write_parquet(path, rows)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mmmu", setting(1, "options", "os.system('true')"), "row 2: options: .* is no list of texts"),
        ("mmmu", setting(1, "options", "{'a': 1}"), "row 2: options: .* is no list"),
        ("mmmu", setting(1, "options", "[" * 5000), "row 2: options: .* is no list"),
        ("mmmu", setting(1, "options", "['one']"), "row 2: options: .* are fewer than two"),
        ("mmmu", setting(1, "image_2", None), "row 2: names image 2, but column image_2 is absent or empty"),
        ("mmmu", setting(1, "image_2", {"bytes": b"no image", "path": ""}), "row 2: image_2: the image does not open"),
        ("mmmu", setting(1, "answer", "?"), "row 2: answer: is '\\?', so this split cannot be scored"),
        ("mmmu", setting(1, "answer", "F"), "row 2: answer: 'F' is none of the options A, B"),
        ("mmmu", without("question_type"), "row 1: has no column 'question_type'"),
        ("cmmmu", setting(2, "answer", "是"), "row 3: answer: '是' is neither 对 nor 错"),
        ("cmmmu", setting(2, "type", "问答"), "row 3: type: '问答' is none of"),
        ("cmmmu", setting(2, "question", '<img="2.png">?'), "row 3: names image '2.png', which is in none"),
        ("scienceqa", setting(2, "answer", 5), "row 3: answer: 5 is no index of its 5 choices"),
        ("scienceqa", setting(2, "choices", ["one"]), "row 3: choices: .* are fewer than two"),
        (
            "scienceqa",
            setting(2, "choices", list("abcdefghijklmnopqrstuvwxyz?")),
            "row 3: choices: .* are 27, more than",
        ),
        ("scienceqa", setting(2, "image", {"bytes": published.picture(1)[:90], "path": ""}), "row 3: image: the image"),
    ],
)
def test_bad_parquet_row_is_named(name: str, change: Change, message: str, tmp_path: Path) -> None:
    where = published.WRITERS[name](tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    rewrite(path, change)
    with pytest.raises(DataError, match=message):
        read_benchmarks([f"{name}={where}"])


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    where = published.mmmu(tmp_path)
    (path,) = tmp_path.rglob("*.parquet")
    path.with_name("test-00000-of-00001.parquet").write_bytes(path.read_bytes())
    with pytest.raises(
        DataError, match=r"holds several files or splits \(Math/test-00000-of-00001.parquet, Math/validation"
    ):
        read_benchmarks([f"mmmu={where}"])
    (task,) = read_benchmarks([f"mmmu={where}/**/validation-*.parquet"])
    assert len(task.items) == 4
    path.with_name("broken.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="broken.parquet: is no readable Parquet file"):
        read_benchmarks([f"mmmu={path.with_name('broken.parquet')}"])
    with pytest.raises(DataError, match="gone: does not exist"):
        read_benchmarks([f"mmmu={tmp_path / 'gone'}"])
    with pytest.raises(DataError, match=r"has no file \*.tsv or \*.parquet in it"):
        (tmp_path / "empty").mkdir()
        read_benchmarks([f"mmbench={tmp_path / 'empty'}"])
    with pytest.raises(UsageError, match="mmmu is named twice"):
        read_benchmarks([f"mmmu={where}", "MMMU=other"])
    with pytest.raises(UsageError, match="there is no benchmark 'mmbnch'; did you mean 'mmbench'"):
        read_benchmarks([f"mmbnch={where}"])
