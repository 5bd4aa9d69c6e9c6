"""The format llm in mlx-lm, on the CPU: ids, logits and greedy tokens of texts and chats.

Only where an interpreter is named: `make test-clients` makes that environment and runs this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.engines.random_models import relative_error
from tests.clients import interpreter, run
from tests.unit.convert.decoder_answers import CHATS, TEXTS, TOKENS, by_generate, by_transformers, write_folders

TOLERANCE = 1e-5
"""Of the largest logit. Measured: 1.7e-6."""

# A list of texts, or of chats, from standard input; for each its ids, greedy tokens and the logits of both.
CLIENT = """\
import json, sys
import mlx.core as mx
from mlx_lm import load, stream_generate
mx.set_default_device(mx.cpu)
folder, count = sys.argv[1], int(sys.argv[2])
model, tokenizer = load(folder)
for said in json.load(sys.stdin):
    chat = isinstance(said, list)
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True) if chat else tokenizer.encode(said)
    tokens = [step.token for step in stream_generate(model, tokenizer, ids, max_tokens=count)]
    print(json.dumps({"ids": ids, "tokens": tokens, "logits": model(mx.array([ids + tokens]))[0].tolist()}))
"""


@pytest.fixture
def python() -> str:
    return interpreter("MEGAVL_MLX_LM", "mlx-lm")


def ask(python: str, folder: Path, said: list[Any]) -> list[dict[str, Any]]:
    lines = run([python, "-c", CLIENT, str(folder), str(TOKENS)], text=json.dumps(said)).splitlines()
    return [json.loads(line) for line in lines]


def test_mlx_lm_answers_as_transformers_and_generate(
    python: str, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], report_table: Any
) -> None:
    folder = write_folders(tmp_path, tokenizer_dir)
    found = ask(python, folder, [*TEXTS, *([{"role": "user", "content": text}] for text in CHATS)])
    texts, chats = found[: len(TEXTS)], found[len(TEXTS) :]
    errors = []
    for one, expected in zip(texts, by_transformers(folder), strict=True):
        assert (one["ids"], one["tokens"]) == (expected.ids, expected.tokens)
        errors.append(relative_error(torch.tensor(one["logits"]), expected.logits))
    report_table(f"{len(TEXTS)} texts: largest difference of the logits, relative {max(errors):.1e}")
    assert max(errors) <= TOLERANCE
    assert [(len(one["ids"]), one["tokens"]) for one in chats] == by_generate(folder, capsys)
