"""Tokens per second of the tiny model under several layouts, each against one rank in the same run.

Trains a few steps of the tiny third stage on the data of `make demo`, one layout after another, and writes
`launch/bench/results/tiny_layouts_<processor>_<YYYYMM>.md`. On a machine with fewer cores than ranks this shows what
splitting the model costs, not what it gains.

    python -m launch.bench.tiny_layouts [--data runs/demo] [--steps 12]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.bench.programs import ROOT, environment, json_lines, launcher
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1))
"""Tensor, pipeline, data."""
WARM_UP = 3


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/demo"), help="what make demo wrote")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if not (arguments.data / "data/stage3/manifest.json").exists():
        print(f"error: {arguments.data}: no data of the demo there; run `make demo` first", file=sys.stderr)
        return 2
    rows, alone = [], 0.0
    for sizes in LAYOUTS:
        rate = measure(arguments.data, sizes, steps=arguments.steps)
        alone = alone or rate
        rows.append(table_row(" x ".join(map(str, sizes)), f"{rate:,.0f}", f"{rate / alone:.2f}"))
        print(rows[-1], flush=True)
    write_report(report_path("tiny_layouts"), report(rows, steps=arguments.steps))
    return 0


def measure(data: Path, sizes: tuple[int, int, int], *, steps: int) -> float:
    """Median tokens per second after warm-up."""
    tensor, pipeline, replicas = sizes
    with tempfile.TemporaryDirectory() as run:
        command = [
            *launcher("megavl", processes=tensor * pipeline * replicas),
            *("train", "launch/recipes/tiny/stage3.yaml", f"data.sources=[{{path: {data}/data/stage3}}]"),
            *(f"data.tokenizer={data}/corpus/tokenizer", f"run.dir={run}", "run.tensorboard=false"),
            *(f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", "parallel.layout=auto"),
            *("checkpoint.init=null", "checkpoint.allow_random_init=true", f"training.steps={steps}"),
            *("training.micro_batch_size=1", "optimizer.warmup_steps=1"),
        ]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
        rows = json_lines((Path(run) / "metrics.jsonl").read_text())
    return statistics.median(row["tokens_per_s"] for row in rows[WARM_UP:])


def report(rows: list[str], *, steps: int) -> list[str]:
    """Markdown with the command and versions."""
    return [
        "# Tiny model: tokens per second by layout",
        "",
        f"`python -m launch.bench.tiny_layouts --steps {steps}`; {versions('torch', 'megatron-core')}; {machine()}, "
        f"gloo, fp32, one thread a rank; median after {WARM_UP} steps.",
        "Recipe: `launch/recipes/tiny/stage3.yaml`, micro-batch 1, layout auto.",
        *table("| tensor x pipeline x data | tokens/s | against one rank |", rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
