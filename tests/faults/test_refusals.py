"""What `megavl train` says to a wrong recipe, data or weights: one message, an exit code, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from tests.tiny_run import PATIENCE_S, ROOT, SEQ_LENGTH, environment, forked

ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", "parallel.sequence_parallel=false")


def refuse(dataset: Path, run: Path, *overrides: str) -> tuple[int, str]:
    """Exit code and message of a run of one process."""
    env = forked(environment())
    command = [
        *(env["PYTHON_EXEC"], "-m", "megavl", "train", "launch/recipes/tiny/stage1.yaml", *ALONE),
        f"data.sources=[{{path: {dataset}/shards}}]",
        f"data.tokenizer={dataset}/corpus/tokenizer",
        f"data.seq_length={SEQ_LENGTH}",
        f"run.dir={run}",
        *("run.tensorboard=false", "training.steps=2", "optimizer.warmup_steps=0", "training.global_batch_size=2"),
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    return done.returncode, messages[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=3", ["on the command line: training.stepz", "'steps'"]),
        ("parallel.tensor=3", ["parallel.tensor: 3", "num_attention_heads 4", "divisor"]),
        ("parallel.layout=[5]", ["parallel.layout: [5]", "model.llm.num_layers is 4"]),
        ("parallel.pipeline=2", ["1 processes are no multiple", "parallel.pipeline 2"]),
    ],
)
def test_recipe(dataset: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    code, message = refuse(dataset, tmp_path / "run", override)
    assert code == 2 and all(word in message for word in words), message


def test_used_run_directory(dataset: Path, tmp_path: Path) -> None:
    stale = tmp_path / "exit_status.json"
    stale.write_text('{"code": 0, "reason": "finished", "rank": 0, "step": 9, "resumable": false}')
    code, message = refuse(dataset, tmp_path, "parallel.pipeline=2")
    assert code == 2 and "no multiple" in message
    assert json.loads(stale.read_text())["code"] == 2


def test_data(dataset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "shards"
    shutil.copytree(dataset / "shards", damaged)
    victim = next(damaged.glob("multimodal-*.images.bin"))
    victim.write_bytes(victim.read_bytes()[:-7])
    code, message = refuse(dataset, tmp_path / "a", f"data.sources=[{{path: {damaged}}}]")
    assert code == 3 and victim.name in message, message
    victim.unlink()
    code, message = refuse(dataset, tmp_path / "b", f"data.sources=[{{path: {damaged}}}]")
    assert code == 3 and victim.name in message, message
    assert json.loads((tmp_path / "b" / "exit_status.json").read_text())["code"] == 3

    task = tmp_path / "open.jsonl"
    task.write_text('{"id": "a", "prompt": "which?", "answers": ["red"]}\n')
    code, message = refuse(dataset, tmp_path / "e", f"evaluation.tasks=[{task}]", "evaluation.interval=1")
    assert code == 3 and f"evaluation.tasks: {task}:1: answers: a free-form answer" in message, message

    other = tmp_path / "tokenizer"
    shutil.copytree(dataset / "corpus/tokenizer", other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    code, message = refuse(dataset, tmp_path / "c", f"data.tokenizer={other}")
    assert code == 3 and str(other) in message and "sha256" in message, message

    code, message = refuse(dataset, tmp_path / "d", "data.seq_length=512")
    assert code == 3 and "512" in message and str(SEQ_LENGTH) in message, message
    code, message = refuse(dataset, tmp_path / "e", "model.preset=tiny-siglip", "model.sam=null")
    assert code == 3 and "shards" in message, message
    assert not list(tmp_path.glob("*/checkpoints/iter_*"))


def test_identity_is_compared_before_data_are_read(dataset: Path, tmp_path: Path) -> None:
    """Reading all data takes minutes, so a start that is refused anyway must not begin with it."""
    damaged = tmp_path / "shards"
    shutil.copytree(dataset / "shards", damaged)
    victim = next(damaged.glob("multimodal-*.images.bin"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    data = f"data.sources=[{{path: {damaged}}}]"
    code, message = refuse(dataset, tmp_path / "run", data)
    assert code == 3 and victim.name in message, message
    code, message = refuse(dataset, tmp_path / "run", data, "checkpoint.allow_random_init=false")
    assert code == 4 and "allow_random_init" in message, message
    config = load_model_config("tiny-hybrid", llm={"num_attention_heads": 2})
    write_model_checkpoint(tmp_path / "init", config=config, tensors=random_weights(config), files={})
    code, message = refuse(dataset, tmp_path / "run", data, f"checkpoint.init={tmp_path}/init")
    assert code == 2 and "model.llm.num_attention_heads is 2 in the checkpoint and 4 in the recipe" in message, message


def test_weights(dataset: Path, tmp_path: Path) -> None:
    code, message = refuse(dataset, tmp_path / "run", "checkpoint.allow_random_init=false")
    assert code == 4 and "checkpoint.init" in message and "allow_random_init" in message, message
    code, message = refuse(dataset, tmp_path / "run", f"checkpoint.init={tmp_path}/nothing")
    assert code == 4 and "nothing" in message, message
