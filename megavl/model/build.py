"""From a recipe to this rank's module."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu

from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig, RecomputeConfig
from megavl.model.decoder import transformer_config
from megavl.model.trainable import freeze, part_of
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import cpu_runtime


def build_model(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    layout: str | None,
    dtype: torch.dtype,
    train: tuple[str, ...],
    seed: int,
) -> DeepseekVL:
    """This rank's stage, on its device, with random weights and the frozen groups marked.

    Args:
        model: sizes.
        parallel: tensor x pipeline sizes; process groups must exist.
        recompute: activation recompute.
        layout: megatron-core's layout string, None for one stage.
        dtype: dtype of the weights.
        train: groups of parameters that train.
        seed: seed of the initial weights.
    """
    config = transformer_config(model.llm, parallel=parallel, recompute=recompute, layout=layout, dtype=dtype)
    with torch.random.fork_rng(devices=[]):
        # Another seed for every stage: layers of two inner stages would otherwise start equal.
        torch.manual_seed(seed + 1000 * mpu.get_pipeline_model_parallel_rank())
        stage = DeepseekVL(
            config,
            model,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            recompute_vision=recompute.vision,
        )
    for parameter in stage.parameters():
        parameter.data = parameter.data.to(device=cpu_runtime.device(), dtype=dtype)
    for buffer in stage.buffers():
        buffer.data = buffer.data.to(device=cpu_runtime.device())
    freeze(stage, train=train)
    return stage


def count_parameters_on_meta(model: ModelConfig) -> dict[str, int]:
    """Parameters of every group, from the whole model built on the meta device: no memory, whatever its size.

    Args:
        model: sizes; a world of one process must have been started (`megavl.parallel.groups.start`).
    """
    config = transformer_config(
        model.llm, parallel=ParallelConfig(), recompute=RecomputeConfig(), layout=None, dtype=torch.float32
    )
    with torch.device("meta"):
        whole = DeepseekVL(config, model, pre_process=True, post_process=True)
    counts: dict[str, int] = {}
    for name, parameter in whole.named_parameters():
        assert parameter.is_meta, f"{name} was allocated"
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    return counts
