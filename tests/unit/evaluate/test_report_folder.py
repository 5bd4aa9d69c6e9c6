"""Intervals, and reports as Markdown and SVG, also of hostile names."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megavl.config.errors import UsageError
from megavl.evaluate.bits_per_byte import ScoredPassage
from megavl.evaluate.free_form import FreeFormAnswer
from megavl.evaluate.interval import bootstrap, wilson
from megavl.evaluate.out_folder import make_folder, model_fingerprint, take_folder, write_report
from megavl.evaluate.report import Answered, Report
from megavl.evaluate.task import OpenQuestion, Passage, Question
from megavl.generate.score import Score

HOSTILE = '<script>alert(1)</script>|`x`\x1b[2J & "q"'


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (300, 1000, 0.2724, 0.3291), (0, 0, 0, 1)],
)
def test_wilson_interval_has_the_published_values(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_bootstrap_agrees_with_wilson_and_repeats() -> None:
    found = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap(found, lambda some: sum(some) / len(some))
    assert (low, high) == (pytest.approx(0.2724, abs=0.01), pytest.approx(0.3291, abs=0.01))
    assert (low, high) == bootstrap(found, lambda some: sum(some) / len(some))


def report() -> Report:
    scores = tuple(Score(log_prob=-value, tokens=1, greedy=False) for value in (1.0, 2.0))
    question = Question(id="q", prompt="?", choices=("a", "b"), answer=0, kind=HOSTILE)
    written = OpenQuestion(id="o", prompt="?", answers=("a",), kind="written")
    passages = [ScoredPassage(entry=Passage(id="p", text="four", kind=HOSTILE), tokens=4, bits=8.0)]
    return Report(
        answers=(Answered(entry=question, scores=scores),),
        free_form=(FreeFormAnswer(entry=written, text="b"),),
        passages=tuple(passages),
    )


def test_report_is_written_in_three_forms(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "out")
    write_report(folder, report(), about={"model": HOSTILE, "normalization": "token"})
    content = json.loads((folder / "report.json").read_text())
    assert content["model"] == HOSTILE and content["accuracy"] == 1.0 and content["text"]["bits_per_byte"] == 2.0
    page, picture = (folder / "report.md").read_text(), (folder / "report.svg").read_text()
    assert "<script" not in page and "\x1b" not in page + picture
    rows = [line for line in page.splitlines() if "exact answers" in line]
    assert rows == ["| written | exact answers | 0.0 | 0.0 to 79.3 | - | - | 1 |"]
    assert "| 2.0000 | 2.0000 to 2.0000 | 1 |" in page
    tree = ElementTree.fromstring(picture)
    names = {element.tag.partition("}")[2] for element in tree.iter()}
    assert names == {"svg", "title", "rect", "text", "line", "path"}
    assert any("<script>" in (element.text or "") for element in tree.iter())


def test_empty_report_has_a_picture(tmp_path: Path) -> None:
    write_report(make_folder(tmp_path), Report(), about={})
    assert "no share to draw" in (tmp_path / "report.svg").read_text()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, message in ((tmp_path / "file", "is no directory; give another"), (tmp_path / "a/b", "create it first")):
        with pytest.raises(UsageError, match=message):
            make_folder(path)


def test_folder_has_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with take_folder(tmp_path / "out"), pytest.raises(UsageError, match="--out: "), take_folder(tmp_path / "out"):
        pass
    with take_folder(tmp_path / "out"):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"a" * 200_000)
    first = model_fingerprint(tmp_path)
    assert first == model_fingerprint(tmp_path)
    for changed in (
        b"b" + b"a" * 199_999,
        b"a" * 199_999 + b"b",
        b"a" * 200_001,
        b"a" * 99_999 + b"b" + b"a" * 100_000,
    ):
        path.write_bytes(changed)
        assert model_fingerprint(tmp_path) != first
