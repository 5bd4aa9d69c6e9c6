"""Greedy decoding of MegaVL against transformers' `generate`, on one exported folder and the same prompts.

Both programs (`engines/decode_speed.py`) keep their model loaded and answer in turn, so that both meet the same state
of the machine. A round's rates are compared with each other only. Every prompt has one image. Writes
`launch/bench/results/decode_<processor>_<YYYYMM>.md` from the JSON beside it, which keeps the cases measured earlier.

    python -m launch.bench.decode [--case "wide float32 1" ...] [--rounds 5] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.bench.programs import ROOT, environment
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

PROGRAM = ("-W", "ignore", "-m", "launch.bench.engines.decode_speed")
PACKAGES = ("torch", "transformers", "megatron-core")
SIDES = ("transformers", "megavl")
TOKENS = {"tiny": 128, "wide": 24, "hybrid": 24}
"""Tokens of an answer by model."""
ROUNDS = {"tiny": 25, "wide": 5, "hybrid": 5}
CASES = (
    "tiny float32 1",
    "tiny float32 8",
    "wide float32 1",
    "wide float32 4",
    "wide bfloat16 1",
    "hybrid float32 1",
)
"""Model, type of the weights, prompts in a batch."""


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--rounds", type=int, help="rounds after one that warms up; default: by model")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs"), help="where the folders are written; default: runs"
    )
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran on the machine")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    path = report_path("decode").with_suffix(".json")
    for case in arguments.case or CASES:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            row = measure(case, Path(scratch) / "hf", rounds=arguments.rounds or ROUNDS[case.split()[0]])
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        rows[case] = row | {"note": arguments.note}
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        write_report(path.with_suffix(".md"), report(rows))
    return 0


def measure(case: str, folder: Path, *, rounds: int) -> dict[str, Any]:
    """Rates and times of both sides in every round that counts."""
    model, dtype, batch = case.split()
    variables = environment(gpu=True)
    command = [sys.executable, *PROGRAM, "folder", str(folder), "--model", model]
    subprocess.run(command, check=True, env=variables)
    options = ("--model", model, "--dtype", dtype, "--batch-size", batch, "--tokens", str(TOKENS[model]))
    programs, first = {}, {}
    for side in SIDES:
        programs[side] = subprocess.Popen(
            [sys.executable, *PROGRAM, side, str(folder), *options],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        began = time.perf_counter()
        first[side] = ask(programs[side])["tokens"]
        print(f"{case}: {side} is ready after {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, Any] = {side: {"tokens_per_s": [], "first_token_s": []} for side in SIDES}
    for number in range(rounds):
        # The side that comes first changes, so that neither always follows a pause.
        for side in SIDES if number % 2 else SIDES[::-1]:
            answer = ask(programs[side])
            for name in ("tokens_per_s", "first_token_s"):
                found[side][name].append(answer[name])
            found[side]["peak_bytes"] = answer["peak_bytes"]
        rates = (f"{side} {found[side]['tokens_per_s'][number]:.2f} tokens/s" for side in SIDES)
        print(f"{case}: round {number + 1}, {', '.join(rates)}", flush=True)
    for program in programs.values():
        program.communicate()
    equal = equal_tokens(*first.values())
    return found | {"equal_tokens": equal, "rounds": rounds, "tokens": TOKENS[model], "versions": versions(*PACKAGES)}


def ask(program: subprocess.Popen[str]) -> dict[str, Any]:
    """One run of one side."""
    assert program.stdin is not None and program.stdout is not None, "both are pipes"
    program.stdin.write("\n")
    program.stdin.flush()
    line = program.stdout.readline()
    if not line:
        raise SystemExit(f"error: {' '.join(map(str, program.args))} ended early; run it by hand to see why")
    answer: dict[str, Any] = json.loads(line)
    return answer


def equal_tokens(one: list[list[int]], other: list[list[int]]) -> float:
    """Share of answers' tokens before the first that differs."""
    same = 0
    for a, b in zip(one, other, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    return same / sum(map(len, one))


def ratios(row: dict[str, Any], name: str) -> list[float]:
    """MegaVL against transformers in every round, above 1 where MegaVL is faster."""
    pairs = zip(row["megavl"][name], row["transformers"][name], strict=True)
    return [ours / theirs if name == "tokens_per_s" else theirs / ours for ours, theirs in pairs]


def report(rows: dict[str, Any]) -> list[str]:
    """Markdown with the command, the models and the figures."""
    lines = []
    for case in sorted(rows, key=CASES.index):
        row, cells = rows[case], [case]
        for name in ("tokens_per_s", "first_token_s"):
            cells += [f"{statistics.median(row[side][name]):.2f}" for side in reversed(SIDES)]
            found = ratios(row, name)
            cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        cells += [f"{row[side]['peak_bytes'] / 2**20:,.0f}" for side in reversed(SIDES)]
        lines.append(table_row(*cells, f"{row['equal_tokens']:.0%}", row["rounds"]))
    return [
        "# Greedy decoding against transformers",
        "",
        f"`python -m launch.bench.decode`; {next(iter(rows.values()))['versions']}; {machine()}, both sides with as "
        "many threads.",
        "Random weights in one exported folder of the native format, read by both; transformers with its sdpa "
        "attention. Both programs stay loaded and answer in turn. Every prompt has one image and 40 to 75 tokens of "
        "text. Rates count the tokens after the first. Prefill is the time to the first token of all prompts, images "
        "included. Rates and times are medians over the rounds, ratios the medians of each round's ratio, with their "
        "extremes; above 1, MegaVL is faster.",
        *sorted({row["note"] for row in rows.values() if row["note"]}),
        "",
        "tiny: the tiny-hybrid preset. wide: the 1.3B with 6 of its 24 layers and 32,768 vocabulary rows, its own "
        "SigLIP tower. hybrid: topology and image tokens of the 7B, a decoder of width 1024 with 16 layers, narrow "
        "towers.",
        *table(
            "| model, type, prompts | tokens/s MegaVL | transformers | ratio | prefill s MegaVL | transformers | ratio "
            "| peak MiB MegaVL | transformers | equal tokens | rounds |",
            lines,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
