"""Predicted against measured step time of the tiny model on this machine's CPU, by layout and modality.

Calibrates on one rank and on as many as compute at once, then trains a few steps under each layout. Everything is
repeated, and the fastest repetition counts, since a virtual machine's neighbours slow it down by a tenth or more.
Writes `launch/bench/results/plan_cpu_<YYYYMM>.md`.

    python -m launch.bench.plan_cpu [--repetitions 3] [--steps 24] [--work runs/plan_cpu]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from launch.bench.programs import ROOT, ask_plan, json_lines, launcher
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from launch.bench.tiny_runs import (
    BATCH,
    IMAGES,
    KINDS,
    RECIPE,
    SEQ_LENGTH,
    Calibrations,
    Measured,
    build_data,
    how_quiet,
    watched,
)

LAYOUTS: dict[str, list[str]] = {
    "TP 1 x PP 1": ["parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto"],
    "TP 2 x PP 1": ["parallel.tensor=2", "parallel.pipeline=1", "parallel.layout=auto"],
    "TP 2 x PP 1, split_tp": [
        *("parallel.tensor=2", "parallel.pipeline=1", "parallel.layout=auto", "parallel.vision=split_tp"),
    ],
    "TP 1 x PP 2, layers 2+2": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.layout=[2,2]"],
    "TP 1 x PP 2, layers 1+3": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.layout=[1,3]"],
    "TP 1 x PP 2, layers 0+4": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.layout=[0,4]"],
    "TP 1 x PP 2, layers 2+2, split_all": [
        *("parallel.tensor=1", "parallel.pipeline=2", "parallel.layout=[2,2]", "parallel.vision=split_all"),
    ],
    "TP 1 x PP 2 x virtual 2": [
        *("parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.layout=[1,1,1,1]"),
    ],
    "TP 2 x PP 2, layers 2+2": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.layout=[2,2]"],
}
CALIBRATIONS = ((1, 1), (1, 2), (2, 2), (2, 4))
"""(tensor, processes) that the layouts need."""
WARM_UP = 4
"""Steps of a run that do not count."""


def main() -> int:
    """Calibrate, measure, predict, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--work", type=Path, default=Path("runs/plan_cpu"), help="made anew")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    settings = build_data(arguments.work)
    calibrations = Calibrations(arguments.work, settings, CALIBRATIONS)
    layouts = {name: Measured(lambda value: sum(value.values())) for name in LAYOUTS}
    for turn in range(arguments.repetitions):
        calibrations.repeat()
        for name, found in layouts.items():
            value, others = train(arguments.work / "run", settings, LAYOUTS[name], steps=arguments.steps)
            found.values.append(value)
            found.others.append(others)
            print(f"turn {turn}: {name}: {value}, others used {others:.0%}", flush=True)
    calibration, used = calibrations.merge()
    used += [found.best()[1] for found in layouts.values()]
    rows, errors = [], []
    for name, found in layouts.items():
        value, others = found.best()
        predicted = predict(calibration, settings, LAYOUTS[name])
        shared = ranks_of(LAYOUTS[name]) > (os.cpu_count() or 1)
        for kind in KINDS:
            error = predicted[kind] / value[kind] - 1
            errors += [] if shared else [error]
            seconds = (f"{predicted[kind]:.3f}", f"{value[kind]:.3f}", f"{error:+.1%}")
            rows.append(table_row(f"{name}{' (*)' * shared}", kind, *seconds, f"{others:.0%}"))
            print(rows[-1], flush=True)
    write_report(report_path("plan_cpu", where=""), report(rows, errors, used, arguments))
    return 0


def train(run: Path, settings: list[str], layout: list[str], *, steps: int) -> tuple[dict[str, float], float]:
    """Lower quartile of the step time by modality, and the share of the machine that others used."""
    shutil.rmtree(run, ignore_errors=True)
    command = [*launcher("megavl", processes=ranks_of(layout)), "train", RECIPE, *settings, *layout]
    others = watched([*command, f"training.steps={steps}", f"run.dir={run}"])
    rows = json_lines((run / "metrics.jsonl").read_text())[WARM_UP:]
    found = {}
    for kind in KINDS:
        times = [row["step_time_s"] for row in rows if row["modality"] == kind]
        found[kind] = statistics.quantiles(times, n=4)[0]
    assert {row["images"] for row in rows} == {0, IMAGES * BATCH}, "image counts vary"
    return found, others


def ranks_of(layout: list[str]) -> int:
    """Processes of a layout."""
    sizes = dict(entry.split("=", 1) for entry in layout)
    return int(sizes["parallel.tensor"]) * int(sizes["parallel.pipeline"])


def predict(calibration: Path, settings: list[str], layout: list[str]) -> dict[str, float]:
    """Step time by modality as `megavl plan` says."""
    options = ("--device", "cpu", "--calibration", calibration, "--images", IMAGES)
    found = ask_plan(RECIPE, *settings, *layout, *options)
    return {kind: found[kind]["seconds"] for kind in KINDS}


def report(rows: list[str], errors: list[float], used: list[float], arguments: argparse.Namespace) -> list[str]:
    """Markdown with the command, versions, and how quiet the machine was."""
    sizes = [abs(error) for error in errors]
    return [
        "# Planner against measurement on the CPU",
        "",
        f"`python -m launch.bench.plan_cpu --repetitions {arguments.repetitions} --steps {arguments.steps}`; "
        f"{versions('torch', 'megatron-core')}; {machine()}, gloo, fp32, one thread a rank.",
        f"Recipe `{RECIPE}`: {BATCH} sequences of {SEQ_LENGTH} tokens a step in micro-batches of one, {IMAGES} images "
        "in every multimodal sequence.",
        f"Predicted: `megavl plan --calibration`, from blocks measured with {CALIBRATIONS} (tensor, processes). "
        f"Measured: lower quartile of the steps after {WARM_UP}.",
        f"{arguments.repetitions} repetitions in turns; of each the fastest counts. {how_quiet(used)}",
        *table("| layout | step | predicted s | measured s | error | used by others |", rows),
        "",
        f"Mean error {statistics.mean(sizes):.1%} (goal 10%), worst {max(sizes):.1%} (goal 20%), over {len(sizes)} "
        "combinations. (*) More ranks than cores: left out.",
    ]


if __name__ == "__main__":
    sys.exit(main())
