"""MegaVL with Transformer Engine, on a stand-in for it in plain torch (`tests/numerics/stand_in_te`).

The stand-in runs on the stand-in for CUDA devices. Neither shows what a GPU's kernels compute.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench.engines.random_models import random_tensors
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import UsageError
from megavl.config.load import load_model_config, load_recipe
from megavl.model.engine_choice import check_engines
from tests.tiny_run import ROOT, environment, forked, metrics, run_training

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in needs a CPU build of torch"),
]
BAND = 1e-3
"""Relative, of losses in bf16 against MegaVL's own modules on the CPU."""
ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", "parallel.sequence_parallel=false")
SPLIT = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.layout=[1,3]", "parallel.sequence_parallel=true")


def stand_in() -> dict[str, str]:
    """Environment of a process that finds Transformer Engine and eight devices."""
    folders = (ROOT / "tests/numerics/stand_in_te", ROOT / "tests/numerics/stand_in_cuda", ROOT)
    path = os.pathsep.join(map(str, folders))
    return {**environment(), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def call(*words: Any, env: dict[str, str]) -> str:
    """Standard output of Python, which must succeed."""
    env = forked(env)
    line = [env["PYTHON_EXEC"], "-W", "ignore", *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def converted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with the tokenizer of the data set."""
    out = tmp_path_factory.mktemp("converted")
    config = load_model_config("tiny-hybrid")
    files = {f"tokenizer/{path.name}": path for path in (dataset / "corpus/tokenizer").iterdir()}
    write_model_checkpoint(out, config=config, tensors=random_tensors(config).items(), files=files)
    return out


@pytest.fixture(scope="module")
def trained(dataset: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a run of two steps in bf16, by its name; each run once, some from the first step's checkpoint."""

    def train(run: Path, *words: str, engine: bool) -> Path:
        settings = ("training.precision=bf16", "training.micro_batch_size=1", "optimizer.lr=1e-5", "optimizer.min_lr=0")
        settings += ("training.steps=2", "training.global_batch_size=2", "checkpoint.interval=1")
        if engine:
            settings += ("training.transformer_engine=always",)
        env = stand_in() if engine else environment()
        done = run_training(dataset, run, *settings, *words, processes=4 if words[0] == SPLIT[0] else 1, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return run

    @functools.cache
    def named(name: str) -> Path:
        run = tmp_path_factory.mktemp("run") / name.replace(" ", "-")
        start = (f"checkpoint.init={converted}", "checkpoint.allow_random_init=false")
        if name == "local":
            return train(run, *ALONE, *start, engine=False)
        if name == "engine tp2 pp2":
            return train(run, *SPLIT, *start, engine=True)
        saved = checkpoint(named({"engine after local": "local", "local after engine": "engine tp2 pp2"}[name]), step=1)
        shutil.copytree(saved, run / "checkpoints" / saved.name)
        if name == "engine after local":
            return train(run, *ALONE, "optimizer.state_precision=bf16", engine=True)
        return train(run, *ALONE, engine=False)

    return named


def checkpoint(run: Path, *, step: int) -> Path:
    """A checkpoint of a run."""
    return run / "checkpoints" / f"iter_{step:07d}"


def apart(found: Path, expected: Path, key: str) -> list[float]:
    """Relative differences of the steps that both runs have."""
    values = {row["step"]: row[key] for row in metrics(expected)}
    return [abs(row[key] / values[row["step"]] - 1) for row in metrics(found)]


@pytest.mark.parametrize(
    ("name", "steps"), [("engine tp2 pp2", 2), ("engine after local", 1), ("local after engine", 1)]
)
def test_a_run_trains_as_without_the_engine(
    trained: Callable[[str], Path], name: str, steps: int, report_table: Any
) -> None:
    found, expected = trained(name), trained("local")
    assert {row["modality"] for row in metrics(expected)} == {"text", "multimodal"}
    losses, norms = (apart(found, expected, key) for key in ("loss", "grad_norm"))
    report_table(f"{name}, against MegaVL's own modules on the CPU", ("losses", *losses), ("norms", *norms))
    assert len(losses) == steps and max(losses) <= BAND and max(norms) <= 10 * BAND


def test_half_of_the_optimizer_state_is_exact(tmp_path: Path, report_table: Any) -> None:
    report_table(call("-m", "tests.end_to_end.half_state", tmp_path, env=stand_in()).strip())


EXPORT_AND_ANSWER = """
import sys
from megavl.main.cli import main
middle = sys.argv.index("generate")
raise SystemExit(main(sys.argv[1:middle]) or main(sys.argv[middle:]))
"""


def test_its_checkpoints_export_and_answer(trained: Callable[[str], Path], tmp_path: Path) -> None:
    saved, folder = checkpoint(trained("engine tp2 pp2"), step=2), tmp_path / "native"
    question = ("--prompt", "Which?", "--max-new-tokens", 6, "--temperature", 0, "--dtype", "float32", "--json")
    export = ("convert", "to-hf", saved, folder, "--format", "native")
    # The stand-in for CUDA cannot generate; this one is installed where no device is visible.
    without_device = {**stand_in(), "CUDA_VISIBLE_DEVICES": ""}
    ours = call("-c", EXPORT_AND_ANSWER, *export, "generate", folder, *question, env=without_device)
    theirs = call("-m", "megavl", "generate", saved, *question, env=environment())
    found = [json.loads(text.splitlines()[-1])["token_ids"] for text in (ours, theirs)]
    assert len(found[0]) > 0 and found[0] == found[1]


def test_it_is_refused_where_it_is_missing(tmp_path: Path) -> None:
    recipe = load_recipe(ROOT / "launch/recipes/tiny/stage2.yaml", overrides=["training.precision=bf16"])
    for section, field, value in (
        ("training", "transformer_engine", "always"),
        ("optimizer", "state_precision", "bf16"),
    ):
        asked = replace(recipe, **{section: replace(getattr(recipe, section), **{field: value})})
        with pytest.raises(UsageError, match=rf"{section}\.{field}: {value}.*not installed"):
            check_engines(asked)
