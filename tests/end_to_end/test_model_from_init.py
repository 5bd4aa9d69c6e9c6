"""A model that is no preset trains from its checkpoint without any of its sizes in the recipe."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.manifest import read_manifest
from megavl.checkpoint.reader import load_model_config
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config as preset
from tests.tiny_run import PATIENCE_S, ROOT, environment, forked, metrics, train_command

ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false", "parallel.layout=auto")


def test_run_takes_its_model_from_init(dataset: Path, tmp_path: Path) -> None:
    model = preset(
        "tiny-hybrid", llm={"num_layers": 2, "ffn_hidden_size": 96, "rope_theta": 5e5}, sam={"window_size": 3}
    )
    tokenizer = dataset / "corpus/tokenizer"
    files: dict[str, bytes | Path] = {f"tokenizer/{path.name}": path for path in tokenizer.iterdir()}
    init = write_model_checkpoint(tmp_path / "init", config=model, tensors=random_weights(model), files=files)
    env = forked(environment())
    words = [*ALONE, "model={from: init}", f"checkpoint.init={init}", "checkpoint.allow_random_init=false"]
    command = train_command(dataset, tmp_path / "run", *words, "training.steps=2", processes=1)
    command = [env["PYTHON_EXEC"], "-m", *command[command.index("megavl") :]]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights from" in done.stdout and "(layers 2)" in done.stdout, done.stdout
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert read_manifest(tmp_path / "run/checkpoints/iter_0000002")["content"]["start"]["checkpoint"] == str(init)
    # The tiny recipes name a system text of their own.
    assert load_model_config(tmp_path / "run/checkpoints/iter_0000002") == replace(model, system_prompt="")
