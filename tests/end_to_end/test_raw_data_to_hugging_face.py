"""Raw files to a trained checkpoint, to both Hugging Face formats and back, by the commands that users type."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_run import ROOT, environment, forked, run_training

ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", "parallel.sequence_parallel=false")
AGAINST = ("--against", "transformers")


@pytest.fixture(scope="module")
def checkpoint(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run of three steps."""
    run = tmp_path_factory.mktemp("run")
    short = ("training.steps=3", "data.multimodal_fraction=1.0", "training.precision=bf16")
    done = run_training(dataset, run, *ALONE, *short, processes=1)
    assert done.returncode == 0, done.stdout + done.stderr
    return run / "checkpoints"


def command(*words: Any) -> str:
    """Output of a command that must succeed."""
    env = forked(environment())
    line = [env["PYTHON_EXEC"], *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def test_an_export_agrees_and_answers(checkpoint: Path, dataset: Path, tmp_path: Path, report_table: Any) -> None:
    task = dataset / "corpus/eval.jsonl"
    for fmt in ("native", "original"):
        command("-m", "megavl", "convert", "to-hf", checkpoint, tmp_path / fmt, "--format", fmt)
        command("-m", "megavl", "convert", "from-hf", tmp_path / fmt, tmp_path / f"from-{fmt}")
        assert "all equal" in command("-m", "megavl", "convert", "verify", checkpoint, tmp_path / f"from-{fmt}")
    report = tmp_path / "parity.json"
    command("-m", "megavl", "convert", "verify", checkpoint, tmp_path / "native", *AGAINST, "--json", report)
    found = json.loads(report.read_text())
    report_table(f"{found['class']} on the exported folder: {found['max_rel_diff']:.1e} (tolerance 1e-5)")
    assert found["max_rel_diff"] <= 1e-5
    scores = tmp_path / "scores.json"
    command("-m", "megavl", "evaluate", tmp_path / "original", task, "--limit", 8, "--json", scores)
    assert json.loads(scores.read_text())["n"] == 8


def test_inspect_verifies(checkpoint: Path) -> None:
    printed = command("-m", "megavl", "inspect", checkpoint)
    assert "verified" in printed and "1,526,401 parameters" in printed and "consumed_samples: 12" in printed
