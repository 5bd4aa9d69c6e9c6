"""Settings that might make a training step faster, each in turn with MegaVL's fastest one, `training.compile: layers`.

Each program is a new process with one thread. Writes `launch/bench/results/step_trials_<device>_<YYYYMM>.md`.

    python -m launch.bench.step_trials [--model tiny] [--rounds 5] [--steps 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_work import MODELS
from launch.bench.programs import ask
from launch.bench.report import hardware, report_path, table, table_row, versions, write_report
from megavl.config.load import load_model_config

KINDS = ("text", "multimodal")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What differs from `training.compile: layers` on torch's own allocator."""

    compiled: str = "layers"
    variables: dict[str, str] = field(default_factory=dict)


TRIALS = {
    "`training.compile: none`": Trial(compiled="none"),
    "`training.compile: kernels`": Trial(compiled="kernels"),
    "products chosen by trying (`TORCHINDUCTOR_MAX_AUTOTUNE`)": Trial(variables={"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}),
    "compiled code called from C++ (`TORCHINDUCTOR_CPP_WRAPPER`)": Trial(variables={"TORCHINDUCTOR_CPP_WRAPPER": "1"}),
    "memory is never given back (`MALLOC_TRIM_THRESHOLD_`)": Trial(
        variables={"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
    ),
    "huge pages (`THP_MEM_ALLOC_ENABLE`)": Trial(variables={"THP_MEM_ALLOC_ENABLE": "1"}),
}


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    numbers = {"model": arguments.model, "steps": arguments.steps}
    began = os.getloadavg()[0]
    plain: dict[str, list[list[float]]] = {}
    found: dict[str, list[list[float]]] = {}
    for _ in range(arguments.rounds):
        for name, trial in TRIALS.items():
            # Beside each trial, since the machine's speed changes within minutes.
            plain.setdefault(name, []).append(measure(Trial(), **numbers))
            found.setdefault(name, []).append(measure(trial, **numbers))
            print(name, *(round(a / b, 2) for a, b in zip(plain[name][-1], found[name][-1])), flush=True)
    rows = []
    for name in TRIALS:
        cells = []
        for at in range(len(KINDS)):
            ratios = [a[at] / b[at] for a, b in zip(plain[name], found[name], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        rows.append(table_row(name, *cells))
    step_s = [statistics.median(one[at] for runs in plain.values() for one in runs) for at in range(len(KINDS))]
    conditions = (
        f"--model {arguments.model} --rounds {arguments.rounds} --steps {arguments.steps}`; load before {began:.1f}"
    )
    lines = report(rows, step_s, model=arguments.model, conditions=conditions)
    write_report(report_path("step_trials", where=hardware()), lines)
    return 0


def measure(trial: Trial, *, model: str, steps: int) -> list[float]:
    """Median seconds of a step of each kind."""
    words = ["--side", "megavl", "--model", model, "--precision", "fp32", "--threads", 1, "--kind", *KINDS]
    words += ["--warm-up", 4, "--steps", steps, "--compiled", trial.compiled]
    before = dict(os.environ)
    os.environ.update(trial.variables)
    try:
        lines: list[dict[str, Any]] = ask("launch.bench.engines.step_speed", *words, gpu=True)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return [float(line["step_s"]) for line in lines]


def pass_over_gradients(model: str) -> float:
    """Seconds of multiplying as many fp32 numbers as the model has parameters by one number."""
    torch.set_num_threads(1)
    config = load_model_config(MODELS[model][1])
    gradients = torch.ones(sum(weight.numel() for weight in random_tensors(config).values()))
    took = []
    for _ in range(20):
        began = time.perf_counter()
        gradients.mul_(0.5)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def report(rows: list[str], step_s: list[float], *, model: str, conditions: str) -> list[str]:
    """Markdown with the ratios."""
    once = pass_over_gradients(model)
    shares = " and ".join(f"{once / seconds:.2%} of a {kind} step" for kind, seconds in zip(KINDS, step_s))
    return [
        f"# Settings that might make a step faster, {hardware()}",
        "",
        f"`python -m launch.bench.step_trials {conditions}; {versions('torch', 'megatron-core')}, "
        "one thread, fp32. Tokens/s over those of `training.compile: layers` measured just before; above 1 is faster. "
        "Medians over the rounds, with their extremes.",
        *table(f"| what changes | {' | '.join(f'{kind} steps' for kind in KINDS)} |", rows),
        "",
        f"Folding the division by the number of tokens into the optimizer would save one pass over the gradients: "
        f"{1000 * once:.2f} ms, {shares}. It would also round every gradient differently, and so change every golden "
        "curve; it is left as megatron-core does it.",
    ]


if __name__ == "__main__":
    sys.exit(main())
