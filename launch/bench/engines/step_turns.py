"""Takes training steps of MegaVL and of transformers in turn, in one process; prints one JSON line for each kind.

Both sides hold the same weights and see the same batches, in fp32 on one thread. Neighbours on the machine slow both
down alike, so the ratio of the medians is what the report states.

    python -m launch.bench.engines.step_turns --model tiny --rounds 5
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from typing import Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import MegaVL, Side, Transformers, made_up_batches
from launch.bench.engines.step_work import TINY, make_work
from megavl.config.recipe import Compile, ParallelConfig
from megavl.parallel import groups

WARM_UP = 3
"""Steps of each side and kind that do not count: the first ones compile."""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TINY, default="tiny")
    parser.add_argument("--kind", nargs="+", choices=("text", "multimodal"), default=["text", "multimodal"])
    parser.add_argument("--compiled", choices=get_args(Compile), default="layers", help="training.compile of MegaVL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round")
    parser.add_argument("--nice", type=int, help="priority of the measured rounds; the compilers keep their own")
    parser.add_argument("--alone", action="store_true", help="only profile a step of MegaVL of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = make_work(
        arguments.model,
        part="whole",
        layers=0,
        micro_batches=2,
        recompute="none",
        precision="fp32",
        memory_bytes=None,
        compiled=arguments.compiled,
    )
    weights = random_tensors(work.recipe.model)
    groups.start(ParallelConfig(), seed=work.recipe.training.seed)
    settings: dict[str, Any] = {"marks": Marks(), "lr": 1e-6, "weights": weights}
    sides: dict[str, Side] = {"megavl": MegaVL(work, local=False, **settings)}
    if not arguments.alone:
        sides["transformers"] = Transformers(work, compiled=True, **settings)
    data = {
        (kind, name): side.prepare(made_up_batches(work, kind, steps=1)[0], kind)
        for kind in arguments.kind
        for name, side in sides.items()
    }
    losses = {key: float(sides[key[1]].step(batches)) for key, batches in data.items()}
    for key, batches in data.items():
        for _ in range(WARM_UP - 1):
            sides[key[1]].step(batches)
    if arguments.nice is not None:
        os.setpriority(os.PRIO_PROCESS, 0, arguments.nice)
    for kind in arguments.kind:
        parts = {name: parts_ms(side, data[kind, name]) for name, side in sides.items()}
        if arguments.alone:
            print(json.dumps({"kind": kind, "parts_ms": parts}), flush=True)
            continue
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(arguments.rounds):
            # The order changes, since the second side finds the first one's memory in the caches.
            for name in sorted(sides, reverse=bool(turn % 2)):
                seconds[name].append(median(sides[name], data[kind, name], steps=arguments.steps))
        ours, theirs = (statistics.median(seconds[name]) for name in sides)
        first, other = losses[kind, "megavl"], losses[kind, "transformers"]
        assert math.isclose(first, other, rel_tol=1e-5), f"{kind}: first losses {first} and {other} differ"
        rounds = [b / a for a, b in zip(*seconds.values())]
        found = {"model": arguments.model, "kind": kind, "compiled": arguments.compiled, "ratio": theirs / ours}
        found |= {"of_rounds": rounds, "seconds": seconds, "tokens": work.tokens, "load": os.getloadavg()[0]}
        found["parts_ms"] = parts
        print(json.dumps(found), flush=True)
    groups.stop()
    return 0


PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn", "mkldnn::", "mkl::"),
    "convolutions": ("aten::convolution", "aten::_slow_conv", "aten::thnn_conv"),
    "attention": ("aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "AdamW": ("aten::_fused_adam",),
    "compiled kernels": ("Torch-Compiled", "CompiledFxGraph", "## Call Compiled", "graph_", "cpp_fused", "torch::"),
}
"""Parts of a step by how the names of its operators begin."""


def parts_ms(side: Side, data: Any) -> dict[str, float]:
    """Milliseconds of a profiled step in its parts; an operator's own time, without the operators that it calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        side.step(data)
        whole = 1000 * (time.perf_counter() - began)
    found = dict.fromkeys([*PARTS, "other operators"], 0.0)
    for event in profiler.key_averages():
        part = next((name for name, starts in PARTS.items() if event.key.startswith(starts)), "other operators")
        found[part] += event.self_cpu_time_total / 1000
    return {**found, "between operators": max(0.0, whole - sum(found.values()))}


def median(side: Side, data: Any, *, steps: int) -> float:
    """Seconds of the middle one of some steps."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        side.step(data)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
