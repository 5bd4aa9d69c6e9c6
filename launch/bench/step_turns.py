"""Compares steps of MegaVL and of transformers under torch.compile, one after the other in the same process.

Ratios stay true on a machine that does other work too, because neighbours slow both sides down. Memory is measured in a
process of each side. Writes `launch/bench/results/step_turns_<device>_<YYYYMM>.md`. Needs the extras `test` and `hf`
and a C++ compiler.

    python -m launch.bench.step_turns [--model tiny small] [--rounds 5] [--nice -12] [--out DIR]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from launch.bench.programs import ask
from launch.bench.report import RESULTS, hardware, report_path, table, table_row, versions, write_report

GOALS = {("tiny", "text"): 1.0, ("tiny", "multimodal"): 1.1, ("small", "text"): 1.0, ("small", "multimodal"): 1.2}
"""Least tokens/s of MegaVL over those of transformers, by model and kind of step."""
MEMORY_GOAL = 0.9
"""Most peak memory of MegaVL's `small` over that of transformers."""
STEPS = {"tiny": 5, "small": 1}
"""Steps of each side in a round."""
SIDES = {"megavl": ("--compiled", "layers"), "transformers": ("--compile",)}


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nice", type=int, help="priority of the measured rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that a program may take")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    nice = [] if arguments.nice is None else ["--nice", arguments.nice]
    turns: list[dict[str, Any]] = []
    plain: dict[tuple[str, str], dict[str, float]] = {}
    for model in arguments.model:
        words = ["--model", model, *SIDES["megavl"], "--rounds", arguments.rounds, "--steps", STEPS[model], *nice]
        turns += ask("launch.bench.engines.step_turns", *words, gpu=True, limit=arguments.limit)
        words = ["--model", model, "--compiled", "none", "--alone", *nice]
        for found in ask("launch.bench.engines.step_turns", *words, gpu=True, limit=arguments.limit):
            plain[model, found["kind"]] = found["parts_ms"]["megavl"]
    memory: dict[str, list[dict[str, Any]]] = {}
    if "small" in arguments.model:
        for side, options in SIDES.items():
            words = ["--side", side, *options, "--model", "small", "--precision", "fp32"]
            words += ["--steps", 1, "--warm-up", 2, "--threads", 1]
            memory[side] = ask("launch.bench.engines.step_speed", *words, gpu=True, limit=arguments.limit)
    write_report(report_path("step_turns", where=hardware(), folder=out), report(turns, memory, plain))
    return 0


def profiles(turns: list[dict[str, Any]], plain: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    """Where the time of a step goes, before and after compilation, and on the other side."""
    rows = []
    for found in turns:
        sides = {
            "MegaVL, `none`": plain[found["model"], found["kind"]],
            "MegaVL, `layers`": found["parts_ms"]["megavl"],
        }
        sides["transformers"] = found["parts_ms"]["transformers"]
        rows += [
            table_row(
                found["model"], found["kind"], name, *(f"{ms:,.0f}" for ms in [*parts.values(), sum(parts.values())])
            )
            for name, parts in sides.items()
        ]
    heads = list(turns[0]["parts_ms"]["megavl"])
    return table(f"| model | step | side | {' | '.join(heads)} | together |", rows)


def report(
    turns: list[dict[str, Any]],
    memory: dict[str, list[dict[str, Any]]],
    plain: dict[tuple[str, str], dict[str, float]],
) -> list[str]:
    """Markdown with the ratios, the goals and how they were measured."""
    rows = []
    for found in turns:
        ours, theirs = (1000 * min(found["seconds"][side]) for side in SIDES)
        rows.append(
            table_row(
                found["model"],
                found["kind"],
                f"{found['ratio']:.2f}",
                f"{min(found['of_rounds']):.2f} to {max(found['of_rounds']):.2f}",
                f">= {GOALS[found['model'], found['kind']]}",
                f"{ours:,.0f}",
                f"{theirs:,.0f}",
                f"{found['load']:.0f}",
            )
        )
    peaks = []
    for ours, theirs in zip(*memory.values()) if memory else ():
        mine, other = ours["peak_bytes"], theirs["peak_bytes"]
        cells = (f"{mine / 2**20:,.0f}", f"{other / 2**20:,.0f}", f"{mine / other:.2f}", f"<= {MEMORY_GOAL}")
        peaks.append(table_row("small", ours["kind"], *cells))
    packages = versions("torch", "megatron-core", "transformers")
    return [
        f"# Steps in turn with transformers, {hardware()}",
        "",
        f"`python -m launch.bench.step_turns`; {packages}, {os.cpu_count()} cores, one thread, fp32.",
        *table(
            "| model | step | tokens/s against transformers | of single rounds | goal | MegaVL's fastest round, ms "
            "| transformers' | load average |",
            rows,
        ),
        *table("| model | step | MegaVL's peak, MiB | transformers' | ratio | goal |", peaks),
        "",
        "Milliseconds of one profiled step, in operators' own time. What the two sides share sets the limit of the "
        "ratio: products and attention run in the same libraries.",
        *profiles(turns, plain),
        "",
        "- Both sides hold the same weights and take the same two micro-batches; first losses agree to 1e-5. MegaVL: "
        "`training.compile: layers`. transformers: its own class under `torch.compile`, SDPA, fused AdamW.",
        f"- Ratios are of medians over the rounds; a round takes {STEPS['tiny']} steps of each side for `tiny`, "
        f"{STEPS['small']} for `small`. The order of the sides changes from round to round.",
        "- `small` has sequences of 1,024 tokens, of which five images take 70%. Peak memory is that of "
        "the process, libraries and compilers included, after the first steps.",
    ]


if __name__ == "__main__":
    sys.exit(main())
