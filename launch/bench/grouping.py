"""Modality-grouped steps against the same sequences mixed within steps, measured and as the planner simulates them.

Trains a tiny model on 2 and on 4 data-parallel processes of one thread each, with `data.grouping: step` and `sequence`,
at 60% multimodal as in the paper's ablation (arXiv 2403.05525, Figure 8). Everything runs several times in turns; what
else runs on the machine is watched, and of the repetitions of one thing the fastest counts. Beside it stands
`megavl plan --mixing`, from blocks measured here, and at the paper's scale. Writes
`launch/bench/results/grouping_<hardware>_<YYYYMM>.md`.

    python launch/bench/grouping.py [--repetitions 2] [--steps 30] [--work runs/grouping]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from balance import hardware
from plan_cpu import (
    RECIPE,
    ROOT,
    SEQ_LENGTH,
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
from plan_paper import CLUSTERS, MIXING_ASSUMPTIONS, RUNS, plan

IMAGES, MICRO_BATCHES, FRACTION = 4, 4, 0.6
"""Images of a multimodal sequence, micro-batches of a replica, share of multimodal sequences."""
REPLICAS = (2, 4)
GROUPINGS = ("step", "sequence")
DRAWS = 4000
"""Mixed steps drawn where replicas share cores."""
WARM_UP = 5
"""Steps of a run that do not count; like those that do, a multiple of five, in which exactly three are multimodal."""
GOAL = 0.05
"""Most by which the simulated gain may differ from the measured one."""
PAPER_IMAGES = (3, 5)
MODEL = (
    *("model.llm.num_layers=4", "model.sam.width=192", "model.sam.heads=4", "model.sam.mlp_dim=768"),
    *("model.sam.depth=17", "model.sam.global_attn_indexes=[3,7,11,15]"),
)


def main() -> int:
    """Calibrate, measure in turns, simulate, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30, help="of a run, that count; a multiple of 5")
    parser.add_argument("--work", type=Path, default=Path("runs/grouping"), help="made anew")
    arguments = parser.parse_args()
    if arguments.steps % 5:
        parser.error(
            f"--steps: {arguments.steps} is no multiple of 5, so its share of multimodal steps is not {FRACTION}"
        )
    os.chdir(ROOT)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    sizes = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", f"data.multimodal_fraction={FRACTION}"]
    settings = [*build_data(arguments.work, images=IMAGES), *MODEL, *sizes]
    calibrations = {(1, replicas): Measured(block_seconds) for replicas in REPLICAS}
    runs = {
        (replicas, grouping): Measured(lambda value: value["seconds"])
        for replicas in REPLICAS
        for grouping in GROUPINGS
    }
    for turn in range(arguments.repetitions):
        for (tensor, replicas), found in calibrations.items():
            path = arguments.work / f"calibration-{replicas}-{turn}.json"
            found.others.append(calibrate(path, settings, tensor=tensor, processes=replicas))
            found.values.append(json.loads(path.read_text()))
            print(f"turn {turn}: calibration, {replicas} processes: others {found.others[-1]:.0%}", flush=True)
        for (replicas, grouping), found in runs.items():
            value, others = train(arguments.work / "run", settings, replicas, grouping, steps=arguments.steps)
            found.values.append(value)
            found.others.append(others)
            print(f"turn {turn}: {replicas} replicas, {grouping}: {value}, others {others:.0%}", flush=True)
    whole = arguments.work / "calibration.json"
    whole.write_text(json.dumps(merged(calibrations)))
    rows = [row(replicas, runs, simulated(whole, settings, replicas)) for replicas in REPLICAS]
    text = report(rows, list(paper()), runs, calibrations, arguments)
    print(text)
    path = ROOT / "launch/bench/results" / f"grouping_{hardware()}_{time.strftime('%Y%m')}.md"
    path.write_text(text, encoding="utf-8")
    print(path)
    return 0


def batch(replicas: int) -> str:
    """The same micro-batches for every replica."""
    return f"training.global_batch_size={MICRO_BATCHES * replicas}"


def train(
    run: Path, settings: list[str], replicas: int, grouping: str, *, steps: int
) -> tuple[dict[str, float], float]:
    """Mean seconds and images of a step, and the share of the machine that others used."""
    shutil.rmtree(run, ignore_errors=True)
    options = [batch(replicas), f"data.grouping={grouping}", f"training.steps={WARM_UP + steps}", f"run.dir={run}"]
    others = watched([*launcher(replicas), "train", RECIPE, *settings, *options])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    mean = {name: statistics.mean(row[name] for row in rows) for name in ("step_time_s", "images")}
    wanted = FRACTION * IMAGES * MICRO_BATCHES * replicas
    assert abs(mean["images"] - wanted) <= IMAGES / steps + 1e-9, f"{mean['images']} images a step, not {wanted}"
    return {"seconds": mean["step_time_s"], "images": mean["images"]}, others


def simulated(calibration: Path, settings: list[str], replicas: int) -> dict[str, Any]:
    """What `megavl plan --mixing` says of this run."""
    options = ["--devices", str(replicas), "--device", "cpu", "--calibration", str(calibration), "--top", "0"]
    options += ["--images", str(IMAGES), "--mixing", "--json"]
    command = [sys.executable, "-m", "megavl", "plan", RECIPE, *settings, batch(replicas), *options]
    done = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def gain_on_shared_cores(found: dict[str, Any], replicas: int, *, cores: int) -> float:
    """The simulated gain where more replicas than cores compute: those that are done leave their cores to the others.

    Seconds in `found` were measured with all replicas computing, so k of them are faster than that, up to a core each.
    """
    draw = random.Random(0)
    kinds = [found[kind]["pipeline_s"] / MICRO_BATCHES for kind in ("text", "multimodal")]
    total = 0.0
    for _ in range(DRAWS):
        work = sorted(sum(kinds[draw.random() < FRACTION] for _ in range(MICRO_BATCHES)) for _ in range(replicas))
        for done, (before, after) in enumerate(zip([0.0, *work], work)):
            total += (after - before) * max(1.0, (replicas - done) / cores) / max(1.0, replicas / cores)
    grouped = found["mixing"]["grouped_s"]
    outside = grouped - MICRO_BATCHES * ((1 - FRACTION) * kinds[0] + FRACTION * kinds[1])
    return (total / DRAWS + outside) / grouped - 1


def row(replicas: int, runs: dict[tuple[int, str], Measured], found: dict[str, Any]) -> str:
    """One line of the table."""
    (grouped, of_grouped), (mixed, of_mixed) = (runs[replicas, grouping].best() for grouping in GROUPINGS)
    gain = mixed["seconds"] / grouped["seconds"] - 1
    mixing, shared = found["mixing"], gain_on_shared_cores(found, replicas, cores=os.cpu_count() or 1)
    error = shared - gain
    met = "met" if abs(error) <= GOAL else "MISSED"
    return (
        f"| {replicas} | {grouped['seconds']:.3f} | {mixed['seconds']:.3f} | {gain:+.1%} | {mixing['grouped_s']:.3f} "
        f"| {mixing['mixed_s']:.3f} | {mixing['gain']:+.1%} | {shared:+.1%} | {100 * error:+.1f} points, {met} "
        f"| {max(of_grouped, of_mixed):.0%} |"
    )


def paper() -> Any:
    """Rows at the paper's scale."""
    for run in RUNS:
        for device, name in CLUSTERS.items():
            for images in PAPER_IMAGES:
                settings = [f"data.multimodal_fraction={FRACTION}", "data.modality_warmup_steps=0"]
                options = ("--images", str(images), "--mixing", "--top", "0")
                mixing = plan(run, device, *options, settings=settings)["mixing"]
                yield (
                    f"| {run.name}, {run.devices} x {name} | {images} | {mixing['gain']:+.1%} "
                    f"| {mixing['lockstep_gain']:+.1%} | +20% |"
                )


def report(
    rows: list[str],
    published: list[str],
    runs: dict[tuple[int, str], Measured],
    calibrations: dict[tuple[int, int], Measured],
    arguments: argparse.Namespace,
) -> str:
    """Markdown with the command, versions, what was compared, and how quiet the machine was."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    used = [found.best()[1] for found in (*runs.values(), *calibrations.values())]
    every = [share for found in (*runs.values(), *calibrations.values()) for share in found.others]
    cores = os.cpu_count() or 1
    shared = [
        f"{replicas} processes share {cores} cores: a replica that waits leaves its core to the slower ones, so mixing "
        "costs less than with a core each. The planner assumes a core each; the next column shares them."
        for replicas in REPLICAS
        if replicas > cores
    ]
    lines = [
        "# Modality-grouped steps against mixed ones",
        "",
        f"`python launch/bench/grouping.py --repetitions {arguments.repetitions} --steps {arguments.steps}`; "
        f"Python {platform.python_version()}, {versions}; {platform.machine()}, {cores} cores, gloo, fp32, one thread "
        "a process.",
        f"Recipe `{RECIPE}`, TP 1 x PP 1, {MICRO_BATCHES} micro-batches of one {SEQ_LENGTH}-token sequence a replica, "
        f"{IMAGES} images in every multimodal one, {FRACTION:.0%} multimodal; {' '.join(MODEL)}.",
        "Grouped (`data.grouping: step`): every step is wholly one kind. Mixed (`sequence`): every step holds its "
        "share of both, shuffled over replicas and micro-batches. Both train on the same sequences.",
        f"Mean of {arguments.steps} steps after {WARM_UP}. Simulated: `megavl plan --mixing --calibration`, where each "
        "sequence draws its kind alone. Gain: how much more a second does when steps are grouped.",
        how_quiet(used, every, repetitions=arguments.repetitions),
        *shared,
        "",
        "| replicas | grouped s/step | mixed s/step | gain | simulated grouped s | simulated mixed s | planner's gain "
        f"| simulated on {cores} cores | difference, goal {100 * GOAL:.0f} points | used by others |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        "## At the paper's scale",
        "",
        f"Simulated with the recipe's layout at {FRACTION:.0%} multimodal; the paper reports +20% (Figure 8).",
        "",
        "| run | images a sequence | grouping does more | if replicas wait after every micro-batch | paper |",
        "|---|---|---|---|---|",
        *published,
        "",
        *(f"- {line}" for line in MIXING_ASSUMPTIONS),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
