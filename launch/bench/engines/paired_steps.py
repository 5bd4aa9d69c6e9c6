"""Takes training steps of one recipe under several settings, in turn and in the same processes.

Virtual cores slow down by half for up to seconds at a time, for reasons not visible from inside. So all cores run the
same short loop before and after every step: the probe. A step waits a while for a quick probe, and it counts as
undisturbed where the probes before and after it were quick. A still shorter loop at every micro-batch shows each rank
what happens within a longer step. Ranks change their cores from turn to turn.

All data are loaded before the first turn, since decoding processes would take time from the ranks. Rank 0 writes one
JSON line for every step.

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
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.check import checked_layout
from megavl.planner.layouts.layout import layout_string
from megavl.planner.scenario import make_scenario
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.open_data import recipe_dataset, step_loader
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.profile.step_profiler import Record, StepProfiler
from megavl.train.step import train_step
from megavl.weights.dtypes import DTYPE_OF_PRECISION

WARM_UP = 1
"""Turns that do not count."""
PROBE = 4096
"""Numbers that the loop multiplies; they fit the first cache of a core."""
SHORT_PROBE = 200
"""Repetitions in the loop after a forward pass, which takes 0.2 ms."""
PATIENCE = 150
"""Most probes that a step waits for quick cores."""


class Variant:
    """A model under its settings, and the data of all its steps."""

    def __init__(self, recipe: Recipe, *, position: groups.Position, probe: Probe, steps: int) -> None:
        self.position, self.probe = position, probe
        self.split_all, self.number = recipe.parallel.vision == "split_all", 0
        layout = checked_layout(make_scenario(recipe, devices=position.world_size), DEVICES["cpu"])
        self.model = build_model_chunks(
            BuildSpec.of(recipe, layout=layout_string(layout), dtype=DTYPE_OF_PRECISION[recipe.training.precision])
        )
        self.optimizer = build_optimizer(self.model, optimizer=recipe.optimizer, bf16=False)
        set_learning_rate(self.optimizer, lr=recipe.optimizer.lr, weight_decay=recipe.optimizer.weight_decay)
        self.short_probes: list[float] = []
        for chunk in self.model.chunks:
            # After the forward pass: before it, a core that has waited would only just be waking.
            chunk.module.register_forward_hook(lambda *_: self.short_probes.append(probe.short()))
        self.data = Loaded(recipe, position=position, steps=steps) if broadcast.is_source() else None

    def step(self) -> dict[str, Any]:
        """The next step, timed to the end of its update. Collective."""
        data = next_step(self.data, self.number, split_all=self.split_all)
        self.number += 1
        before = self.probe.when_quick()
        self.short_probes.clear()
        profiler = StepProfiler(self.model, position=self.position)
        began = time.perf_counter()
        result = train_step(self.model, self.optimizer, data, stop_flag=False)
        seconds = time.perf_counter() - began
        assert not result.skipped, f"loss {result.loss}: the step was skipped"
        record = profiler.stop()
        probes = max(before, self.probe())
        found: list[tuple[Record | None, list[float]]] = [(None, [])] * self.position.world_size
        dist.all_gather_object(found, (record, self.short_probes))
        boxes = [
            {"rank": box.rank, "what": box.what, "micro_batch": box.micro_batch, "seconds": box.end - box.start}
            for record, _ in found
            if record is not None
            for box in record.segments
        ]
        row = {"modality": data[0].modality, "images": result.images, "seconds": seconds, "probe_s": probes}
        return {**row, "short_probes_s": [short_probes for _, short_probes in found], "segments": boxes}


class Loaded:
    """Steps whose batches are in memory."""

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
    """The short loop."""

    def __init__(self, *, tolerance: float) -> None:
        # With numpy: a call of torch would take longer than such a product.
        self.numbers, self.out = np.full(PROBE, 0.5, np.float32), np.empty(PROBE, np.float32)
        self.tolerance, self.quickest = tolerance, math.inf

    def __call__(self) -> float:
        """Run the loop on all cores; returns the seconds of the slowest. Collective."""
        dist.barrier()
        seconds = torch.zeros(1)
        if dist.get_rank() < (os.cpu_count() or 1):
            seconds += self.multiply(2 * PROBE)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        self.quickest = min(self.quickest, float(seconds))
        return float(seconds)

    def short(self) -> float:
        """Run a shorter loop on this core; returns its seconds."""
        self.multiply(SHORT_PROBE // 8)  # fills the cache
        return self.multiply(SHORT_PROBE)

    def multiply(self, times: int) -> float:
        """Multiply; returns the seconds."""
        began = time.perf_counter()
        for _ in range(times):
            np.multiply(self.numbers, self.numbers, out=self.out)
        return time.perf_counter() - began

    def when_quick(self) -> float:
        """Repeat the loop until all cores are quick or `PATIENCE` ends. Collective."""
        # There is no pause, since a core that wakes is seldom quick at first.
        for _ in range(PATIENCE):
            seconds = self()
            if seconds <= (1 + self.tolerance) * self.quickest:
                break
        return seconds


def main() -> None:
    """Take all turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("override", nargs="*", help="overrides of all variants")
    parser.add_argument("--variant", nargs="+", action="append", required=True, help="name, then its overrides")
    parser.add_argument("--turns", type=int, default=10, help="turns after those that warm up")
    parser.add_argument("--steps", type=int, default=2, help="steps of each variant in a turn")
    parser.add_argument(
        "--quick", type=float, required=True, help="how much slower than the quickest a loop may be and count as quick"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended")
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
