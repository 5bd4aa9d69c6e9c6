"""Training steps of one recipe under several settings, by turns in the same processes.

Virtual cores, one or both, slow down by half for up to seconds at a time, for reasons that are not seen from inside.
So before and after every step all cores run the same short loop, steps wait a while for it to be quick, and a step is
undisturbed where it was quick before and after. What happens within a longer step is seen by a still shorter loop at
every micro-batch, of each rank by itself. Ranks change their cores from turn to turn. All data are loaded before
the first turn, for decoding processes would take time from ranks that fill their cores. Every step is recorded. Rank 0
writes one JSON line a step.

    python -m torch.distributed.run --nproc-per-node 2 -m launch.bench.engines.paired_steps \
        launch/recipes/tiny/stage2.yaml \
        data.root=... --variant even "parallel.layout=[2,2]" --variant other "parallel.layout=[1,3]" \
        --quick 0.25 --out steps.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megavl.config.load import load_recipe
from megavl.config.recipe import Recipe
from megavl.data.batch import Batch
from megavl.data.mixture import recipe_mixture
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import open_tokenizer
from megavl.model.build import BuildSpec
from megavl.parallel import broadcast, groups
from megavl.planner.hardware.devices import find_device
from megavl.planner.layouts.check import checked_layout
from megavl.planner.layouts.layout import layout_string
from megavl.planner.scenario import make_scenario
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.open_data import recipe_dataset, step_loader
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.profile.step_profiler import Record, StepProfiler
from megavl.train.step import train_step

WARM_UP = 1
"""Turns that do not count."""
PROBE = 4096
"""Numbers that the loop multiplies: they stay in a core's first cache."""
GLANCE = 200
"""Repetitions of the multiplication after a forward pass: 0.2 ms."""
PATIENCE = 150
"""Loops in a row that a step waits for quick cores."""


class Variant:
    """A model under its settings, and the data of all its steps."""

    def __init__(self, recipe: Recipe, *, position: groups.Position, probe: Probe, steps: int) -> None:
        self.position, self.probe = position, probe
        self.split_all, self.number = recipe.parallel.vision == "split_all", 0
        layout = checked_layout(make_scenario(recipe, devices=position.world_size), find_device("cpu"))
        self.model = build_model_chunks(BuildSpec.of(recipe, layout=layout_string(layout)))
        self.optimizer = build_optimizer(self.model, optimizer=recipe.optimizer, bf16=False)
        set_learning_rate(self.optimizer, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
        self.glances: list[float] = []
        for chunk in self.model.chunks:
            # Behind the forward pass: before it, a core that has waited would only just be waking.
            chunk.module.register_forward_hook(lambda *_: self.glances.append(probe.glance()))
        self.data = Loaded(recipe, position=position, steps=steps) if broadcast.is_source() else None

    def step(self) -> dict[str, Any]:
        """The next step, timed to the end of its update. Collective."""
        data = next_step(self.data, self.number, split_all=self.split_all)
        self.number += 1
        before = self.probe.when_quick()
        self.glances.clear()
        recorder = StepProfiler(self.model, position=self.position)
        began = time.perf_counter()
        result = train_step(self.model, self.optimizer, data, stop_flag=False)
        seconds = time.perf_counter() - began
        assert not result.skipped, f"loss {result.loss}: the step was skipped"
        record = recorder.stop()
        probes = max(before, self.probe())
        found: list[tuple[Record | None, list[float]]] = [(None, [])] * self.position.world_size
        dist.all_gather_object(found, (record, self.glances))
        boxes = [
            {"rank": box.rank, "what": box.what, "micro_batch": box.micro_batch, "seconds": box.end - box.start}
            for record, _ in found
            if record is not None
            for box in record.segments
        ]
        row = {"modality": data.modality, "images": result.images, "seconds": seconds, "probe_s": probes}
        return {**row, "glances_s": [glances for _, glances in found], "segments": boxes}


class Loaded:
    """Steps that are already in memory."""

    def __init__(self, recipe: Recipe, *, position: groups.Position, steps: int) -> None:
        dataset = recipe_dataset(recipe, tokenizer=open_tokenizer(recipe.data.tokenizer), skip_hash=True)
        sampler = Sampler(dataset.counts, mixture=recipe_mixture(recipe, dataset.counts))
        loader = step_loader(recipe, dataset, sampler, position=position)
        self.steps = [loader.get(step) for step in range(steps)]
        loader.close()

    def get(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of a step."""
        return self.steps[step]


class Probe:
    """The short loop, on all cores at once."""

    def __init__(self, *, tolerance: float) -> None:
        # Not with torch, whose calls take longer than such a product where CUDA names are redirected.
        self.numbers, self.out = np.full(PROBE, 0.5, np.float32), np.empty(PROBE, np.float32)
        self.tolerance, self.quickest = tolerance, math.inf

    def __call__(self) -> float:
        """Seconds of the slowest core. Collective."""
        dist.barrier()
        seconds = torch.zeros(1)
        if dist.get_rank() < (os.cpu_count() or 1):
            seconds += self.multiply(2 * PROBE)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.quickest = min(self.quickest, float(seconds))
        return float(seconds)

    def glance(self) -> float:
        """Seconds of a short stretch of it, on this core alone."""
        self.multiply(GLANCE // 8)  # fills the cache
        return self.multiply(GLANCE)

    def multiply(self, times: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        for _ in range(times):
            np.multiply(self.numbers, self.numbers, out=self.out)
        return time.perf_counter() - began

    def when_quick(self) -> float:
        """As soon as all cores are quick, or patience ends. Collective."""
        # Without a pause: a core that wakes is seldom quick at first.
        for _ in range(PATIENCE):
            seconds = self()
            if seconds <= (1 + self.tolerance) * self.quickest:
                break
        return seconds


def main() -> None:
    """Take all turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("override", nargs="*", help="of all variants")
    parser.add_argument("--variant", nargs="+", action="append", required=True, help="name, then its overrides")
    parser.add_argument("--turns", type=int, default=10, help="that count")
    parser.add_argument("--steps", type=int, default=2, help="of each variant in a turn")
    parser.add_argument(
        "--quick", type=float, required=True, help="by which a loop may be slower than the quickest and count as quick"
    )
    parser.add_argument("--out", type=Path, required=True, help="goes on at its end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipes = {
        name: load_recipe(arguments.recipe, overrides=[*arguments.override, *own]) for name, *own in arguments.variant
    }
    recipe = next(iter(recipes.values()))
    position = groups.start(recipe.parallel, seed=recipe.training.seed)
    count = (WARM_UP + arguments.turns) * arguments.steps
    probe = Probe(tolerance=arguments.quick)
    variants = {name: Variant(recipe, position=position, probe=probe, steps=count) for name, recipe in recipes.items()}
    cores = sorted(os.sched_getaffinity(0))
    with arguments.out.open("a") if position.rank == 0 else open(os.devnull, "w") as out:
        for turn in range(-WARM_UP, arguments.turns):
            os.sched_setaffinity(0, {cores[(position.rank + turn) % len(cores)]})
            for name, variant in variants.items():
                for _ in range(arguments.steps):
                    row = {"turn": turn, "variant": name, **variant.step()}
                    if turn >= 0:
                        out.write(json.dumps(row) + "\n")
    groups.stop()


if __name__ == "__main__":
    main()
