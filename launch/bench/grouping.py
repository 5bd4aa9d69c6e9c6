"""Modality-grouped steps against the same sequences mixed within steps, measured and as the planner simulates them.

A tiny model trains on 2 and on 4 data-parallel processes of one thread each, at 60% multimodal as in the paper's
ablation (arXiv 2403.05525, Figure 8). `data.grouping: step` and `sequence` take their steps in turn in the same
processes, and undisturbed steps count (`engines/paired_steps.py`). The report compares them with `megavl plan --mixing`
from blocks measured here. Writes `launch/bench/results/grouping_<hardware>_<YYYYMM>.md`.

    python -m launch.bench.grouping [--turns 40] [--work runs/grouping]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench.plan_paper import MIXING_ASSUMPTIONS
from launch.bench.programs import ROOT, ask_plan
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from launch.bench.tiny_runs import (
    KINDS,
    RECIPE,
    UNDISTURBED,
    Calibrations,
    build_data,
    how_quiet,
    paired_steps,
    undisturbed,
)

SEQ_LENGTH, IMAGES, MICRO_BATCHES, FRACTION = 256, 2, 4, 0.6
"""Tokens and images of a multimodal sequence, micro-batches of a replica, fraction of multimodal sequences."""
REPLICAS = (2, 4)
GROUPINGS = ("step", "sequence")
DRAWS = 4000
"""Mixed steps drawn where replicas share cores."""
STEPS = 5
"""Of a grouping in a turn; when grouped, three of them are multimodal."""
CALIBRATIONS = 2
GOAL = 0.05
"""Most by which the simulated gain may differ from the measured one."""
MODEL = (
    *("model.llm.num_layers=4", "model.sam.width=192", "model.sam.heads=4", "model.sam.mlp_dim=768"),
    *("model.sam.depth=17", "model.sam.global_attn_indexes=[3,7,11,15]"),
)


@dataclass(frozen=True)
class Gain:
    """What was measured with one number of replicas."""

    grouped_s: float
    """Mean step: medians of the undisturbed steps of each kind, in the share of the recipe."""
    mixed_s: float
    """Mean undisturbed step."""
    counts: tuple[int, int]
    """Undisturbed steps, grouped and mixed."""

    @property
    def gain(self) -> float:
        """How much more a second does when steps are grouped."""
        return self.mixed_s / self.grouped_s - 1


def main() -> int:
    """Calibrate, measure in turns, simulate, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--work", type=Path, default=Path("runs/grouping"), help="made anew")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    sizes = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.layout=auto", f"data.multimodal_fraction={FRACTION}"]
    settings = [*build_data(arguments.work, images=IMAGES, seq_length=SEQ_LENGTH), *MODEL, *sizes]
    calibrations = Calibrations(arguments.work, settings, [(1, replicas) for replicas in REPLICAS])
    for _ in range(CALIBRATIONS):
        calibrations.repeat()
    (calibration, used), rows = calibrations.merge(), []
    for replicas in REPLICAS:
        gain, others = measure(arguments.work / f"steps-{replicas}.jsonl", settings, replicas, turns=arguments.turns)
        used.append(others)
        rows.append(line(replicas, gain, simulated(calibration, settings, replicas)))
        print(rows[-1], flush=True)
    write_report(report_path("grouping"), report(rows, used, arguments))
    return 0


def batch(replicas: int) -> str:
    """The same micro-batches for every replica."""
    return f"training.global_batch_size={MICRO_BATCHES * replicas}"


def measure(out: Path, settings: list[str], replicas: int, *, turns: int) -> tuple[Gain, float]:
    """Both groupings in turns, and the share of the machine that others used."""
    variants = {grouping: (f"data.grouping={grouping}",) for grouping in GROUPINGS}
    rows, others = paired_steps(
        out, [*settings, batch(replicas)], variants, processes=replicas, turns=turns, steps=STEPS
    )
    calm = undisturbed(rows)
    times = {
        (grouping, kind): [row["seconds"] for row in calm if (row["variant"], row["modality"]) == (grouping, kind)]
        for grouping in GROUPINGS
        for kind in KINDS
    }
    grouped, mixed = [times["step", kind] for kind in KINDS], times["sequence", "multimodal"]
    if not all(grouped) or not mixed:
        raise SystemExit(f"error: too few undisturbed steps with {replicas} replicas")
    share = (1 - FRACTION, FRACTION)
    return Gain(
        grouped_s=sum(part * statistics.median(found) for part, found in zip(share, grouped)),
        mixed_s=statistics.mean(mixed),
        counts=(sum(map(len, grouped)), len(mixed)),
    ), others


def simulated(calibration: Path, settings: list[str], replicas: int) -> dict[str, Any]:
    """What `megavl plan --mixing` says of this run."""
    options = ("--devices", replicas, "--device", "cpu", "--calibration", calibration, "--top", 0)
    return ask_plan(RECIPE, *settings, batch(replicas), *options, "--images", IMAGES, "--mixing")


def gain_on_shared_cores(found: dict[str, Any], replicas: int, *, cores: int) -> float:
    """The simulated gain where replicas share cores: one that is done leaves its core to the others.

    Seconds in `found` were measured with all replicas computing. Fewer of them are faster, up to a core each.
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


def line(replicas: int, measured: Gain, found: dict[str, Any]) -> str:
    """One line of the table."""
    mixing, shared = found["mixing"], gain_on_shared_cores(found, replicas, cores=os.cpu_count() or 1)
    error = shared - measured.gain
    return table_row(
        *(replicas, f"{measured.grouped_s:.3f}", f"{measured.mixed_s:.3f}", f"{measured.gain:+.1%}"),
        *(f"{mixing['grouped_s']:.3f}", f"{mixing['mixed_s']:.3f}", f"{mixing['gain']:+.1%}", f"{shared:+.1%}"),
        f"{100 * error:+.1f} points, {'met' if abs(error) <= GOAL else 'MISSED'}",
        f"{measured.counts[0]}, {measured.counts[1]}",
    )


def report(rows: list[str], used: list[float], arguments: argparse.Namespace) -> list[str]:
    """Markdown with the command, versions, what was compared, and how quiet the machine was."""
    cores = os.cpu_count() or 1
    shared = [
        f"{replicas} processes share {cores} cores: a replica that waits leaves its core to the slower ones, so mixing "
        "costs less than with a core each. The planner assumes a core each; the next column shares them."
        for replicas in REPLICAS
        if replicas > cores
    ]
    return [
        "# Modality-grouped steps against mixed ones",
        "",
        f"`python -m launch.bench.grouping --turns {arguments.turns}`; {versions('torch', 'megatron-core')}; "
        f"{machine()}, gloo, fp32, one thread a process.",
        f"Recipe `{RECIPE}`, TP 1 x PP 1, {MICRO_BATCHES} micro-batches of one {SEQ_LENGTH}-token sequence a replica, "
        f"{IMAGES} images in every multimodal one, {FRACTION:.0%} multimodal; {' '.join(MODEL)}.",
        "Grouped (`data.grouping: step`): every step is wholly one kind. Mixed (`sequence`): every step holds its "
        "share of both, shuffled over replicas and micro-batches. Both train on the same sequences.",
        f"{arguments.turns} turns in the same processes, in each of which both take {STEPS} steps; {UNDISTURBED} Times "
        "are means of the undisturbed steps, with all data in memory; when grouped, means of both kinds' medians. "
        "Simulated: `megavl plan --mixing --calibration`, where each sequence draws its kind alone. Gain: how much "
        "more a second does when steps are grouped.",
        how_quiet(used),
        *shared,
        *table(
            "| replicas | grouped s/step | mixed s/step | gain | simulated grouped s | simulated mixed s "
            f"| planner's gain | simulated on {cores} cores | difference, goal {100 * GOAL:.0f} points "
            "| undisturbed steps, grouped and mixed |",
            rows,
        ),
        "",
        "The simulation assumes (`launch/bench/plan_paper.py` makes it at the paper's scale):",
        "",
        *(f"- {line}" for line in MIXING_ASSUMPTIONS),
    ]


if __name__ == "__main__":
    sys.exit(main())
