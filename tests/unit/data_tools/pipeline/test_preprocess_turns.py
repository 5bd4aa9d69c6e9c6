"""Conversations with empty or unusual turns, and conversations that are too long."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.pipeline.sequence_limits import SequenceLimits
from megavl.data.template import Encoded
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


def test_empty_turns_are_refused_by_number(tmp_path: Path) -> None:
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


def test_image_in_a_system_turn_is_kept(tmp_path: Path) -> None:
    image = make_images(tmp_path / "images", count=1)[0]
    turns = [_says("system", "As in <image>"), _says("human", "What?"), _says("gpt", "red")]
    path = write_jsonl(tmp_path / "talks.jsonl", [{"image": image, "conversations": turns}])
    out = tmp_path / "out"
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    assert run_preprocess([path], tokenizer=tokenizer, output=out) == 0
    packed = open_small(out, tokenizer=tokenizer).read(source=0, modality="multimodal", index=0)
    assert [len(member.images) for member in packed.members] == [1]
    assert packed.tokens.tolist().count(3) == IMAGE_TOKENS


def _talk(answers: int, *, images: list[str], words: int = 4) -> dict[str, Any]:
    """A conversation whose first questions have one image each."""
    rounds = [
        (_says("human", ("<image>" if n < len(images) else "") + f"Which, {n}?"), _says("gpt", "red " * words + str(n)))
        for n in range(answers)
    ]
    return {"images": images, "conversations": [turn for pair in rounds for turn in pair]}


def test_truncated_conversations_equal_shorter_ones(tmp_path: Path) -> None:
    """One has too many tokens, one too many images, and in one the first answer is too long."""
    images = make_images(tmp_path / "images", count=4)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    whole = [_talk(9, images=images[:1]), _talk(4, images=images), _talk(2, images=[], words=400), _talk(1, images=[])]
    # What is kept of them: as many rounds as fit, and those before the third image.
    path = write_jsonl(tmp_path / "whole.jsonl", whole)
    out = tmp_path / "out"
    assert run_preprocess([path], tokenizer=tokenizer, output=out, more=["--over-long", "cut"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["samples"], report["conversations_cut"], report["images"]) == (3, 2, 3)
    assert {reason: entry["count"] for reason, entry in report["rejected"].items()} == {"too_long": 1}
    fitting = [rounds for rounds in range(1, 9) if _is_taken(_talk(rounds, images=images[:1]), tmp_path, tokenizer)]
    assert 1 < max(fitting) < 9
    kept = [_talk(max(fitting), images=images[:1]), _talk(2, images=images[:2]), _talk(1, images=[])]
    shorter = tmp_path / "shorter"
    assert run_preprocess([write_jsonl(tmp_path / "kept.jsonl", kept)], tokenizer=tokenizer, output=shorter) == 0
    for name in ("multimodal-00000.tokens.bin", "multimodal-00000.images.bin", "multimodal-00000.spans.npy"):
        assert (out / name).read_bytes() == (shorter / name).read_bytes()
    dropped = tmp_path / "dropped"
    assert run_preprocess([path], tokenizer=tokenizer, output=dropped, more=["--max-bad-frac", "0.9"]) == 0
    rejected = json.loads((dropped / "report.json").read_text())["rejected"]
    assert {reason: entry["count"] for reason, entry in rejected.items()} == {"too_long": 2, "too_many_images": 1}


def _is_taken(talk: dict[str, Any], folder: Path, tokenizer: Path) -> bool:
    path = write_jsonl(folder / "one.jsonl", [talk])
    out = folder / f"alone-{len(talk['conversations'])}"
    return run_preprocess([path], tokenizer=tokenizer, output=out) == 0


def test_answers_are_not_truncated_at_their_images() -> None:
    """The text before the image is supervised and fits, but does not end with EOS (1)."""
    ids = np.array([0, 9, 9, 1, 8, 8, 3, 3, 8, 1], np.int32)
    talk = Encoded(ids=ids, spans=((1, 4), (5, 6), (8, 10)), images=1)
    limits = SequenceLimits(tokens=9, images=1, eos_id=1, image_id=3, image_tokens=2)
    shorter = limits.truncate(talk)
    assert shorter is not None
    assert (shorter.ids.tolist(), shorter.spans, shorter.images) == ([0, 9, 9, 1], ((1, 4),), 0)
    assert replace(limits, tokens=3).truncate(talk) is None
    whole = replace(limits, tokens=10).truncate(talk)
    assert whole is not None and (len(whole.ids), whole.images) == (10, 1)
