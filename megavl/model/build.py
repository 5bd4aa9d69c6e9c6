"""From a recipe to this rank's module."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from torch import nn

from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig, RecomputeConfig
from megavl.model.decoder import transformer_config
from megavl.model.trainable import freeze, part_of
from megavl.model.vision import VisionTowers
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
    """`build_stages` for a pipeline rank that has one stage."""
    (stage,) = build_stages(
        model, parallel=parallel, recompute=recompute, layout=layout, dtype=dtype, train=train, seed=seed
    )
    return stage


def build_stages(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    layout: str | None,
    dtype: torch.dtype,
    train: tuple[str, ...],
    seed: int,
) -> list[DeepseekVL]:
    """This rank's stages, on its device, with random weights and the frozen groups marked.

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
        stages = []
        for index in range(parallel.virtual_pipeline):
            # Another seed for every stage: layers of two inner stages would otherwise start equal.
            place = index * mpu.get_pipeline_model_parallel_world_size() + mpu.get_pipeline_model_parallel_rank()
            torch.manual_seed(seed + 1000 * place)
            stages.append(
                DeepseekVL(
                    config,
                    model,
                    pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=index),
                    post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=index),
                    recompute_vision=recompute.vision,
                    placement=parallel.vision,
                    vp_stage=index if parallel.virtual_pipeline > 1 else None,
                )
            )
    for stage in stages:
        settle(stage, dtype=dtype)
        freeze(stage, train=train)
    return stages


def build_towers(model: ModelConfig, *, dtype: torch.dtype, train: tuple[str, ...], recompute: bool) -> VisionTowers:
    """The vision towers alone on this rank's device, without meaningful weights, the frozen groups marked."""
    towers = VisionTowers(model, recompute=recompute)
    settle(towers, dtype=dtype)
    freeze(towers, train=train, prefix="vision.")
    return towers


def settle(module: nn.Module, *, dtype: torch.dtype) -> None:
    """Move a module to this rank's device and its weights to a type; buffers keep theirs."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device=cpu_runtime.device(), dtype=dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device=cpu_runtime.device())


def build_to_generate(
    model: ModelConfig, *, parallel: ParallelConfig, layout: str | None, dtype: torch.dtype
) -> DeepseekVL:
    """This rank's stage for inference, frozen and in eval mode; its weights are allocated and wait for their values.

    Drawing random weights first would take a minute for the 7B, so the modules are made on the meta device.

    Args:
        model: sizes.
        parallel: tensor x pipeline sizes; process groups must exist.
        layout: megatron-core's layout string, None for one stage.
        dtype: dtype of the weights.
    """
    config = transformer_config(
        model.llm, parallel=parallel, recompute=RecomputeConfig(), layout=layout, dtype=dtype, generates=True
    )
    with torch.device("meta"):
        stage = DeepseekVL(
            config,
            model,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            generates=True,
        )
    for module in stage.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=cpu_runtime.device())
            real = torch.nn.Parameter(empty, requires_grad=False)
            # megatron-core notes on the parameter along which axis it is cut.
            vars(real).update(vars(parameter))
            setattr(module, name, real)
        for name, buffer in module.named_buffers(recurse=False):
            assert not buffer.is_meta, f"{name} has no value on the meta device; name its device where it is made"
            setattr(module, name, buffer.to(cpu_runtime.device()))
    return stage.eval()


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
