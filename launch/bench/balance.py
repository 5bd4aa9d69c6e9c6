"""What rebalanced pipeline stages gain when the encoders overload the first one as they do in the 7B model.

A tiny model trains on two single-threaded processes, PP 2. In an even split its encoders make stage 0 about 1.64 times
as slow as stage 1, as in the 7B. How deep SAM must be for that depends on the machine, so a pilot run with two depths
finds it. Three variants take their steps in turn (`engines/paired_steps.py`): the even split, the split that
`megavl plan` balances, and `parallel.vision: split_all` with its own balanced split.
Writes `launch/bench/results/balance_<hardware>_<YYYYMM>.md`.

    python -m launch.bench.balance [--turns 6] [--work runs/balance] [--more]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.bench.programs import ROOT, ask_plan
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from launch.bench.tiny_runs import KINDS, QUICK, RECIPE, Calibrations, build_data, how_quiet, paired_steps

SEQ_LENGTH, IMAGES, BATCH = 128, 2, 24
"""Tokens and images of a multimodal sequence; micro-batches of a step. With fewer, rebalancing would gain less."""
CALIBRATIONS = 2
OVERLOAD = 1.64
"""Time of stage 0 against the mean decoder stage of the 7B."""
MODEL = (
    *("model.llm.num_layers=20", "model.llm.hidden_size=256", "model.llm.ffn_hidden_size=800"),
    *("model.sam.width=384", "model.sam.heads=6", "model.sam.mlp_dim=1536"),
    "model.sam.global_attn_indexes=[1,3,5,7]",
)
"""Wide enough that matrix products take most of the time: they vary least where cores slow down. Deep enough that the
layers split evenly and stages exchange data for a small part of the time."""
PILOT_DEPTHS = (8, 20)
"""SAM's layers in the pilot run."""
PILOT_TURNS = 1
EVEN = [10, 10]
SIZES = (
    *("parallel.tensor=1", "parallel.pipeline=2", f"training.global_batch_size={BATCH}"),
    "data.multimodal_fraction=0.8",
)
VARIANTS = {"even": "recompute", "rebalanced": "recompute", "split_all": "split_all"}
"""Name and `parallel.vision`."""
GOALS = {"gain": 1.15, "stages": 1.05}
"""Least gain of rebalancing, and most that the slowest stage may exceed the mean by afterwards."""
QUICKEST = 0.05
"""Quantile of a rank's loops that the others are compared with; a single one may be a tenth faster than the rest."""
LEAST = 40
"""Fewest cycles and passes of a median."""
STEPS = 5
"""Of a variant in a turn: one of text, four with images."""
Pair = tuple[float, float]
"""Of rank 0 and rank 1."""
Rows = list[dict[str, Any]]
"""Steps as `paired_steps.py` writes them."""


@dataclass(frozen=True)
class Variant:
    """One variant's multimodal steps."""

    layers: list[int]
    cycle_s: float
    """From the end of one backward pass of stage 0 to the end of the next, while cores were quick."""
    rest_s: float
    """The rest of a step: pipeline fill, encoders outside of the schedule, update."""
    cycles: int
    """Number of cycles that were measured while cores were quick."""
    stages_s: Pair
    """Computing of each stage for one micro-batch within the schedule, while its core was quick."""
    median: float
    """Seconds of a whole step, on slow cores too."""
    text: float
    """Time of a text step against a multimodal one, whole steps."""

    @property
    def seconds(self) -> float:
        """A step whose cycles all run on quick cores."""
        return (BATCH - 1) * self.cycle_s + self.rest_s

    @property
    def slowest(self) -> float:
        """Slowest stage against the mean."""
        return max(self.stages_s) / statistics.mean(self.stages_s)


def main() -> int:
    """Calibrate, balance, measure in turns, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/balance"), help="made anew, but for --more")
    parser.add_argument("--more", action="store_true", help="take further turns of the run that stands there")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    record = arguments.work / "run.json"
    run = json.loads(record.read_text()) if arguments.more else prepare(arguments.work)
    choices = {
        name: (f"parallel.layout={run['layers'][name]}", f"parallel.vision={vision}")
        for name, vision in VARIANTS.items()
    }
    rows, others = paired_steps(
        *(arguments.work / "steps.jsonl", [*run["settings"], *SIZES], choices),
        processes=2,
        turns=arguments.turns,
        steps=STEPS,
    )
    run["others"].append(others)
    record.write_text(json.dumps(run))
    assert {row["images"] for row in rows} == {0, IMAGES * BATCH}, "image counts vary"
    write_report(report_path("balance"), report(rows, run))
    return 0


def prepare(work: Path) -> dict[str, Any]:
    """Make data, calibrations and splits.

    Returns:
        Overrides of all variants, SAM's depth, layers of each variant, and what others used of the machine.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    settings = [*build_data(work, images=IMAGES, seq_length=SEQ_LENGTH), *MODEL]
    depth = encoder_depth(work, settings)
    settings.append(f"model.sam.depth={depth}")
    calibrations = Calibrations(work, settings, [(1, 1), (1, 2)])
    for _ in range(CALIBRATIONS):
        calibrations.repeat()
    whole, others = calibrations.merge()
    layers = {"even": EVEN, **{name: balanced(whole, settings, VARIANTS[name]) for name in list(VARIANTS)[1:]}}
    print(f"layers: {layers}", flush=True)
    return {"settings": settings, "depth": depth, "layers": layers, "others": others}


def encoder_depth(work: Path, settings: list[str]) -> int:
    """SAM's layers with which an even split's stage 0 takes `OVERLOAD` times as long as stage 1 on this machine."""
    choices = {str(depth): (f"model.sam.depth={depth}", f"parallel.layout={EVEN}") for depth in PILOT_DEPTHS}
    rows, _ = paired_steps(
        work / "pilot.jsonl", [*settings, *SIZES], choices, processes=2, turns=PILOT_TURNS, steps=STEPS
    )
    found = [overload([row for row in rows if row["variant"] == name]) for name in choices]
    shown = ", ".join(f"{ratio:.2f} with {layers}" for ratio, layers in zip(found, PILOT_DEPTHS))
    print(f"pilot: stage 0 takes {shown} layers of SAM times as long as stage 1", flush=True)
    if not found[0] <= OVERLOAD <= found[1]:
        raise SystemExit(f"error: {OVERLOAD} lies outside of what the pilot run saw; change PILOT_DEPTHS")
    return round(float(np.interp(OVERLOAD, found, PILOT_DEPTHS)))


def overload(rows: Rows) -> float:
    """Stage 0 against stage 1, medians of all multimodal micro-batches."""
    images = [row["segments"] for row in rows if row["modality"] == "multimodal"]
    one, other = (statistics.median(itertools.chain(*(passes(boxes, rank) for boxes in images))) for rank in (0, 1))
    return one / other


def balanced(calibration: Path, settings: list[str], vision: str) -> list[int]:
    """The split that `megavl plan` makes for multimodal steps."""
    options = ("--device", "cpu", "--calibration", calibration, "--images", IMAGES)
    choice = ("parallel.layout=auto", f"parallel.vision={vision}", "data.multimodal_fraction=1.0")
    return [rank["layers"][0] for rank in ask_plan(RECIPE, *settings, *SIZES, *choice, *options)["ranks"]]


def read(rows: Rows, name: str, layers: list[int]) -> Variant:
    """One variant's steps."""
    own = [(row, quick) for row, quick in zip(rows, quick_loops(rows), strict=True) if row["variant"] == name]
    text, images = ([step for step in own if step[0]["modality"] == kind] for kind in KINDS)
    stages: tuple[list[float], list[float]] = ([], [])
    cycles, rests = [], []
    for row, quick in images:
        for rank, found in enumerate(stages):
            spent = passes(row["segments"], rank)
            found += [spent[at] for at in range(1, BATCH - 1) if quick[rank, at - 1 : at + 2].all()]
        lengths = cycle_lengths(row["segments"])
        cycles += [lengths[at - 1] for at in range(1, BATCH - 2) if quick[:, at - 1 : at + 3].all()]
        rests.append(row["seconds"] - sum(lengths))
    if min(map(len, (cycles, *stages))) < LEAST:
        counts = f"{len(cycles)} cycles and {len(stages[0])}, {len(stages[1])} passes"
        raise SystemExit(f"error: {counts} of {name} on quick cores, {LEAST} needed; take more turns: --more")
    median = statistics.median(row["seconds"] for row, _ in images)
    return Variant(
        layers=layers,
        cycle_s=statistics.median(cycles),
        rest_s=statistics.median(rests),
        cycles=len(cycles),
        stages_s=(statistics.median(stages[0]), statistics.median(stages[1])),
        median=median,
        text=statistics.median(row["seconds"] for row, _ in text) / median,
    )


def passes(segments: Rows, rank: int) -> list[float]:
    """Seconds that a rank computes for each micro-batch."""
    found = [0.0] * BATCH
    for segment in segments:
        if segment["rank"] == rank and segment["micro_batch"] is not None:
            found[segment["micro_batch"]] += segment["seconds"]
    return found


def cycle_lengths(segments: Rows) -> list[float]:
    """Seconds from the end of each backward pass of stage 0 to the end of the next, waiting included."""
    now, ends = 0.0, [0.0] * BATCH
    for segment in segments:
        if segment["rank"] == 0:
            now += segment["seconds"]
            # A pass has several parts; the last one ends it.
            if segment["micro_batch"] is not None and "backward" in segment["what"]:
                ends[segment["micro_batch"]] = now
    return [after - before for before, after in itertools.pairwise(ends)]


def starts(rows: Rows) -> list[Rows]:
    """Steps of each start of the two processes; every start counts its turns from 0."""
    order = [(row["turn"], [*VARIANTS].index(row["variant"])) for row in rows]
    begins = [at for at in range(1, len(rows)) if order[at] < order[at - 1]]
    return [rows[begin:end] for begin, end in itertools.pairwise([0, *begins, len(rows)])]


def quick_loops(rows: Rows) -> list[np.ndarray]:
    """Which loops of each step were quick, (ranks, micro-batches).

    They are compared with the quickest of the same rank and start, since another start may meet another clock rate.
    """
    found = []
    for start in starts(rows):
        loops = np.array([row["short_probes_s"] for row in start])
        found += list(loops <= (1 + QUICK) * np.quantile(loops, QUICKEST, axis=(0, 2), keepdims=True))
    return found


def quick_share(rows: Rows) -> float:
    """Share of loops that were quick."""
    return float(np.mean(quick_loops(rows)))


def goals_of(variants: dict[str, Variant]) -> dict[str, bool]:
    """What should be reached, and whether it was."""
    even, rebalanced, split = (variants[name] for name in VARIANTS)
    gain, over_rebalanced = even.seconds / rebalanced.seconds, rebalanced.seconds / split.seconds
    return {
        f"rebalanced {gain:.3f} x as fast as even, goal {GOALS['gain']} (ideal {even.slowest:.3f}, the slowest stage "
        "against the mean before)": gain >= GOALS["gain"],
        f"split_all {over_rebalanced:.3f} x as fast as rebalanced, goal 1": over_rebalanced >= 1,
        f"slowest stage {rebalanced.slowest:.3f} of the mean after rebalancing, goal {GOALS['stages']}": (
            rebalanced.slowest <= GOALS["stages"]
        ),
    }


def report(rows: Rows, run: dict[str, Any]) -> list[str]:
    """Markdown with the command, versions, goals, and how quiet the machine was."""
    variants = {name: read(rows, name, run["layers"][name]) for name in VARIANTS}
    even, rebalanced = variants["even"], variants["rebalanced"]
    begun = len(starts(rows))
    lines = [
        table_row(
            *(name, "+".join(map(str, found.layers)), f"{found.seconds:.3f}", f"{even.seconds / found.seconds:.3f}"),
            *(
                f"{found.cycle_s:.4f}",
                f"{found.rest_s:.3f}",
                found.cycles,
                ", ".join(f"{stage:.3f}" for stage in found.stages_s),
            ),
            *(f"{found.slowest:.3f}", f"{found.median:.3f}", f"{even.median / found.median:.3f}", f"{found.text:.3f}"),
        )
        for name, found in variants.items()
    ]
    slowed = sum(rebalanced.stages_s) / sum(even.stages_s) - 1
    return [
        "# Rebalanced stages against even ones",
        "",
        f"`python -m launch.bench.balance`; {versions('torch', 'megatron-core')}; {machine()}, gloo, fp32, two "
        "processes of one thread each.",
        f"Recipe `{RECIPE}`, TP 1 x PP 2, {BATCH} micro-batches of one {SEQ_LENGTH}-token sequence, {IMAGES} images "
        f"in every multimodal one; {' '.join(MODEL)}; SAM with {run['depth']} layers, chosen by a pilot run.",
        f"Even split: stage 0 takes {even.stages_s[0] / even.stages_s[1]:.2f} times as long as stage 1 (7B at TP 4 x "
        f"PP 4: {OVERLOAD}). The other splits come from `megavl plan --calibration`, for multimodal steps.",
        f"{len(rows) // (STEPS * len(VARIANTS))} turns ({begun} start{'s' * (begun > 1)} of two processes), in each "
        f"of which every variant takes {STEPS} steps in the same processes. The ranks change cores after every turn, "
        "and all data are in memory.",
        "Cores of a virtual machine slow down by half for up to seconds at a time, for reasons not visible from "
        "inside. So each rank times a loop of 0.2 ms at every micro-batch. A loop is quick where it takes at most "
        f"{QUICK:.0%} longer than the quickest {QUICKEST:.0%} of its rank in that start; {quick_share(rows):.0%} were.",
        "A cycle lasts from the end of one backward pass of stage 0 to the end of the next. It counts where the loops "
        "of both ranks were quick from the micro-batch before it to two after it. A pass counts where the loops of its "
        f"rank were quick before, in and after it. A step is {BATCH - 1} cycles and the rest (pipeline fill, encoders "
        "outside of the schedule, update); all are medians of multimodal steps. Medians of whole steps, and the "
        "throughput of multimodal against text, take all steps.",
        f"After rebalancing both stages together compute {slowed:+.1%} for the same micro-batch, which a split by "
        "itself does not change.",
        how_quiet(run["others"]),
        *table(
            "| split | layers | s/step | against even | cycle s | rest s | cycles | stages s | slowest / mean "
            "| whole steps: median s | against even | multimodal / text tokens/s |",
            lines,
        ),
        "",
        *(f"- {'met' if met else 'MISSED'}: {goal}" for goal, met in goals_of(variants).items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
