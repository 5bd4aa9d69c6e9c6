"""Predicted against measured step time of the tiny model on this machine's CPU, by layout and modality.

Calibrates on one rank and on as many as compute at once, then trains a few steps under each layout, everything several
times in turns. What else runs on the machine is watched, and of the repetitions of one thing the fastest counts: a
virtual machine's neighbours slow it down by a tenth or more and are seen nowhere else.
Writes `launch/bench/results/plan_cpu_<YYYYMM>.md`.

    python launch/bench/plan_cpu.py [--repetitions 3] [--steps 24] [--work runs/plan_cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "launch/recipes/tiny/stage2.yaml"
SEQ_LENGTH, IMAGES, BATCH = 512, 8, 8
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
KINDS = ("text", "multimodal")
WARM_UP = 4
"""Steps of a run that do not count."""
QUICK = 0.25
"""By which the loop before and after a step may be slower than the quickest of all."""
UNDISTURBED = (
    "the ranks change cores after every turn. Cores of a virtual machine slow down by half for up to seconds at a "
    "time, for reasons not seen from inside, so a short loop runs on all cores before and after every step: a step "
    "waits about a second for it to be quick, and counts as undisturbed where the slower loop took at most "
    f"{QUICK:.0%} longer than the quickest of all."
)
"""What reports say of `paired_steps`."""
QUIET = 0.1
"""Share of the machine that others may use for a repetition to count as undisturbed."""


@dataclass
class Measured:
    """Repetitions of one thing."""

    seconds: Callable[[Any], float]
    """By which the fastest is found."""
    values: list[dict[str, Any]] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    """Share of the machine that other programs used meanwhile."""

    def best(self) -> tuple[dict[str, Any], float]:
        """The fastest repetition."""
        index = min(range(len(self.values)), key=lambda number: self.seconds(self.values[number]))
        return self.values[index], self.others[index]


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
    calibrations = {key: Measured(block_seconds) for key in CALIBRATIONS}
    layouts = {name: Measured(lambda value: sum(value.values())) for name in LAYOUTS}
    for turn in range(arguments.repetitions):
        for (tensor, processes), found in calibrations.items():
            path = arguments.work / f"calibration-{tensor}-{processes}-{turn}.json"
            found.others.append(calibrate(path, settings, tensor=tensor, processes=processes))
            found.values.append(json.loads(path.read_text()))
            print(f"turn {turn}: calibration {tensor}, {processes}: others {found.others[-1]:.0%}", flush=True)
        for name, found in layouts.items():
            value, others = train(arguments.work / "run", settings, LAYOUTS[name], steps=arguments.steps)
            found.values.append(value)
            found.others.append(others)
            print(f"turn {turn}: {name}: {value}, others {others:.0%}", flush=True)
    whole = arguments.work / "calibration.json"
    whole.write_text(json.dumps(merged(calibrations)))
    rows, errors = [], []
    for name, found in layouts.items():
        value, others = found.best()
        predicted = predict(whole, settings, LAYOUTS[name])
        shared = ranks_of(LAYOUTS[name]) > (os.cpu_count() or 1)
        for kind in KINDS:
            error = predicted[kind] / value[kind] - 1
            errors += [] if shared else [error]
            mark = " (*)" if shared else ""
            rows.append(
                f"| {name}{mark} | {kind} | {predicted[kind]:.3f} | {value[kind]:.3f} | {error:+.1%} | {others:.0%} |"
            )
            print(rows[-1], flush=True)
    path = ROOT / "launch/bench/results" / f"plan_cpu_{time.strftime('%Y%m')}.md"
    path.write_text(report(rows, errors, calibrations, layouts, arguments), encoding="utf-8")
    print(path)
    return 0


def build_data(work: Path, *, images: int = IMAGES, seq_length: int = SEQ_LENGTH) -> list[str]:
    """A corpus whose multimodal sequences all hold so many images; the overrides that every run shares."""
    tool("build_corpus.py", "demo", "--output", work / "corpus", "--samples", 600)
    tool(
        *("preprocess.py", "--input", work / "corpus/text.jsonl", work / "corpus/captions.jsonl"),
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


def calibrate(path: Path, settings: list[str], *, tensor: int, processes: int) -> float:
    """Measure blocks; the share of the machine that others used."""
    sizes = [f"parallel.tensor={tensor}", "parallel.pipeline=1", "parallel.layout=auto"]
    command = [*launcher(processes), "plan", RECIPE, *settings, *sizes, "--calibrate", str(path), "--repeats", "24"]
    return watched(command)


def train(run: Path, settings: list[str], layout: list[str], *, steps: int) -> tuple[dict[str, float], float]:
    """Lower quartile of the step time by modality, and the share of the machine that others used."""
    shutil.rmtree(run, ignore_errors=True)
    command = [*launcher(ranks_of(layout)), "train", RECIPE, *settings, *layout]
    others = watched([*command, f"training.steps={steps}", f"run.dir={run}"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
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


def block_seconds(calibration: dict[str, Any]) -> float:
    """Of a decoder layer, over both kinds of step."""
    (entry,) = calibration["entries"]
    return sum(entry[kind]["layer"][way] for kind in KINDS for way in ("forward", "backward"))


def predict(calibration: Path, settings: list[str], layout: list[str]) -> dict[str, float]:
    """Step time by modality as `megavl plan` says."""
    options = ["--device", "cpu", "--calibration", str(calibration), "--images", str(IMAGES), "--json"]
    command = [sys.executable, "-m", "megavl", "plan", RECIPE, *settings, *layout, *options]
    done = subprocess.run(command, check=True, env=environment(), capture_output=True, text=True)
    raw = json.loads(done.stdout)
    return {kind: raw[kind]["seconds"] for kind in KINDS}


def merged(calibrations: dict[tuple[int, int], Measured]) -> dict[str, Any]:
    """One file of the fastest repetitions."""
    best = [found.best()[0] for found in calibrations.values()]
    return {**best[0], "entries": [entry for raw in best for entry in raw["entries"]]}


def launcher(processes: int, module: str = "megavl") -> list[str]:
    """Start of a command on a number of ranks."""
    port = random.SystemRandom().randint(12000, 31999)
    return [
        *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--master-port", str(port), "-m", module),
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
    """Steps of variants of the recipe by turns in the same processes, and the share of the machine that others used.

    Returns:
        All steps of the file, at whose end these were put.
    """
    words = [word for name, own in variants.items() for word in ("--variant", name, *own)]
    command = [
        *launcher(processes, "launch.bench.engines.paired_steps"),
        RECIPE,
        *settings,
        "training.steps=100000",
        *words,
    ]
    counts = ["--turns", str(turns), "--steps", str(steps), "--quick", str(QUICK)]
    others = watched([*command, *counts, "--out", str(out)])
    return [json.loads(line) for line in out.read_text().splitlines()], others


def undisturbed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of these steps, those around which all cores were quick."""
    quickest = min(row["probe_s"] for row in rows)
    return [row for row in rows if row["probe_s"] <= (1 + QUICK) * quickest]


def hardware() -> str:
    """For names of reports."""
    return f"{platform.machine()}-{os.cpu_count()}cores"


def watched(command: list[str]) -> float:
    """Run to the end; the share of all cores that other programs used meanwhile."""
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


def environment() -> dict[str, str]:
    """One thread a rank, no GPU."""
    fixed = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **fixed}


def tool(script: str, *arguments: Any) -> None:
    """Run one of the data tools."""
    command = [sys.executable, f"data_tools/{script}", *map(str, arguments)]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def how_quiet(used: list[float]) -> str:
    """The sentence of a report on what else ran: shares of the machine while those things were measured that count."""
    calm = "undisturbed" if max(used) < QUIET else "DISTURBED"
    return f"Other programs used at most {max(used):.0%} of the machine meanwhile: {calm}."


def report(
    rows: list[str],
    errors: list[float],
    calibrations: dict[tuple[int, int], Measured],
    layouts: dict[str, Measured],
    arguments: argparse.Namespace,
) -> str:
    """Markdown with the command, versions, and how quiet the machine was."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    sizes = [abs(error) for error in errors]
    used = [found.best()[1] for found in (*calibrations.values(), *layouts.values())]
    lines = [
        "# Planner against measurement on the CPU",
        "",
        f"`python launch/bench/plan_cpu.py --repetitions {arguments.repetitions} --steps {arguments.steps}`; "
        f"Python {platform.python_version()}, {versions}; {platform.machine()}, {os.cpu_count()} cores, gloo, fp32, "
        "one thread a rank.",
        f"Recipe `{RECIPE}`: {BATCH} sequences of {SEQ_LENGTH} tokens a step in micro-batches of one, {IMAGES} images "
        "in every multimodal sequence.",
        f"Predicted: `megavl plan --calibration`, from blocks measured with {CALIBRATIONS} (tensor, processes). "
        f"Measured: lower quartile of the steps after {WARM_UP}.",
        f"{arguments.repetitions} repetitions in turns; of each thing the fastest counts. {how_quiet(used)}",
        "",
        "| layout | step | predicted s | measured s | error | used by others |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Mean error {statistics.mean(sizes):.1%} (goal 10%), worst {max(sizes):.1%} (goal 20%), over {len(sizes)} "
        "combinations. (*) More ranks than cores: left out.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
