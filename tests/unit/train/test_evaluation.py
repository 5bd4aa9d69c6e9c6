"""Figures and rows of evaluations during training, and settings that cannot be used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.config.load import load_recipe
from megavl.evaluate.task import Passage, Question
from megavl.generate.score import Score
from megavl.train.evaluation import task_figures
from megavl.train.evaluation_log import EvaluationLog, lines, scalars
from megavl.train.metrics import MetricsLog
from tests.unit.train.test_run_files import ROW


def scores(*values: float) -> list[Score]:
    return [Score(log_prob=value, tokens=2, greedy=False) for value in values]


def question(answer: int, *, choices: int = 4) -> Question:
    return Question(id="q", prompt="?", choices=tuple("abcd"[:choices]), answer=answer)


def test_accuracy_has_chance_and_error() -> None:
    entries = [question(0), question(1), question(0, choices=2), Passage(id="p", text="four")]
    found = task_figures(
        entries,
        [
            [scores(-1, -2, -3, -4)],
            [scores(-1, -2, -3, -4)],
            [scores(-2, -1)],
            [scores(-4 * math.log(2)), scores(-math.log(2))],
        ],
    )
    assert found["accuracy"] == pytest.approx(1 / 3) and found["n"] == 3
    assert found["chance"] == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert found["standard_error"] == pytest.approx(math.sqrt(2 / 9 / 3))
    assert found["bits_per_byte"] == pytest.approx(5 / 4) and found["bytes"] == 4


def test_questions_have_loss_and_margin_by_kind() -> None:
    entries = [replace(question(0), kind="a"), replace(question(1), kind="b"), replace(question(2), kind="b")]
    found = task_figures(entries, [[scores(-1, -2, -3, -4)], [scores(-1, -2, -3, -4)], [scores(-2, -4, -6, -8)]])
    # Two tokens an option: losses of the right ones 0.5, 1 and 3, of the cheapest wrong ones 1, 0.5 and 1.
    assert found["loss"] == pytest.approx(1.5) and found["margin"] == pytest.approx((0.5 - 0.5 - 2) / 3)
    assert set(found["by_kind"]) == {"a", "b"} and found["by_kind"]["a"]["accuracy"] == 1.0
    assert found["by_kind"]["b"]["margin"] == pytest.approx(-1.25) and found["by_kind"]["b"]["n"] == 2
    assert "by_kind" not in task_figures(entries[:1], [[scores(-1, -2, -3, -4)]])


def test_options_are_compared_by_token_sum_or_byte() -> None:
    """The first option has the least sum, the second the least per token, and the third the least per byte."""
    entry = Question(id="q", prompt="?", choices=("ab", "abcd", "a" * 40), answer=0)
    of_options = [
        Score(log_prob=-3, tokens=1, greedy=False),
        Score(log_prob=-4, tokens=4, greedy=False),
        Score(log_prob=-20, tokens=10, greedy=False),
    ]
    for answer, normalize in enumerate(("sum", "token", "byte")):
        found = task_figures([replace(entry, answer=answer)], [[of_options]], normalize=normalize)
        assert found["accuracy"] == 1.0


def test_what_is_not_finite_is_null() -> None:
    found = task_figures([question(0), Passage(id="p", text="a")], [[scores(-1, math.nan, -1, -1)], [scores(math.nan)]])
    assert found["accuracy"] is None and found["standard_error"] is None and found["margin"] is None
    assert found["bits_per_byte"] is None


def test_log_keeps_one_row_a_step(tmp_path: Path) -> None:
    task = {"accuracy": 0.5, "chance": 0.25, "standard_error": 0.1, "n": 4}
    held_out = {"text": {"loss": 2.0, "tokens": 9, "sequences": 1, "bits_per_byte": 1.5}}
    rows = [{"step": step, "tasks": {"q": task}, "held_out": {"d": held_out}, "seconds": 1.0} for step in (0, 5, 10)]
    log = EvaluationLog(tmp_path, start_step=0, tensorboard=False)
    for row in rows:
        log.write(row)
    EvaluationLog(tmp_path, start_step=7, tensorboard=False).write(rows[2])
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 5, 10]
    assert len((tmp_path / "evaluation.discarded.jsonl").read_text().splitlines()) == 1
    assert list(lines(rows[1])) == [
        "evaluation after step 5: q: accuracy 0.5000 +- 0.1000 (chance 0.250, n 4)",
        "evaluation after step 5: d, text: loss 2.0000, bits per byte 1.5000 (9 tokens)",
    ]
    assert scalars(rows[1]) == {
        "evaluation/q/accuracy": 0.5,
        "evaluation/d/text/loss": 2.0,
        "evaluation/d/text/bits_per_byte": 1.5,
    }


def test_tensorboard_shows_every_evaluation(tmp_path: Path) -> None:
    """Beside the scalars of steps, whose log begins last; TensorBoard drops what a later file of a run begins anew."""
    multiplexer = pytest.importorskip("tensorboard.backend.event_processing.event_multiplexer")
    task = {"accuracy": 0.5, "chance": 0.25, "standard_error": 0.1, "n": 4}
    for begins_first in (True, False):
        run = tmp_path / str(begins_first)
        run.mkdir()
        log = EvaluationLog(run, start_step=0, tensorboard=True) if begins_first else None
        steps = MetricsLog(run, steps=9, start_step=0, tensorboard=True)
        log = log or EvaluationLog(run, start_step=0, tensorboard=True)
        for step in range(10):
            if step:
                steps.write({**ROW, "step": step})
            if step % 3 == 0:
                log.write({"step": step, "tasks": {"q": task}, "held_out": {}, "seconds": 1.0})
        found = multiplexer.EventMultiplexer().AddRunsFromDirectory(str(run / "tensorboard")).Reload()
        shown = {
            tag: [event.step for event in found.Scalars(name, tag)]
            for name, tags in found.Runs().items()
            for tag in tags["scalars"]
        }
        assert shown["evaluation/q/accuracy"] == [0, 3, 6, 9]
        assert shown["train/loss"] == list(range(1, 10))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["evaluation.tasks=[]", "evaluation.interval=5"], "evaluation.interval: there is nothing to evaluate"),
        (["evaluation.at_start=true"], "evaluation.at_start: needs evaluation.interval above 0"),
        (["evaluation.tasks=[a/q.jsonl, b/q.jsonl]"], "evaluation.tasks: two entries are called 'q'"),
        (["evaluation.held_out=[a/text, b/text/]"], "evaluation.held_out: two entries are called 'text'"),
        (["evaluation.tasks=[mmbnch=a.tsv]"], "there is no benchmark 'mmbnch'; did you mean 'mmbench'"),
        (["evaluation.tasks=[pope=]"], "pope=: names no file; write pope=FILE"),
        (["evaluation.tasks=[mm-vet=a, MMVet=b]"], "two entries are called 'mm-vet'"),
        (["evaluation.normalize=word"], "evaluation.normalize"),
        (["evaluation.intervall=5"], "evaluation.intervall.*'interval'"),
    ],
)
def test_settings_that_cannot_be_used(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("launch/recipes/tiny/stage3.yaml", overrides=settings)
