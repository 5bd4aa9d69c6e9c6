"""Runs of the tiny model on this machine's CPU, for benchmarks that compare layouts or settings.

Other programs and a virtual machine's neighbours slow cores down, so every run says how much others computed
meanwhile. Settings that are compared take their steps in turn in the same processes (`paired_steps`).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.bench.programs import environment, launcher, output

RECIPE = "launch/recipes/tiny/stage2.yaml"
SEQ_LENGTH, IMAGES, BATCH = 512, 8, 8
KINDS = ("text", "multimodal")
QUICK = 0.25
"""How much slower than the quickest a probe loop may be and still count as quick."""
UNDISTURBED = (
    "the ranks change cores after every turn. Cores of a virtual machine slow down by half for up to seconds at a "
    "time, for reasons not visible from inside. So a short loop runs on all cores before and after every step. A step "
    "waits about a second for the loop to be quick. It counts as undisturbed where the slower loop took at most "
    f"{QUICK:.0%} longer than the quickest of all."
)
"""What reports say of `paired_steps`."""
QUIET = 0.1
"""Share of the machine that others may use in an undisturbed repetition."""


@dataclass
class Measured:
    """Repetitions of one measurement."""

    seconds: Callable[[Any], float]
    """Time of a repetition, by which the fastest is found."""
    values: list[dict[str, Any]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Share of the machine that other programs used in each repetition."""

    def best(self) -> tuple[dict[str, Any], float]:
        """The fastest repetition, and what others used in it."""
        index = min(range(len(self.values)), key=lambda number: self.seconds(self.values[number]))
        return self.values[index], self.others[index]


class Calibrations:
    """Calibrations for several numbers of tensor-parallel ranks and processes; of each the fastest counts."""

    def __init__(self, work: Path, settings: list[str], sizes: Iterable[tuple[int, int]]) -> None:
        """`sizes`: (tensor, processes)."""
        self.work, self.settings = work, settings
        self.found = {size: Measured(block_seconds) for size in sizes}

    def repeat(self) -> None:
        """Measure every size once more."""
        for (tensor, processes), found in self.found.items():
            path = self.work / f"calibration-{tensor}-{processes}-{len(found.values)}.json"
            sizes = [f"parallel.tensor={tensor}", "parallel.pipeline=1", "parallel.layout=auto"]
            words = ["plan", RECIPE, *self.settings, *sizes, "--calibrate", str(path), "--repeats", "24"]
            found.others.append(watched([*launcher("megavl", processes=processes), *words]))
            found.values.append(json.loads(path.read_text()))
            print(f"{path.stem}: others used {found.others[-1]:.0%}", flush=True)

    def merge(self) -> tuple[Path, list[float]]:
        """One file of the fastest repetitions, and what others used in them."""
        best = [found.best() for found in self.found.values()]
        whole = {**best[0][0], "entries": [entry for raw, _ in best for entry in raw["entries"]]}
        path = self.work / "calibration.json"
        path.write_text(json.dumps(whole))
        return path, [others for _, others in best]


def block_seconds(calibration: dict[str, Any]) -> float:
    """Seconds of a decoder layer, forward and backward, over both kinds of step."""
    (entry,) = calibration["entries"]
    return sum(entry[kind]["layer"][way] for kind in KINDS for way in ("forward", "backward"))


def build_data(
    work: Path, *, images: int = IMAGES, seq_length: int = SEQ_LENGTH, text_bytes: int = 2_500_000
) -> list[str]:
    """Make a corpus whose multimodal sequences all hold `images` images; returns the overrides that runs share."""
    output("data_tools.build_corpus", "demo", "--output", work / "corpus", "--samples", 600, "--size", text_bytes)
    output(
        *("data_tools.preprocess", "--input", work / "corpus/text.jsonl", work / "corpus/captions.jsonl"),
        *("--output", work / "shards", "--tokenizer", work / "corpus/tokenizer", "--image-preset", "tiny-hybrid"),
        *("--seq-length", seq_length, "--max-images-per-sequence", images, "--workers", 1),
    )
    return [
        f"data.sources=[{{path: {work}/shards}}]",
        *(f"data.tokenizer={work}/corpus/tokenizer", f"data.seq_length={seq_length}", "run.tensorboard=false"),
        *("checkpoint.init=null", "checkpoint.allow_random_init=true", "checkpoint.interval=100000"),
        *(f"training.global_batch_size={BATCH}", "training.micro_batch_size=1", "optimizer.warmup_steps=1"),
        *("data.multimodal_fraction=0.5", "data.modality_warmup_steps=0"),
    ]


def paired_steps(
    out: Path,
    settings: list[str],
    variants: dict[str, tuple[str, ...]],
    *,
    processes: int,
    turns: int,
    steps: int,
) -> tuple[list[dict[str, Any]], float]:
    """Take steps of variants of the recipe in turn, in the same processes.

    Args:
        settings: overrides of all variants.
        variants: further overrides by name.

    Returns:
        All steps of the file, and the share of the machine that others used.
    """
    words = [word for name, own in variants.items() for word in ("--variant", name, *own)]
    command = [*launcher("launch.bench.engines.paired_steps", processes=processes), RECIPE, *settings]
    counts = ["--turns", str(turns), "--steps", str(steps), "--quick", str(QUICK), "--out", str(out)]
    others = watched([*command, "training.steps=100000", *words, *counts])
    return [json.loads(line) for line in out.read_text().splitlines()], others


def undisturbed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those steps around which all cores were quick."""
    quickest = min(row["probe_s"] for row in rows)
    return [row for row in rows if row["probe_s"] <= (1 + QUICK) * quickest]


def watched(command: list[str]) -> float:
    """Run a command to its end; returns the share of all cores that other programs used meanwhile."""
    busy, own, began = busy_seconds(), own_seconds(), time.monotonic()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    elapsed = (time.monotonic() - began) * (os.cpu_count() or 1)
    return max(0.0, (busy_seconds() - busy) - (own_seconds() - own)) / elapsed


def busy_seconds() -> float:
    """Seconds that all cores have computed since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Seconds that this program and its finished children have computed."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def how_quiet(used: list[float]) -> str:
    """A report's sentence on what else ran; `used`: shares of the machine in the repetitions that count."""
    calm = "undisturbed" if max(used) < QUIET else "DISTURBED"
    return f"Other programs used at most {max(used):.0%} of the machine meanwhile: {calm}."
