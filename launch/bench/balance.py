"""What rebalanced pipeline stages gain when the encoders overload the first one as they do in the 7B model.

Trains a tiny model whose encoders make stage 0 of an even split about 1.64 times as slow as the other stage (the 7B's
at TP 4 x PP 4) on two single-threaded processes, PP 2: split evenly, as `megavl plan` balances it from a calibration,
and under `parallel.vision: split_all` with its own balanced split. Everything runs several times in turns; what else
runs on the machine is watched, and of the repetitions of one thing the fastest counts. Stage times are those of
recorded steps (`run.timeline_steps`). Writes `launch/bench/results/balance_<hardware>_<YYYYMM>.md`.

    python launch/bench/balance.py [--repetitions 3] [--steps 8] [--work runs/balance]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from plan_cpu import (
    RECIPE,
    ROOT,
    SEQ_LENGTH,
    WARM_UP,
    Measured,
    block_seconds,
    build_data,
    calibrate,
    environment,
    how_quiet,
    launcher,
    merged,
    watched,
)

IMAGES, BATCH = 4, 24
"""Images of a multimodal sequence; sequences, and micro-batches, of a step."""
RECORDED = 4
"""Steps at the end of a run that are recorded and do not count for the step time."""
CALIBRATIONS = 2
"""At most; each takes as long as a run."""
OVERLOAD = 1.64
"""Stage 0 against the mean decoder stage, 7B."""
ENCODERS = (
    *("model.sam.width=192", "model.sam.heads=4", "model.sam.mlp_dim=768"),
    *("model.sam.depth=17", "model.sam.global_attn_indexes=[3,7,11,15]"),
)
MODEL = ("model.llm.num_layers=12", *ENCODERS)
SIZES = ("parallel.tensor=1", "parallel.pipeline=2", f"training.global_batch_size={BATCH}")
VARIANTS = {"even": "recompute", "rebalanced": "recompute", "split_all": "split_all"}
"""Name and `parallel.vision`; the recorded steps of each stay in its folder."""
GOALS = {"gain": 1.15, "stages": 1.05}
"""Least gain of rebalancing, and most that the slowest stage may exceed the mean by afterwards."""


Pair = tuple[float, float]
"""Of rank 0 and rank 1."""


@dataclass(frozen=True)
class Run:
    """One repetition of one variant; lower quartile of the step times, medians of recorded steps."""

    text_s: float
    multimodal_s: float
    stages_s: Pair
    """Computing of each stage, one multimodal micro-batch within the schedule; lower quartile."""
    ahead_s: float
    """Encoders before and after the schedule on the slower rank."""
    waiting_s: Pair
    """Of each rank."""

    @property
    def slowest(self) -> float:
        """Slowest stage against the mean."""
        return max(self.stages_s) / statistics.mean(self.stages_s)

    @property
    def ratio(self) -> float:
        """Tokens per second of multimodal steps against text steps."""
        return self.text_s / self.multimodal_s


def main() -> int:
    """Calibrate, balance, measure in turns, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of a run, that count")
    parser.add_argument("--work", type=Path, default=Path("runs/balance"), help="made anew")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    settings = [*build_data(arguments.work, images=IMAGES), *MODEL]
    calibrations = {(1, processes): Measured(block_seconds) for processes in (1, 2)}
    for turn in range(min(arguments.repetitions, CALIBRATIONS)):
        for (tensor, processes), found in calibrations.items():
            path = arguments.work / f"calibration-{processes}-{turn}.json"
            found.others.append(calibrate(path, settings, tensor=tensor, processes=processes))
            found.values.append(json.loads(path.read_text()))
            print(f"turn {turn}: calibration, {processes} processes: others {found.others[-1]:.0%}", flush=True)
    whole = arguments.work / "calibration.json"
    whole.write_text(json.dumps(merged(calibrations)))
    layers = {"even": (6, 6), **{name: balanced(whole, settings, VARIANTS[name]) for name in list(VARIANTS)[1:]}}
    runs: dict[str, list[tuple[Run, float]]] = defaultdict(list)
    for turn in range(arguments.repetitions):
        for name in VARIANTS:
            runs[name].append(train(arguments.work / name, settings, name, layers[name], steps=arguments.steps))
            print(f"turn {turn}: {name}, layers {layers[name]}: {runs[name][-1]}", flush=True)
    text = report(layers, runs, calibrations, arguments)
    print(text)
    path = ROOT / "launch/bench/results" / f"balance_{hardware()}_{time.strftime('%Y%m')}.md"
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


def balanced(calibration: Path, settings: list[str], vision: str) -> tuple[int, ...]:
    """The split that `megavl plan` makes for multimodal steps."""
    options = ["--device", "cpu", "--calibration", str(calibration), "--images", str(IMAGES), "--json"]
    choice = ["parallel.layout=auto", f"parallel.vision={vision}", "data.multimodal_fraction=1.0"]
    command = [sys.executable, "-m", "megavl", "plan", RECIPE, *settings, *SIZES, *choice, *options]
    done = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
    return tuple(rank["layers"][0] for rank in json.loads(done.stdout)["ranks"])


def train(run: Path, settings: list[str], name: str, layers: tuple[int, ...], *, steps: int) -> tuple[Run, float]:
    """One run of both kinds of step, and the share of the machine that others used meanwhile."""
    shutil.rmtree(run, ignore_errors=True)
    counted, whole = range(WARM_UP, WARM_UP + steps), WARM_UP + steps + RECORDED
    recorded = range(WARM_UP + steps + 1, whole + 1)
    options = [
        *(f"parallel.layout={list(layers)}", f"parallel.vision={VARIANTS[name]}", f"training.steps={whole}"),
        *(f"run.dir={run}", f"run.timeline_steps={list(recorded)}"),
    ]
    others = watched([*launcher(2), "train", RECIPE, *settings, *SIZES, *options])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["images"] for row in rows} == {0, IMAGES * BATCH}, "image counts vary"
    times = {
        kind: statistics.quantiles([rows[i]["step_time_s"] for i in counted if rows[i]["modality"] == kind], n=4)[0]
        for kind in ("text", "multimodal")
    }
    steps_with_images = [step for step in recorded if rows[step - 1]["modality"] == "multimodal"]
    passes, ahead, waiting = read_traces(run, steps_with_images)
    return Run(
        text_s=times["text"],
        multimodal_s=times["multimodal"],
        stages_s=pair_of([statistics.quantiles(values, n=4)[0] for values in zip(*passes)]),
        ahead_s=max(middle(ahead)),
        waiting_s=middle(waiting),
    ), others


def read_traces(run: Path, steps: list[int]) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Seconds of each rank: passes of every micro-batch; encoders outside the schedule and waiting of every step."""
    passes: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    outside: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for step in steps:
        for event in json.loads((run / f"timeline/step_{step:06d}.json").read_text())["traceEvents"]:
            if event["ph"] == "X":
                number = event["args"]["micro_batch"]
                part = outside[step, event["cat"].split()[0]] if number is None else passes[step, number]
                part[event["tid"]] += event["dur"] / 1e6
    ahead, waiting = ([pair_of(outside[step, name]) for step in steps] for name in ("encoders", "waiting"))
    return [pair_of(part) for part in passes.values()], ahead, waiting


def pair_of(values: Sequence[float]) -> Pair:
    """Rank 0's and rank 1's."""
    first, second = values
    return first, second


def middle(pairs: list[Pair]) -> Pair:
    """Median of each rank."""
    return pair_of([statistics.median(values) for values in zip(*pairs)])


def pair(seconds: Pair) -> str:
    """Of rank 0 and rank 1."""
    return f"{seconds[0]:.3f}, {seconds[1]:.3f}"


def hardware() -> str:
    """For names of reports."""
    return f"{platform.machine()}-{os.cpu_count()}cores"


def report(
    layers: dict[str, tuple[int, ...]],
    runs: dict[str, list[tuple[Run, float]]],
    calibrations: dict[tuple[int, int], Measured],
    arguments: argparse.Namespace,
) -> str:
    """Markdown with the command, versions, goals, and how quiet the machine was."""
    best = {name: min(found, key=lambda pair: pair[0].multimodal_s) for name, found in runs.items()}
    even, rebalanced, split = (best[name][0] for name in VARIANTS)
    gains = {name: even.multimodal_s / run.multimodal_s for name, (run, _) in best.items()}
    used = [share for _, share in best.values()] + [found.best()[1] for found in calibrations.values()]
    every = [share for found in runs.values() for _, share in found]
    every += [share for found in calibrations.values() for share in found.others]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    rows = [
        f"| {name} | {'+'.join(map(str, layers[name]))} | {run.multimodal_s:.3f} | {gains[name]:.3f} "
        f"| {run.text_s:.3f} | {run.ratio:.3f} | {pair(run.stages_s)} | {run.slowest:.3f} | {run.ahead_s:.3f} "
        f"| {pair(run.waiting_s)} | {others:.0%} |"
        for name, (run, others) in best.items()
    ]
    overload = even.stages_s[0] / even.stages_s[1]
    goals = {
        f"rebalanced {gains['rebalanced']:.3f} x as fast as even, goal {GOALS['gain']} (ideal {even.slowest:.3f}, the "
        "slowest stage against the mean before)": gains["rebalanced"] >= GOALS["gain"],
        f"split_all {rebalanced.multimodal_s / split.multimodal_s:.3f} x as fast as rebalanced, goal 1": (
            split.multimodal_s <= rebalanced.multimodal_s
        ),
        f"slowest stage {rebalanced.slowest:.3f} of the mean after rebalancing, goal {GOALS['stages']}": (
            rebalanced.slowest <= GOALS["stages"]
        ),
    }
    lines = [
        "# Rebalanced stages against even ones",
        "",
        f"`python launch/bench/balance.py --repetitions {arguments.repetitions} --steps {arguments.steps}`; "
        f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} cores, gloo, fp32, "
        "two processes of one thread each.",
        f"Recipe `{RECIPE}`, TP 1 x PP 2, {BATCH} micro-batches of one {SEQ_LENGTH}-token sequence, {IMAGES} images "
        f"in every multimodal one; {' '.join(MODEL)}.",
        f"Even split: stage 0 takes {overload:.2f} times as long as stage 1 (7B at TP 4 x PP 4: {OVERLOAD}). The other "
        "splits: `megavl plan --calibration`, for multimodal steps.",
        f"Step times: lower quartile of {arguments.steps} steps of both kinds after {WARM_UP}. Stages: computing of a "
        f"multimodal micro-batch within the schedule, lower quartile over {RECORDED} recorded steps; encoders outside "
        "the schedule and waiting: medians of a step.",
        how_quiet(used, every, repetitions=arguments.repetitions),
        "",
        "| split | layers | multimodal s/step | against even | text s/step | multimodal / text tokens/s "
        "| stages s | slowest / mean | encoders outside s | waiting s | used by others |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *(f"- {'met' if met else 'MISSED'}: {goal}" for goal, met in goals.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
