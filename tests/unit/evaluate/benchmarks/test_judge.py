"""Answers that a language model extracts or grades, from an endpoint on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavl.evaluate.benchmarks.ask import judge_benchmark, outcome_of, read_benchmarks
from megavl.evaluate.benchmarks.item import Item
from megavl.evaluate.benchmarks.report import BenchmarkReport, benchmark_table
from megavl.evaluate.benchmarks.table import BENCHMARKS
from megavl.evaluate.endpoint import Endpoint
from megavl.evaluate.ledger import Ledger, read_answers
from tests.unit.evaluate.benchmarks import published
from tests.unit.evaluate.fake_endpoint import FakeReply, fake_endpoint


def answered(name: str, folder: Path, texts: list[str]) -> BenchmarkReport:
    """A report on the answers that a model gave, before a judge reads them."""
    (task,) = read_benchmarks([f"{name}={published.WRITERS[name](folder)}"])
    outcomes = tuple(outcome_of(task.benchmark, item, text) for item, text in zip(task.items, texts, strict=True))
    figures = task.benchmark.aggregate(outcomes)
    return BenchmarkReport(name=name, outcomes=outcomes, mode="generate", figures=figures)


def judged(report: BenchmarkReport, reply: Any, *, ledger: Ledger) -> tuple[BenchmarkReport, list[dict[str, Any]]]:
    with fake_endpoint(reply) as fake:
        endpoint = Endpoint(fake.url, "judge-1", attempts=2, pause_s=0.01, timeout_s=30)
        return judge_benchmark(report, judge=endpoint, ledger=ledger), fake.requests


def test_grades_are_averaged_over_capabilities(tmp_path: Path) -> None:
    grades = {"first": "0.5", "second": "1.0", "third": "0.0", "fourth": "0.7"}

    def reply(body: dict[str, Any], number: int) -> FakeReply:
        asked = body["messages"][-1]["content"].rpartition("Prediction: ")[2]
        return FakeReply(text=grades[asked.split("\n")[0]])

    before = answered("mm-vet", tmp_path, list(grades))
    assert before.figures["score"] is None and before.figures["ungraded"] == 4
    report, requests = judged(before, reply, ledger=Ledger())
    assert report.figures["score"] == pytest.approx(0.55) and report.figures["ungraded"] == 0
    assert report.figures["by_kind"]["math"] == {"score": pytest.approx(0.6), "n": 2}
    assert report.figures["by_kind"]["rec"] == {"score": pytest.approx(0.5), "n": 2}
    assert "-1 <AND> -5" in json.dumps([one["messages"] for one in requests])
    assert report.notes == ("judged by judge-1",) and "55.0" in benchmark_table([report])


def test_extraction_by_a_judge_decides(tmp_path: Path) -> None:
    """What the rules cannot read, the judge does; NONE is a failed parse."""
    texts = ["one point two metres", "the larger fraction", "fourteen", "I do not know"]
    before = answered("mathvista", tmp_path, texts)
    assert before.figures["failed_parses"] == 4 and before.figures["score"] == 0
    said = dict(zip(texts, ["1.2", "B", "14", "NONE"]))

    def reply(body: dict[str, Any], number: int) -> FakeReply:
        content = body["messages"][-1]["content"]
        return FakeReply(text=next(text for answer, text in said.items() if answer in content))

    report, _ = judged(before, reply, ledger=Ledger())
    assert report.figures["score"] == 0.75 and report.figures["failed_parses"] == 1


def test_error_of_the_judge_changes_no_score(tmp_path: Path) -> None:
    texts = ["1.2", "B", "14", "[1, 2]"]
    before = answered("mathvista", tmp_path, texts)
    report, _ = judged(before, lambda body, number: FakeReply(status=400), ledger=Ledger())
    assert report.figures == before.figures and report.figures["score"] >= 0.75
    assert "4 answers could not be judged and count by the rules, the first: HTTP 400" in report.notes[1]


@pytest.mark.parametrize("said", ["NONE", "None.", "**none**"])
def test_none_from_the_judge_is_no_answer(said: str) -> None:
    """Neither an answer in words, nor the option that is called so."""
    for options, details in (({}, {"type": "text", "places": "0"}), ({"A": "none", "B": "one"}, {"type": "text"})):
        item = Item(id="1", location="", prompt="?", answer="A", options=options, details=details)
        outcome = outcome_of(BENCHMARKS["mathvista"], item, "I cannot tell", reply={"text": said})
        assert outcome.prediction is None and outcome.score == 0


def test_broken_endpoint_is_counted_and_asked_again(tmp_path: Path) -> None:
    """Half of the replies are errors, one is no grade; replies that came are kept for the next start."""
    before = answered("mm-vet", tmp_path, ["a", "b", "c", "d"])
    path = tmp_path / "answers.jsonl"

    def broken(body: dict[str, Any], number: int) -> FakeReply:
        asked = body["messages"][-1]["content"].rpartition("Prediction: ")[2].split("\n")[0]
        replies = {"a": FakeReply(text="0.4"), "b": FakeReply(text="quite good"), "c": FakeReply(status=500)}
        return replies.get(asked, FakeReply(hang_up=True))

    ledger = Ledger(read_answers(path, identity={}), path=path)
    report, _ = judged(before, broken, ledger=ledger)
    assert report.figures["score"] == pytest.approx(0.4) and report.figures["ungraded"] == 3
    assert "2 answers could not be judged, the first: " in report.notes[1]
    again, requests = judged(
        before, lambda body, number: FakeReply(text="1"), ledger=Ledger(read_answers(path, identity={}))
    )
    assert len(requests) == 2 and again.figures["ungraded"] == 1
