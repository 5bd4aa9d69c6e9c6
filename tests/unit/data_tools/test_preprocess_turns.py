"""Conversations whose turns are empty or unusual: what is refused, and what becomes a sample."""

import json
from pathlib import Path

from tests.unit.data.corpus_files import (
    IMAGE_TOKENS,
    make_images,
    make_tokenizer,
    open_small,
    run_preprocess,
    write_jsonl,
)


def _says(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def test_empty_turns_are_refused_each_with_its_number(tmp_path: Path) -> None:
    asked, told = _says("human", "What?"), _says("gpt", "red")
    talks = [
        {"conversations": [asked, told]},
        {"conversations": [asked, _says("gpt", " \n")]},
        {"conversations": [_says("system", "Be brief."), asked, told, asked, _says("gpt", "")]},
        {"conversations": [_says("human", ""), told]},
    ]
    path, out = write_jsonl(tmp_path / "talks.jsonl", talks), tmp_path / "out"
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--max-bad-frac", "0.9"]) == 0
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["reason"], reject["record"]) for reject in rejects] == [
        ("turns", f"{path}:{line}") for line in (2, 3, 4)
    ]
    assert [reject["detail"].split(";")[0] for reject in rejects] == [
        "turn 2 (assistant) is empty",
        "turn 5 (assistant) is empty",
        "turn 1 (user) is empty",
    ]
    assert json.loads((out / "report.json").read_text())["samples"] == 1


def test_an_image_in_a_system_turn_is_part_of_the_sample(tmp_path: Path) -> None:
    image = make_images(tmp_path / "images", count=1)[0]
    turns = [_says("system", "As in <image>"), _says("human", "What?"), _says("gpt", "red")]
    path = write_jsonl(tmp_path / "talks.jsonl", [{"image": image, "conversations": turns}])
    out = tmp_path / "out"
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert run_preprocess([path], tokenizer=tokenizer, output=out) == 0
    packed = open_small(out, tokenizer=tokenizer).read(source=0, modality="multimodal", index=0)
    assert [len(member.images) for member in packed.members] == [1]
    assert packed.tokens.tolist().count(3) == IMAGE_TOKENS
