"""A tiny model in the format llm, and what it answers: the reference for clients of language models."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megavl.main.cli import main
from tests.unit.generate import models

PRESET = "tiny-siglip"
TOKENS = 24
TEXTS = (
    "The quick brown fox",
    "  café 你好 <|x|>",
    "a1234 + 5 = 99\n\n\tred  blue…",
    "User: which colour?\n\nAssistant:",
)
CHATS = TEXTS[:2]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after a text."""

    ids: list[int]
    """Of the text, with BOS."""
    tokens: list[int]
    logits: torch.Tensor
    """(ids and tokens, V)"""


def write_folders(out: Path, tokenizer_dir: Path) -> Path:
    """The folder in the format llm; the same model in the native format is `native` beside it."""
    for fmt in ("native", "llm"):
        models.write_folder(PRESET, out / fmt, tokenizer=tokenizer_dir, fmt=fmt, seed=models.TALKATIVE[PRESET])
    return out / "llm"


def by_transformers(folder: Path) -> list[Answer]:
    """To `TEXTS`, none of them one repeated token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            logits = model(whole).logits[0]
        answers.append(Answer(ids[0].tolist(), whole[0, ids.shape[1] :].tolist(), logits))
    assert all(len(set(answer.tokens)) > 4 for answer in answers)
    return answers


def by_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[tuple[int, list[int]]]:
    """Tokens of the prompt and greedy tokens that `megavl generate` gives to `CHATS`, from the native folder."""
    answers = []
    for text in CHATS:
        words = ["--prompt", text, "--max-new-tokens", str(TOKENS), "--device", "cpu", "--json"]
        assert main(["generate", str(folder.with_name("native")), *words]) == 0
        said = json.loads(capsys.readouterr().out)
        answers.append((said["prompt_tokens"], said["token_ids"]))
    return answers
