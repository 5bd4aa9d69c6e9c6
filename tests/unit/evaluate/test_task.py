"""Reading of tasks: every malformed line is named."""

from __future__ import annotations

import json

import pytest

from megavl.config.errors import DataError
from megavl.evaluate.task import OpenQuestion, Passage, Question, read_tasks

GOOD = {"id": "a", "images": [], "prompt": "Which?", "choices": ["x", "y"], "answer": 1, "kind": "k"}
OPEN = {"id": "b", "prompt": "Which?", "answers": ["x", "y"]}
TEXT = {"id": "c", "text": "a text"}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_questions_are_read_in_order(task):
    questions = read_tasks([task])
    assert [question.id for question in questions] == [f"q{number}" for number in range(9)]
    assert questions[0].location == f"{task}:1" and questions[0].images == (task.parent / "images/0-0.png",)


def test_limit_is_per_file(task, tmp_path):
    other = write(tmp_path / "other.jsonl", GOOD, GOOD, "not reached")
    assert [question.id for question in read_tasks([task, other], limit=2)] == ["q0", "q1", "a", "a"]


def test_kind_and_images_may_be_missing(tmp_path):
    line = {key: GOOD[key] for key in ("id", "prompt", "choices", "answer")} | {"source": "x"}
    (question,) = read_tasks([write(tmp_path / "words.jsonl", "", line)])
    assert (question.kind, question.images, question.location) == ("words", (), f"{tmp_path}/words.jsonl:2")


def test_keys_of_a_line_choose_its_type(task, tmp_path):
    picture = task.parent / "images/0-0.png"
    lines = [GOOD, OPEN, {**TEXT, "images": [str(picture)]}, {**GOOD, "answers": ["passed over"], "text": ""}]
    found = read_tasks([write(tmp_path / "mixed.jsonl", *lines)])
    assert list(map(type, found)) == [Question, OpenQuestion, Passage, Question]
    assert found[1].answers == ("x", "y") and (found[2].text, found[2].images) == ("a text", (picture,))
    assert [entry.kind for entry in found] == ["k", "mixed", "mixed", "k"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Invalid JSON"),
        ("[]", ".*should be an object"),
        ({**GOOD, "answer": "1"}, "answer: .*integer.*found '1'"),
        ({**GOOD, "answer": 2}, "answer: 2 is no index of the 2 choices"),
        ({**GOOD, "answer": -1}, "answer: -1 is no index"),
        ({**GOOD, "choices": ["x"]}, "choices: .*two or more"),
        ({**GOOD, "choices": ["x", "x"]}, "choices: .*different"),
        ({**GOOD, "choices": ["x", " "]}, "choices: .*non-empty"),
        ({**GOOD, "choices": "xy"}, "choices: .*found 'xy'"),
        ({**GOOD, "prompt": " "}, "prompt: is empty"),
        ({**GOOD, "prompt": "<image_placeholder>Which?"}, "prompt: has 1 <image_placeholder> for 0 images"),
        ({**GOOD, "images": ["gone.png"]}, "images: .*gone.png does not exist"),
        ({key: GOOD[key] for key in ("id", "prompt", "choices")}, "answer: Field required"),
        ({"id": "a"}, "prompt: Field required.*or text"),
        ({**OPEN, "answers": []}, "answers: .*one or more"),
        ({**OPEN, "answers": ["x", " "]}, "answers: .*non-empty"),
        ({**OPEN, "answers": "x"}, "answers: .*found 'x'"),
        ({**OPEN, "prompt": ""}, "prompt: is empty"),
        ({**TEXT, "text": ""}, "text: is empty"),
        ({**TEXT, "text": "a <image_placeholder>", "images": ["gone.png"]}, "text: holds <image_placeholder>"),
        ({**TEXT, "images": ["gone.png"]}, "images: .*gone.png does not exist"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "t.jsonl", GOOD, line)
    with pytest.raises(DataError, match=rf"t\.jsonl:2: {message}"):
        read_tasks([path])


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot read the task"):
        read_tasks([tmp_path / "gone.jsonl"])
    with pytest.raises(DataError, match="no question in it"):
        read_tasks([write(tmp_path / "empty.jsonl", "")])
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_tasks([tmp_path / "bytes.jsonl"])
