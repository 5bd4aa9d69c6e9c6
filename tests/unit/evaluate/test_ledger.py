"""Answers that outlive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavl.config.errors import StorageError, UsageError
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
    assert len(path.read_bytes().splitlines()) == 2


def test_replies_and_blind_scores_have_their_own_files(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ledger = Ledger(read_answers(path, identity=IDENTITY), path=path)
    keys = ("pope/0", "blind/0", "text/0", "judge/mm-vet/0")
    for key in keys:
        ledger.put(key, {"id": key})
    assert set(read_answers(path, identity=IDENTITY)) == set(keys)
    assert len(path.read_bytes().splitlines()) == 1


def test_answers_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    read_answers(path, identity=IDENTITY)
    for identity, message in (
        ({**IDENTITY, "model": "n"}, "model 'm', but model is 'n' now"),
        ({}, "has answers with"),
    ):
        with pytest.raises(UsageError, match=message):
            read_answers(path, identity=identity)
    (tmp_path / "evaluation.json").write_text("[")
    with pytest.raises(UsageError, match="has answers with model None"):
        read_answers(path, identity=IDENTITY)
    (tmp_path / "evaluation.json").unlink()
    path.write_text("{}")
    with pytest.raises(UsageError, match="has no evaluation.json beside it"):
        read_answers(path, identity=IDENTITY)


def test_full_storage_ends_the_evaluation() -> None:
    with pytest.raises(StorageError, match="/dev/full: cannot be written: No space left"):
        Ledger(path=Path("/dev/full")).put("pope/0", {"answer": "Yes"})
