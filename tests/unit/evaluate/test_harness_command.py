"""`megavl evaluate --harness`: options that do not go together, and the missing extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megavl.main.cli import main

HARNESS = ("--harness", "lm_eval")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "or --harness with --tasks"),
        (("--tasks", "hellaswag"), "--tasks: belongs to a harness"),
        (("--num-fewshot", "1", "a.jsonl"), "--num-fewshot: belongs to a harness"),
        (HARNESS, "name its tasks"),
        ((*HARNESS, "--tasks", " , "), "name its tasks"),
        (("a.jsonl", *HARNESS, "--tasks", "x"), "a.jsonl: a task file"),
        ((*HARNESS, "--tasks", "x", "--num-fewshot", "-1"), "--num-fewshot: -1"),
        ((*HARNESS, "--tasks", "x", "--blind"), "--blind: tasks of a harness"),
        ((*HARNESS, "--tasks", "x", "--template", "plain"), "--template: tasks of a harness"),
        ((*HARNESS, "--tasks", "x", "--max-new-tokens", "3"), "--max-new-tokens: tasks of a harness"),
        ((*HARNESS, "--tasks", "x", "--batch-size", "0"), "--batch-size: 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: tuple[str, ...], said: str, tmp_path: Path, capsys) -> None:
    assert main(["evaluate", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err


def test_missing_extra_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name in [name for name in sys.modules if name.startswith("megavl.evaluate.harness.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert main(["evaluate", str(tmp_path), *HARNESS, "--tasks", "hellaswag"]) == 2
    assert "pip install 'megavl[lm-eval]'" in capsys.readouterr().err
