"""What a measured training step consists of: recipe, part of the model, decoder layers, FLOPs, and what fits a device.

A part is what one pipeline stage holds. `whole` has the vision side, the embedding, the decoder layers and the head;
`first` lacks the head; `last` has layers and head alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from launch.bench.programs import ROOT
from megavl.config.load import load_recipe
from megavl.config.recipe import Compile, Recipe
from megavl.planner.cost.blocks import head_block
from megavl.planner.cost.flops import MFU_CONVENTION, active_parts, step_flops, train_flops
from megavl.planner.cost.memory import RankMemory, rank_memory
from megavl.planner.scenario import PACKED_IMAGES, make_scenario

PARTS = ("whole", "first", "last")
MODELS = {
    "1b": ("1b", "1b"),
    "7b": ("7b", "7b"),
    "tiny": ("tiny", "tiny-hybrid"),
    "tiny-siglip": ("tiny", "tiny-siglip"),
    "small": ("tiny", "small"),
}
"""Folder of the recipe and preset of the sizes."""
TINY = ("tiny", "tiny-siglip", "small")
"""Small enough for equal weights on all sides."""
LENGTHS = {"small": 1024}
"""Tokens of a sequence where they are not the recipe's: five images then fill as much of it as in the 7B, 70%."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One measured step, without its modality."""

    recipe: Recipe
    """Recipe of the second training stage, on one device, with this part's number of layers."""
    part: str
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_batches * self.recipe.data.seq_length

    def images(self, kind: str) -> int:
        """Images of a micro-batch: as many as packing allows, or none."""
        return PACKED_IMAGES if kind == "multimodal" else 0

    def flops(self, kind: str) -> int:
        """Model FLOPs of a step by the planner's formula, without the blocks that this part lacks."""
        recipe = self.recipe
        images = 0 if self.part == "last" else self.images(kind) * self.micro_batches
        found = step_flops(
            recipe.model,
            seq_length=recipe.data.seq_length,
            sequences=self.micro_batches,
            images=images,
            trainable_parts=recipe.trainable_parts,
        )
        if self.part == "first":
            trainable = active_parts(recipe.trainable_parts, images=images)
            found -= train_flops([head_block(recipe.model.llm, tokens=self.tokens)], trainable=trainable)
        return found

    def memory(self) -> RankMemory:
        """Memory that the planner expects for the part, bytes."""
        # The planner sees a part as one of two stages; the other stage holds one layer.
        llm, stages = self.recipe.model.llm, 1 if self.part == "whole" else 2
        layout = {"whole": (llm.num_layers,), "first": (llm.num_layers, 1), "last": (1, llm.num_layers)}[self.part]
        llm = dataclasses.replace(llm, num_layers=sum(layout))
        recipe = dataclasses.replace(
            self.recipe,
            model=dataclasses.replace(self.recipe.model, llm=llm),
            parallel=dataclasses.replace(self.recipe.parallel, pipeline=stages),
            training=dataclasses.replace(self.recipe.training, global_batch_size=1),
        )
        return rank_memory(
            make_scenario(recipe, images=PACKED_IMAGES), stages - 1 if self.part == "last" else 0, layout
        )


def make_work(
    model: str,
    *,
    part: str,
    layers: int,
    micro_batches: int,
    recompute: str,
    precision: str,
    memory_bytes: float | None,
    state: str = "fp32",
    compiled: Compile = "auto",
) -> Work:
    """The work of a case.

    Args:
        layers: decoder layers; 0 for as many as the model has and `memory_bytes` holds.
        micro_batches: sequences of a step.
        memory_bytes: memory that the planner may fill; None: not bounded.
        state: `optimizer.state_precision`.
        compiled: what torch.compile is used for in MegaVL.
    """
    folder, preset = MODELS[model]
    overrides = [
        f"model.preset={preset}",
        f"recompute.granularity={recompute}",
        f"training={{stage: 2, steps: 1000, global_batch_size: {micro_batches}, precision: {precision}}}",
        f"training.compile={compiled}",
        *([f"data.seq_length={LENGTHS[model]}"] if model in LENGTHS else []),
        "training.micro_batch_size=1",
        f"optimizer={{lr: 1.0e-3, schedule: constant, warmup_steps: 0, state_precision: {state}}}",
        "parallel={tensor: 1, pipeline: 1, sequence_parallel: false, layout: auto, vision: recompute}",
    ]
    recipe = load_recipe(ROOT / f"launch/recipes/{folder}/stage2.yaml", overrides=overrides)
    most = recipe.model.llm.num_layers

    def of(count: int) -> Work:
        llm = dataclasses.replace(recipe.model.llm, num_layers=count)
        model = dataclasses.replace(recipe.model, llm=llm)
        return Work(recipe=dataclasses.replace(recipe, model=model), part=part, micro_batches=micro_batches)

    if layers:
        return of(min(layers, most))
    fitting = [n for n in range(1, most + 1) if memory_bytes is None or of(n).memory().total <= memory_bytes]
    if not fitting:
        raise SystemExit(f"error: {model} {part}: not even one layer fits {memory_bytes:,} bytes")
    return of(max(fitting))


def plan(model: str, part: str, *, memory_bytes: float) -> dict[str, Any]:
    """Layers and bytes of a part on a device, in bf16 without recompute."""
    words: dict[str, Any] = {"micro_batches": 1, "recompute": "none", "precision": "bf16"}
    work = make_work(model, part=part, layers=0, memory_bytes=memory_bytes, **words)
    whole = make_work(model, part="whole", layers=0, memory_bytes=None, **words)
    return {
        "layers": work.recipe.model.llm.num_layers,
        "of_layers": whole.recipe.model.llm.num_layers,
        "bytes": {**dataclasses.asdict(work.memory()), "peak": work.memory().total},
        "usable_bytes": memory_bytes,
        "convention": MFU_CONVENTION,
    }
