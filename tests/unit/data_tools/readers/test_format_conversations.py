"""DeepSeek-VL and LLaVA conversations: exact tokens, loss mask and image bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.corpus_files import run_preprocess, write_jsonl
from tests.unit.data_tools.format_files import IMAGE, Expected, picture, read_back


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        kind = "JPEG" if number == 3 else "PNG"
        (tmp_path / f"images/{number}").write_bytes(picture(number, kind=kind))
    return tmp_path


def _user(content: str, *images: int, **more: Any) -> dict[str, Any]:
    named = {"images": [f"images/{number}" for number in images]} if images else {}
    return {"role": "User", "content": content, **named, **more}


def _reply(content: str) -> dict[str, Any]:
    return {"role": "Assistant", "content": content}


@pytest.mark.parametrize("array", [False, True])
def test_deepseek_conversations_give_exact_samples(
    root: Path, tokenizer: Path, array: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[Any] = [
        {"id": "a", "conversations": [_user(f"{IMAGE}Which?", 0), _reply("red")]},
        [_user(f"{IMAGE} or {IMAGE}?", 2, 1), _reply("The first one.")],
        # One image in each of two questions: pictures must stay with their turns.
        [_user(f"A {IMAGE}?", 1), _reply("No."), _user(f"{IMAGE}\nB?", 0), _reply("Yes,\nred.")],
        [_user("Which?", images=[]), _reply("blue"), _user("Sure?"), _reply("Yes.")],
        # The other spelling of the tag, and the same file as before.
        {"conversations": [_user("<image>Which?", 3), _reply("red")]},
    ]
    path = root / "talks.json"
    path.write_text(json.dumps(records)) if array else write_jsonl(path, records)
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out") == 0
    assert "format deepseek (recognised), template deepseek" in capsys.readouterr().out
    expect, shown = Expected(tokenizer).conversation, [picture(0), picture(1), picture(2), picture(3, kind="JPEG")]
    assert {sample.position: sample for sample in read_back(root / "out")} == {
        1: expect((f"{IMAGE}Which?", "red"), position=1, images=[shown[0]]),
        2: expect((f"{IMAGE} or {IMAGE}?", "The first one."), position=2, images=[shown[2], shown[1]]),
        3: expect((f"A {IMAGE}?", "No."), (f"{IMAGE}\nB?", "Yes,\nred."), position=3, images=[shown[1], shown[0]]),
        4: expect(("Which?", "blue"), ("Sure?", "Yes."), position=4),
        5: expect((f"{IMAGE}Which?", "red"), position=5, images=[shown[3]]),
    }


def _says(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


@pytest.mark.parametrize("array", [False, True])
def test_llava_conversations_give_exact_samples(
    root: Path, tokenizer: Path, array: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    system = [{"from": "system", "value": "Look."}]
    records = [
        {"id": "a", "image": "images/0", "conversations": _says("<image>\nWhich?", "red")},
        {"id": 2, "images": ["images/3", "images/1"], "conversations": _says("<image> or <image>?", "No.")},
        {"image": "images/2", "conversations": [*system, *_says("A <image>?", "Yes.", "Sure?", "Yes,\nred.")]},
        {"id": "t", "conversations": _says("Which?", "blue")},
        {"images": ["images/1", "images/0"], "conversations": _says("<image>?", "green", "And <image>?", "red")},
    ]
    path = root / "talks.json"
    path.write_text(json.dumps(records)) if array else write_jsonl(path, records)
    assert run_preprocess([path], tokenizer=tokenizer, output=root / "out") == 0
    assert "format llava (recognised), template deepseek" in capsys.readouterr().out
    expect, shown = Expected(tokenizer).conversation, [picture(0), picture(1), picture(2), picture(3, kind="JPEG")]
    assert {sample.position: sample for sample in read_back(root / "out")} == {
        1: expect((f"{IMAGE}\nWhich?", "red"), position=1, images=[shown[0]]),
        2: expect((f"{IMAGE} or {IMAGE}?", "No."), position=2, images=[shown[3], shown[1]]),
        3: expect((f"A {IMAGE}?", "Yes."), ("Sure?", "Yes,\nred."), position=3, images=[shown[2]], system="Look."),
        4: expect(("Which?", "blue"), position=4),
        5: expect((f"{IMAGE}?", "green"), (f"And {IMAGE}?", "red"), position=5, images=[shown[1], shown[0]]),
    }
