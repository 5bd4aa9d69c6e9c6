"""Tokens per second of the tiny model under several layouts, each against one rank in the same run.

Trains a few steps of the tiny third stage on the data of `make demo`, one layout after another, and writes
`launch/bench/results/tiny_layouts_<processor>_<YYYYMM>.md`. On a machine with fewer cores than ranks this shows what
cutting the model costs, not what it gains.

    python launch/bench/tiny_layouts.py [--data runs/demo] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "1 x 1 x 1": (1, 1, 1),
    "2 x 1 x 1": (2, 1, 1),
    "1 x 2 x 1": (1, 2, 1),
    "1 x 1 x 2": (1, 1, 2),
    "2 x 2 x 1": (2, 2, 1),
}
WARM_UP = 3


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/demo"), help="what make demo wrote")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if not (arguments.data / "data/stage3/manifest.json").exists():
        print(f"error: {arguments.data}: no data of the demo there; run `make demo` first", file=sys.stderr)
        return 2
    rows, alone = [], 0.0
    for name, sizes in LAYOUTS.items():
        rate = measure(arguments.data, sizes, steps=arguments.steps)
        alone = alone or rate
        rows.append(f"| {name} | {rate:,.0f} | {rate / alone:.2f} |")
        print(rows[-1], flush=True)
    path = report_path()
    path.write_text(report(rows, steps=arguments.steps), encoding="utf-8")
    print(path)
    return 0


def measure(data: Path, sizes: tuple[int, int, int], *, steps: int) -> float:
    """Median tokens per second after warm-up."""
    tensor, pipeline, replicas = sizes
    ranks = tensor * pipeline * replicas
    with tempfile.TemporaryDirectory() as run:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
            *("-m", "megavl", "train", "launch/recipes/tiny/stage3.yaml"),
            f"data.sources=[{{path: {data}/data/stage3}}]",
            *(f"data.tokenizer={data}/corpus/tokenizer", f"run.dir={run}", "run.tensorboard=false"),
            *(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "parallel.layout=auto"),
            *("checkpoint.init=null", "checkpoint.allow_random_init=true", f"training.steps={steps}"),
            *("training.micro_batch_size=1", "optimizer.warmup_steps=1"),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["tokens_per_s"] for row in rows[WARM_UP:])


def report_path() -> Path:
    """Named by theme, hardware and month."""
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    return ROOT / "launch/bench/results" / f"tiny_layouts_{hardware}_{time.strftime('%Y%m')}.md"


def report(rows: list[str], *, steps: int) -> str:
    """Markdown with the command and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    head = [
        "# Tiny model: tokens per second by layout",
        "",
        f"`python launch/bench/tiny_layouts.py --steps {steps}`; Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} cores ({platform.machine()}), gloo, fp32, one thread a rank; median after {WARM_UP} steps.",
        "Recipe: `launch/recipes/tiny/stage3.yaml`, micro-batch 1, layout auto.",
        "",
        "| tensor x pipeline x data | tokens/s | against one rank |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
