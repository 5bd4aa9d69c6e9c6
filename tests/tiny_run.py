"""A small real dataset and real training processes, for tests that start `megavl train`."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import fork_server

ROOT = Path(__file__).resolve().parents[1]
SEQ_LENGTH = 256
PATIENCE_S = 1800.0
"""How long a test waits for another process: the machine may be busy, and only one that hangs must be given up."""


def environment() -> dict[str, str]:
    """What every child process gets: one thread each, no GPU, the repository importable, no rank variables.

    A release of megatron-core that PYTHONPATH names stays the one that is imported.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def forked(variables: dict[str, str]) -> dict[str, str]:
    """The same with `PYTHON_EXEC`, by which torchrun starts its ranks, naming the fork server's executable."""
    return {**variables, "PYTHON_EXEC": fork_server.python(variables)}


def build_dataset(directory: Path) -> Path:
    """Corpus, tokenizer and packed shards with text and images; `tokenizer/` and `shards/` in `directory`."""
    corpus = directory / "corpus"
    _tool("build_corpus.py", "demo", "--output", corpus, "--samples", 96, "--size", 200_000)
    _tool(
        *(
            "preprocess.py",
            "--input",
            corpus / "text.jsonl",
            corpus / "captions.jsonl",
            "--output",
            directory / "shards",
        ),
        *("--tokenizer", corpus / "tokenizer", "--image-preset", "tiny-hybrid", "--seq-length", SEQ_LENGTH),
        *("--max-images-per-sequence", 4, "--workers", 1),
    )
    return directory


def train_command(
    dataset: Path,
    run: Path,
    *overrides: str,
    processes: int,
    python: str = sys.executable,
    module: str = "megavl",
) -> list[str]:
    """`megavl train` of the tiny recipe under torchrun, or the same words for another `module`."""
    return [
        *(python, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--master-port", str(free_port()), "-m", module, "train", "launch/recipes/tiny/stage2.yaml"),
        f"data.sources=[{{path: {dataset}/shards}}]",
        f"data.tokenizer={dataset}/corpus/tokenizer",
        f"data.seq_length={SEQ_LENGTH}",
        f"run.dir={run}",
        *("run.tensorboard=false", "checkpoint.init=null", "checkpoint.allow_random_init=true"),
        *("training.steps=8", "training.global_batch_size=4", "optimizer.warmup_steps=2", "checkpoint.interval=3"),
        *("data.multimodal_fraction=0.5", "data.modality_warmup_steps=0"),
        *overrides,
    ]


def run_training(
    dataset: Path,
    run: Path,
    *overrides: str,
    processes: int,
    env: dict[str, str] | None = None,
    module: str = "megavl",
) -> subprocess.CompletedProcess[str]:
    """Run it to its end, in `environment()` or another."""
    env = forked(env or environment())
    command = train_command(dataset, run, *overrides, processes=processes, python=env["PYTHON_EXEC"], module=module)
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Rows written so far; a line that a kill left incomplete is skipped."""
    path = run / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def free_port() -> int:
    """A port that nothing listens on, below those that the system gives to outgoing connections."""
    for port in random.SystemRandom().sample(range(12000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("none of 100 ports is free")


def _tool(script: str, *arguments: Any) -> None:
    command = [sys.executable, f"data_tools/{script}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
