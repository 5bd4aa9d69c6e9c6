"""Times full training steps of one side on made-up batches: seconds, losses, memory, regions, and a profile.

Prints one JSON line for every kind of step. `launch/bench/step.py` calls it and writes the report.

    python -m launch.bench.engines.step_speed --side megavl --model tiny --part whole --kind text multimodal --steps 3
    python -m launch.bench.engines.step_speed --side transformers --model 1b --checkpointing --micro-batches 8
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from launch.bench.engines.peak_memory import peak_bytes, reset_peak
from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import SIDES, MegaVL, Side, Transformers, made_up_batches
from launch.bench.engines.step_work import MODELS, PARTS, TINY, Work, make_work
from megavl.config.recipe import Compile, ParallelConfig
from megavl.model import decoder
from megavl.model.engine_choice import check_engines
from megavl.parallel import groups
from megavl.planner.cost.flops import mfu
from megavl.planner.hardware.devices import USABLE_SHARE, known_device

DATA = 2
"""Steps for which batches are made; they are used in turn."""
OPERATORS = 15
"""Rows of the profile."""


def main() -> int:
    """Measure and print."""
    arguments = parse()
    if arguments.threads and not torch.cuda.is_available():
        torch.set_num_threads(arguments.threads)
    if arguments.precision == "fp32":
        # Convolutions would otherwise round to TF32 on CUDA.
        torch.backends.cudnn.allow_tf32 = False
    work = make_work(
        arguments.model,
        part=arguments.part,
        layers=arguments.layers,
        micro_batches=arguments.micro_batches,
        recompute=arguments.recompute,
        precision=arguments.precision,
        memory_bytes=device_bytes(),
        state="bf16" if arguments.half_state else "fp32",
        compiled="none" if arguments.uncompiled else arguments.compiled,
    )
    marks = Marks()
    side = build(work, arguments, marks=marks)
    for kind in arguments.kind:
        print(json.dumps(measure(side, work, kind, arguments=arguments, marks=marks)), flush=True)
    if arguments.side != "transformers":
        groups.stop()
    return 0


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, default="megavl")
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--part", choices=PARTS, default="whole", help="a pipeline stage's share of the model")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; 0: all, or as many as the device holds")
    parser.add_argument("--kind", nargs="+", choices=("text", "multimodal"), default=["text", "multimodal"])
    parser.add_argument("--micro-batches", type=int, default=2, help="sequences of a step")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none", help="of our decoder")
    parser.add_argument("--checkpointing", action="store_true", help="transformers' gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="transformers' model through torch.compile")
    parser.add_argument("--compiled", choices=get_args(Compile), default="auto", help="training.compile of MegaVL")
    parser.add_argument("--uncompiled", action="store_true", help="MegaVL without torch.compile")
    parser.add_argument("--rounded-gradients", action="store_true", help="MegaVL's weight gradients added after bf16")
    parser.add_argument("--half-state", action="store_true", help="optimizer.state_precision: bf16, MegaVL's")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--threads", type=int, help="threads on a CPU; default: torch's own")
    parser.add_argument(
        "--profile", type=Path, help="write a Chrome trace (.json.gz) of one more step of the last kind"
    )
    arguments = parser.parse_args(words)
    if arguments.side == "transformers" and arguments.part != "whole":
        parser.error("--side transformers: has no pipeline stages; use --part whole")
    if arguments.side == "transformers" and arguments.recompute != "none":
        parser.error("--recompute is MegaVL's; use --checkpointing")
    if arguments.side != "transformers" and (arguments.checkpointing or arguments.compile):
        parser.error("--checkpointing and --compile are transformers'; use --recompute")
    if arguments.side != "megavl" and (arguments.uncompiled or arguments.rounded_gradients or arguments.half_state):
        parser.error("--uncompiled, --rounded-gradients and --half-state are MegaVL's")
    if arguments.part == "last" and "multimodal" in arguments.kind:
        parser.error("--part last: sees no images; use --kind text")
    return arguments


def build(work: Work, arguments: argparse.Namespace, *, marks: Marks) -> Side:
    """The side. Tiny models have equal weights on all sides; large ones draw their own."""
    weights = random_tensors(work.recipe.model) if arguments.model in TINY else None
    if arguments.side == "transformers":
        options = {"checkpointing": arguments.checkpointing, "compiled": arguments.compile}
        return Transformers(work, marks=marks, lr=arguments.lr, weights=weights, **options)
    groups.start(ParallelConfig(), seed=work.recipe.training.seed)
    check_engines(work.recipe)
    local = arguments.side == "megatron-local"
    rounded = mock.patch.object(decoder, "fuses_weight_gradients", lambda: False)
    with rounded if arguments.rounded_gradients else contextlib.nullcontext():
        return MegaVL(work, marks=marks, lr=arguments.lr, local=local, weights=weights)


def measure(side: Side, work: Work, kind: str, *, arguments: argparse.Namespace, marks: Marks) -> dict[str, Any]:
    """Take the steps of one kind; returns the JSON line about them."""
    data = [side.prepare(batches, kind) for batches in made_up_batches(work, kind, steps=DATA)]
    losses: list[Any] = [side.step(data[step % DATA]) for step in range(arguments.warm_up)]
    reset_peak()
    marks.clear()
    for step in range(arguments.warm_up, arguments.warm_up + arguments.steps):
        losses.append(side.step(data[step % DATA]))
    marks.mark("end")
    steps = marks.steps()
    peak = peak_bytes()
    losses = [float(loss) for loss in losses]
    assert all(map(math.isfinite, losses)), f"losses {losses}"
    assert len(steps) == arguments.steps, f"{len(steps)} steps were marked"
    seconds = sorted(step["step"] for step in steps)
    middle = seconds[len(seconds) // 2]
    flops = work.flops(kind)
    vendor = vendor_peak(arguments.precision)
    found: dict[str, Any] = {
        "kind": kind,
        "layers": work.recipe.model.llm.num_layers,
        "tokens": work.tokens,
        "images": work.images(kind) * work.micro_batches,
        "flops": flops,
        "seconds": [step["step"] for step in steps],
        "step_s": middle,
        "tokens_per_s": work.tokens / middle,
        "flops_per_s": flops / middle,
        "mfu": None if vendor is None else mfu(flops, seconds=middle, devices=1, peak_flops=vendor),
        "peak_bytes": peak,
        "planned_bytes": work.memory().total,
        "update_bytes": side.update_bytes(kind),
        "losses": losses,
        "regions": None if arguments.compile else regions(steps),
    }
    if arguments.profile and kind == arguments.kind[-1]:
        found["profile"] = profile(side, data[0], arguments.profile)
    return found


def regions(steps: list[dict[str, float]]) -> dict[str, float]:
    """Share of the measured time that went into each region."""
    whole = sum(step["step"] for step in steps)
    return {name: sum(step[name] for step in steps) / whole for name in steps[0] if name != "step"}


def profile(side: Side, data: Any, path: Path) -> dict[str, Any]:
    """One step under torch's profiler: its trace as a file, its largest operators, and the device's idle share."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found, record_function("training step"):
        side.step(data)
        if on_cuda:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(path))
    name = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    # Annotations, such as the optimizer's, span kernels and the pauses between them.
    rows = [row for row in found.key_averages() if getattr(row, name) > 0 and not row.is_user_annotation]
    if on_cuda:
        rows = [row for row in rows if row.device_type == DeviceType.CUDA]
    rows.sort(key=lambda row: -getattr(row, name))
    whole = sum(getattr(row, name) for row in rows)
    out: dict[str, Any] = {
        "trace": str(path),
        "clock": "CUDA kernels" if on_cuda else "CPU operators, their own time",
        "milliseconds": whole / 1000,
        "operators": [
            {
                "name": row.key,
                "calls": row.count,
                "ms": getattr(row, name) / 1000,
                "share": getattr(row, name) / whole,
            }
            for row in rows[:OPERATORS]
        ],
        "idle": None,
    }
    if on_cuda:
        kernels = [
            (event.time_range.start, event.time_range.end)
            for event in found.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        out["idle"] = idle_share(kernels)
    return out


def idle_share(intervals: list[tuple[float, float]]) -> float:
    """Share of the time from the first interval's begin to the last one's end that none covers."""
    busy, until = 0.0, -math.inf
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - min(start for start, _ in intervals))


def device_bytes() -> float | None:
    """Memory that the planner may fill; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return USABLE_SHARE * torch.cuda.get_device_properties(0).total_memory


def vendor_peak(precision: str) -> float | None:
    """FLOP/s by the planner's table of devices; None for a device that it does not know."""
    if not torch.cuda.is_available():
        return None
    row = known_device(torch.cuda.get_device_name())
    return row.peak_flops.get(precision) if row else None


if __name__ == "__main__":
    sys.exit(main())
