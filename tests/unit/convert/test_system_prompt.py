"""The system text of a model's training data goes with it: into checkpoints, exports, and prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megavl.checkpoint.reader import load_model_config as config_of_checkpoint
from megavl.config.chat import SYSTEM_PROMPT
from megavl.convert.hf_read import read_config, read_llm_config
from megavl.convert.hf_write import write_hf
from megavl.data.tokenizer import open_tokenizer
from megavl.generate.pretrained import Processor
from megavl.main.cli import main
from tests.unit.generate import models

PRESET = "tiny-siglip"
CHAT = [{"role": "user", "content": "Which?"}]
SHORT = 'Be "short" 🙂\n{% raw %}, {{ polite }}.'


def write(folder: Path, *, system: str, fmt: str, tokenizer_dir: Path) -> Path:
    config = replace(models.config_of(PRESET), system_prompt=system)
    tensors = models.random_tensors(PRESET)
    return write_hf(folder, config=config, tensors=tensors, fmt=fmt, tokenizer_dir=tokenizer_dir)


@pytest.mark.parametrize("fmt", ["native", "original", "llm"])
@pytest.mark.parametrize(
    ("system", "begins"), [("", ""), (SHORT, f"{SHORT}\n\n"), (SYSTEM_PROMPT, f"{SYSTEM_PROMPT}\n\n")]
)
def test_exports_say_how_conversations_begin(
    fmt: str, system: str, begins: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    out = write(tmp_path / "out", system=system, fmt=fmt, tokenizer_dir=tokenizer_dir)
    found = read_llm_config(out) if fmt == "llm" else read_config(out)[0]
    assert found is not None and found.system_prompt == system
    assert ("system_prompt" in json.loads((out / "config.json").read_text())) == (system != SYSTEM_PROMPT)
    if fmt == "original":
        return
    template = AutoTokenizer.from_pretrained(out)
    text = template.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    bos = template.bos_token if fmt == "llm" else ""
    assert text == f"{bos}{begins}User: Which?\n\nAssistant:"
    ours = Processor(found, open_tokenizer(out))
    assert ours("Which?").ids == ours("Which?", system=system).ids
    assert (ours("Which?").ids == ours("Which?", system=SYSTEM_PROMPT).ids) == (system == SYSTEM_PROMPT)


def test_a_checkpoint_keeps_the_system_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Also with the name of its preset, and back into a folder."""
    folder = write(tmp_path / "in", system="", fmt="native", tokenizer_dir=tokenizer_dir)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "checkpoints")]) == 0
    config = config_of_checkpoint(tmp_path / "checkpoints" / "iter_0000000")
    assert config.system_prompt == ""
    words = [str(tmp_path / "checkpoints"), str(tmp_path / "out"), "--format", "native"]
    assert main(["convert", "to-hf", *words]) == 0
    assert read_config(tmp_path / "out")[0] == config
    assert main(["convert", "verify", str(folder), str(tmp_path / "out")]) == 0


def test_a_system_text_that_is_none_is_refused(tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    folder = write(tmp_path / "in", system="", fmt="native", tokenizer_dir=tokenizer_dir)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "system_prompt": ["no text"]}))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "out")]) == 4
    assert "config.json: system_prompt: a text is expected, found ['no text']" in capsys.readouterr().err


def test_commands_begin_as_the_model_was_trained(tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    """`generate` and `evaluate` without --system, against the same with it; a line of prompts may say otherwise."""
    folder = write(tmp_path / "in", system="Be short.", fmt="native", tokenizer_dir=tokenizer_dir)
    question = {"id": "q", "prompt": "Which?", "choices": ["red", "blue"], "answer": 0}
    (tmp_path / "task.jsonl").write_text(json.dumps(question))
    prompts = [{"prompt": "Which?"}, {"prompt": "Which?", "system": ""}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))

    def said(*words: str) -> str:
        assert main([words[0], str(folder), "--device", "cpu", *words[1:]]) == 0
        return capsys.readouterr().out

    generate = ("generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "8")
    lines = [json.loads(line) for line in said(*generate).splitlines()]
    assert said(*generate, "--system", "Be short.") == said(*generate)
    assert lines[0]["prompt_tokens"] > lines[1]["prompt_tokens"]

    def perplexities(*words: str) -> list[float]:
        out = tmp_path / "report.json"
        said("evaluate", str(tmp_path / "task.jsonl"), "--json", str(out), *words)
        found: list[float] = json.loads(out.read_text())["questions"][0]["perplexities"]
        return found

    assert perplexities() == perplexities("--system", "Be short.") != perplexities("--system", "")
