"""Time from a command to what it does first: a training step, a preprocessed dataset, its help.

Runs each command of this checkout and of an earlier one in turn, and writes
`launch/bench/results/start_<processor>_<YYYYMM>.md`.

    git worktree add /tmp/before COMMIT
    python -m launch.bench.start --before /tmp/before [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.bench.programs import CPU, ROOT, output
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

GOAL = 0.5
"""Time of training's first step, as a share of what the earlier checkout takes."""
BUILD = """
import json, sys, time
from megavl.parallel.first_import import import_engine
import_engine()
import torch
from megavl.config.load import load_model_config
from megavl.config.recipe import ParallelConfig
from megavl.model.build import BuildSpec, build_stages
from megavl.parallel import groups
groups.start(ParallelConfig(), seed=1)
torch.set_num_threads(1)
spec = BuildSpec(model=load_model_config("1b", llm={"num_layers": 4}), drawn=sys.argv[1] == "drawn")
began = time.process_time()
(stage,) = build_stages(spec)
seconds = time.process_time() - began
print(json.dumps({"seconds": seconds, "parameters": sum(p.numel() for p in stage.parameters())}))
groups.stop()
"""
"""Builds the 1.3B with four of its 24 decoder layers."""


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="checkout of an earlier version")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    sides = {"before": arguments.before.resolve(), "now": ROOT}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_data(scratch)
        for number in range(arguments.rounds):
            for side, checkout in sides.items():
                for name, (command, until) in commands(scratch, f"{side}-{number}").items():
                    print(f"{name}, {side} ...", flush=True)
                    found.setdefault((name, side), []).append(measured(command, until=until, checkout=checkout))
        built = {name: build(name) for name in ("drawn", "blank")}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=sides["before"], capture_output=True, text=True, check=True
    ).stdout.strip()
    write_report(report_path("start"), report(found, built, commit=commit, rounds=arguments.rounds, load=load))
    return 0


def make_data(scratch: Path) -> None:
    """A small corpus, its tokenizer and its packed dataset."""
    corpus = scratch / "corpus"
    output("data_tools.build_corpus", "demo", "--output", corpus, "--samples", 96, "--size", 200_000)
    output("data_tools.preprocess", *preprocess(scratch, scratch / "shards"))


def preprocess(scratch: Path, out: Path) -> list[str]:
    """Arguments of a short preprocessing run."""
    corpus = scratch / "corpus"
    return [
        *("--input", str(corpus / "text.jsonl"), str(corpus / "captions.jsonl"), "--output", str(out)),
        *("--tokenizer", str(corpus / "tokenizer"), "--image-preset", "tiny-hybrid", "--seq-length", "256"),
        *("--max-images-per-sequence", "4", "--workers", "1"),
    ]


def commands(scratch: Path, name: str) -> dict[str, tuple[list[str], str]]:
    """Arguments of Python by what they do, each with the beginning of the line that ends it; empty: its own end.

    Args:
        name: of the output of this side and round.
    """
    run = [
        *("-m", "megavl", "train", "launch/recipes/tiny/stage2.yaml", f"run.dir={scratch / name}"),
        *(f"data.sources=[{{path: {scratch}/shards}}]", f"data.tokenizer={scratch}/corpus/tokenizer"),
        *("data.seq_length=256", "data.multimodal_fraction=0.5", "data.modality_warmup_steps=0"),
        *("parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", "checkpoint.init=null"),
        *("checkpoint.allow_random_init=true", "checkpoint.interval=1", "training.steps=9", "optimizer.warmup_steps=0"),
    ]
    return {
        "first step of `megavl train`, tiny, 1 rank": (run, "step 1/"),
        # The first run was ended before its save.
        "the same, until its first save": (run, "saved "),
        "first step after a resume": (run, "step "),
        "`megavl train --help`": (["-m", "megavl", "train", "--help"], ""),
        "`megavl plan` of the tiny recipe": (["-m", "megavl", "plan", "launch/recipes/tiny/stage2.yaml"], ""),
        "`megavl convert --help`": (["-m", "megavl", "convert", "--help"], ""),
        "`preprocess.py --help`": (["-m", "data_tools.preprocess", "--help"], ""),
        "`preprocess.py`, 96 images and 0.2 MB of text": (
            ["-m", "data_tools.preprocess", *preprocess(scratch, scratch / f"{name}-shards")],
            "",
        ),
    }


def measured(arguments: Sequence[str], *, until: str, checkout: Path) -> tuple[float, float]:
    """Wall and CPU seconds until a program prints a line, or until it ends."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # Users of a CPU do not set TORCHDYNAMO_DISABLE.
    variables |= {name: value for name, value in CPU.items() if name != "TORCHDYNAMO_DISABLE"}
    variables["PYTHONPATH"] = str(checkout)
    began, before = time.perf_counter(), os.times()
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            cwd=checkout,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as run,
    ):
        assert run.stdout is not None
        for line in run.stdout:
            if until and line.startswith(until):
                spent = psutil.Process(run.pid).cpu_times()
                seconds = time.perf_counter() - began
                run.kill()
                return seconds, spent.user + spent.system
        if run.wait() or until:
            errors.seek(0)
            raise SystemExit(f"error: {' '.join(arguments[:4])} ended with {run.returncode}\n{errors.read()[-3000:]}")
        after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, cpu


def build(name: str) -> dict[str, Any]:
    """CPU seconds of building a stage with drawn weights, or with what a checkpoint fills."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILD, name],
        cwd=ROOT,
        env={**os.environ, **CPU, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(
    found: dict[tuple[str, str], list[tuple[float, float]]],
    built: dict[str, dict[str, Any]],
    *,
    commit: str,
    rounds: int,
    load: float,
) -> list[str]:
    """Markdown with all commands."""
    names = list(dict.fromkeys(name for name, _ in found))
    drawn, blank = built["drawn"]["seconds"], built["blank"]["seconds"]
    first = _least(found, names[0], 1)
    met = "met" if first["now"] <= GOAL * first["before"] else "**missed**"
    return [
        "# From a command to what it does first",
        "",
        f"`python -m launch.bench.start --before CHECKOUT_OF_{commit} --rounds {rounds}`; "
        f"{versions('torch', 'megatron-core', 'pydantic')}; {machine()}; load before {load:.1f}.",
        "Both checkouts run in turn with one thread, without a GPU and with compiled bytecode. The least of "
        f"{rounds} rounds counts. Other programs ran, so CPU seconds say more than wall seconds.",
        *table(
            f"| command | {commit}: CPU s | now: CPU s | share | {commit}: wall s | now: wall s |",
            [_row(found, name) for name in names],
        ),
        "",
        f"- Goal for training's first step: at most {GOAL} of the CPU time: {met} "
        f"({first['now'] / first['before']:.2f}).",
        f"- Building {built['drawn']['parameters'] / 1e9:.2f} G parameters, the 1.3B with 4 of its 24 decoder layers, "
        f"takes {drawn:.1f} s of a core with random weights and {blank:.1f} s where a checkpoint fills them.",
    ]


def _least(found: dict[tuple[str, str], list[tuple[float, float]]], name: str, which: int) -> dict[str, float]:
    return {side: min(times[which] for times in found[name, side]) for side in ("before", "now")}


def _row(found: dict[tuple[str, str], list[tuple[float, float]]], name: str) -> str:
    wall, cpu = (_least(found, name, which) for which in (0, 1))
    share = cpu["now"] / cpu["before"]
    seconds = (f"{times[side]:.2f}" for times in (cpu, wall) for side in ("before", "now"))
    before, now, *rest = seconds
    return table_row(name, before, now, f"{share:.2f}", *rest)


if __name__ == "__main__":
    sys.exit(main())
