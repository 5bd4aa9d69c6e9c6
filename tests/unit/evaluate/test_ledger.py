"""Answers that outlive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavl.config.errors import UsageError
from megavl.evaluate.ledger import Ledger, read_answers

IDENTITY = {"model": "m", "questions": "q"}


def test_answers_survive_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ledger = Ledger(read_answers(path, identity=IDENTITY), path=path)
    for number in range(3):
        ledger.put(f"a/{number}", {"answer": f"text\n{number} ü"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    found = read_answers(path, identity=IDENTITY)
    assert found == {f"a/{number}": {"answer": f"text\n{number} ü"} for number in range(2)}
    Ledger(found, path=path).put("a/2", {"answer": "again"})
    path.write_bytes(path.read_bytes().replace(b'{"key": "a/1"', b'{"key": "a/1'))
    assert set(read_answers(path, identity=IDENTITY)) == {"a/0", "a/2"}
    assert len(path.read_bytes().splitlines()) == 3


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    read_answers(path, identity=IDENTITY)
    for identity, message in (
        ({**IDENTITY, "model": "n"}, "model 'm', but model is 'n' now"),
        ({}, "has answers with"),
    ):
        with pytest.raises(UsageError, match=message):
            read_answers(path, identity=identity)
    path.write_text('["no identity"]\n')
    with pytest.raises(UsageError, match="does not begin like the answers of an evaluation"):
        read_answers(path, identity=IDENTITY)
