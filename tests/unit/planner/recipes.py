"""Recipes and plans that the planner's tests share."""

from __future__ import annotations

from typing import Any

from megavl.config.data import DataConfig, SourceConfig
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.config.recipe import (
    TRAINABLE_PARTS,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    RecomputeConfig,
    TrainingConfig,
)
from megavl.config.run import RunConfig
from megavl.planner.cost.blocks import decoder_layer_blocks, embedding_block, head_block, vision_blocks
from megavl.planner.cost.work import BlockWork, embedding_work, head_work, layer_work, vision_work
from megavl.planner.hardware.devices import DEVICES
from megavl.planner.layouts.layout import layout_of
from megavl.planner.plan import Plan, plan_scenario
from megavl.planner.scenario import Kind, Scenario, make_scenario
from megavl.planner.simulation.times import DeviceTimes, TimeSource


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each row of `TRAINABLE_PARTS` by the planner's blocks; rows that the model lacks hold 0."""
    counts = dict.fromkeys(TRAINABLE_PARTS, 0)
    layers = model.llm.num_layers * decoder_layer_blocks(model.llm)
    for block in (*vision_blocks(model), embedding_block(model.llm), *layers, head_block(model.llm)):
        counts[block.part] += block.parameters
    return counts


def recipe_of(
    preset: str = "7b",
    *,
    fraction: float = 0.3,
    stage: int = 2,
    train: tuple[str, ...] | None = None,
    batch: int = 64,
    micro: int = 1,
    precision: str = "bf16",
    warmup: int = 0,
    steps: int = 10,
    recompute: RecomputeConfig | None = None,
    layers: int | None = None,
    **parallel: Any,
) -> Recipe:
    """A small recipe; further arguments are `parallel.*` keys."""
    model = load_model_config(preset, **({} if layers is None else {"llm": {"num_layers": layers}}))
    return Recipe(
        model=model,
        parallel=ParallelConfig(**parallel),
        recompute=recompute or RecomputeConfig(),
        optimizer=OptimizerConfig(lr=1e-4),
        data=DataConfig(
            sources=(SourceConfig(path="data"),),
            tokenizer="tok",
            seq_length=4096 if preset in ("1b", "7b") else 512,
            multimodal_fraction=fraction,
            modality_warmup_steps=warmup,
        ),
        training=TrainingConfig(
            stage=stage,  # type: ignore[arg-type]
            train=train,
            steps=steps,
            global_batch_size=batch,
            micro_batch_size=micro,
            precision=precision,  # type: ignore[arg-type]
        ),
        run=RunConfig(dir="run"),
    )


def all_work(scenario: Scenario, kind: Kind) -> tuple[BlockWork, ...]:
    """Every block in the order of the data; vision blocks of one image, the others of one micro-batch."""
    images = vision_work(scenario, kind) if kind == "multimodal" else ()
    return (*images, embedding_work(scenario, kind), layer_work(scenario, kind), head_work(scenario, kind))


def plan_recipe(
    recipe: Recipe,
    *,
    devices: int,
    device: str = "h200",
    times: TimeSource | None = None,
    images: float | None = None,
) -> Plan:
    """Plan `recipe` as `megavl plan` does for these arguments."""
    hardware = DEVICES[device]
    scenario = make_scenario(recipe, devices=devices, images=images)
    source = times or DeviceTimes(device=hardware)
    layout = layout_of(scenario, source, memory_bytes=hardware.usable_bytes)
    return plan_scenario(scenario, layout, source, hardware)
