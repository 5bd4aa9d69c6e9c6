"""From a specification to this rank's module."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer import TransformerConfig
from torch import nn

from megavl.config.model import ModelConfig
from megavl.config.recipe import Compile, ParallelConfig, Recipe, RecomputeConfig
from megavl.model.decoder import transformer_config
from megavl.model.engine_choice import uses_transformer_engine
from megavl.model.kernels import Level, compile_level
from megavl.model.trainable import freeze
from megavl.model.vision import VisionTowers
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import cpu_runtime


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """What a rank builds its part of the model from."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    """Process groups of these sizes must exist."""
    recompute: RecomputeConfig = RecomputeConfig()
    layout: str | None = None
    """megatron-core's layout string; None for one stage."""
    dtype: torch.dtype = torch.float32
    """Dtype of the weights."""
    train: tuple[str, ...] = ()
    """Groups of parameters that train."""
    seed: int = 0
    """Seed of the initial weights."""
    transformer_engine: bool = False
    """Build the decoder layers from Transformer Engine's modules, which allocate on no meta device."""
    drawn: bool = True
    """Draw initial weights, which takes minutes for the 7B. If false, they are NaN until a checkpoint fills them; not
    under Transformer Engine."""
    compile: Compile = "none"
    """What torch.compile is wanted for."""

    @classmethod
    def of(cls, recipe: Recipe, *, layout: str | None, dtype: torch.dtype) -> BuildSpec:
        """What a recipe says about the model, with its resolved layout and the dtype of its precision.

        Raises:
            UsageError: `training.transformer_engine` asks for what is not installed.
        """
        return cls(
            model=recipe.model,
            parallel=recipe.parallel,
            recompute=recipe.recompute,
            layout=layout,
            dtype=dtype,
            train=recipe.trainable_parts,
            seed=recipe.training.seed,
            transformer_engine=uses_transformer_engine(recipe),
            compile=recipe.training.compile,
        )

    @cached_property
    def compiled(self) -> Level:
        """What torch.compile is used for here."""
        return compile_level(self.compile)

    def transformer_config(self, *, generates: bool = False) -> TransformerConfig:
        """megatron-core's configuration of the decoder."""
        return transformer_config(
            self.model.llm,
            parallel=self.parallel,
            recompute=self.recompute,
            layout=self.layout,
            dtype=self.dtype,
            transformer_engine=self.transformer_engine and not generates,
            compiled="none" if generates else self.compiled,
            generates=generates,
        )


def build_stages(spec: BuildSpec) -> list[DeepseekVL]:
    """This rank's stages, on its device, with random weights or NaN and the frozen groups marked."""
    config, virtual = spec.transformer_config(), spec.parallel.virtual_pipeline
    blank = not spec.drawn and not spec.transformer_engine
    with torch.random.fork_rng(devices=[]), torch.device("meta") if blank else contextlib.nullcontext():
        stages = []
        for index in range(virtual):
            # Another seed for every stage: layers of two inner stages would otherwise start equal.
            number = index * mpu.get_pipeline_model_parallel_world_size() + mpu.get_pipeline_model_parallel_rank()
            torch.manual_seed(spec.seed + 1000 * number)
            stages.append(
                DeepseekVL(
                    config,
                    spec.model,
                    pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=index),
                    post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=index),
                    recompute_vision=spec.recompute.vision,
                    placement=spec.parallel.vision,
                    vp_stage=index if virtual > 1 else None,
                    compiled=spec.compiled,
                )
            )
    for stage in stages:
        if blank:
            _allocate(stage, dtype=spec.dtype, value=math.nan)
        to_device_and_dtype(stage, dtype=spec.dtype)
        freeze(stage, train=spec.train)
    return stages


def build_towers(spec: BuildSpec) -> VisionTowers:
    """The vision towers alone on this rank's device, the frozen groups marked; their weights are NaN."""
    with torch.device("meta"):
        towers = VisionTowers(spec.model, recompute=spec.recompute.vision, compiled=spec.compiled == "layers")
    _allocate(towers, dtype=spec.dtype, value=math.nan)
    to_device_and_dtype(towers, dtype=spec.dtype)
    freeze(towers, train=spec.train, prefix="vision.")
    return towers


def to_device_and_dtype(module: nn.Module, *, dtype: torch.dtype) -> None:
    """Move a module to this rank's device and its weights to a type; buffers keep theirs."""
    cpu_runtime.prepare_products(dtype)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device=cpu_runtime.device(), dtype=dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device=cpu_runtime.device())


def build_to_generate(spec: BuildSpec) -> DeepseekVL:
    """This rank's stage for inference, frozen and in eval mode; its weights are allocated but hold no values yet.

    The modules are made on the meta device: drawing random weights takes a minute for the 7B.
    """
    cpu_runtime.prepare_products(spec.dtype)
    config = spec.transformer_config(generates=True)
    with torch.device("meta"):
        stage = DeepseekVL(
            config,
            spec.model,
            pre_process=mpu.is_pipeline_first_stage(),
            post_process=mpu.is_pipeline_last_stage(),
            generates=True,
        )
    _allocate(stage, dtype=spec.dtype)
    return stage.eval().requires_grad_(False)


def _allocate(module: nn.Module, *, dtype: torch.dtype, value: float | None = None) -> None:
    """Give parameters that were made on the meta device memory on this rank's, with one value or none."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            memory = torch.empty(parameter.shape, dtype=dtype, device=cpu_runtime.device())
            real = nn.Parameter(memory if value is None else memory.fill_(value), requires_grad=parameter.requires_grad)
            # megatron-core notes on the parameter along which axis it is split.
            vars(real).update(vars(parameter))
            setattr(owner, name, real)
        for name, buffer in owner.named_buffers(recurse=False):
            assert not buffer.is_meta, f"{name} has no value on the meta device; name its device where it is made"
            setattr(owner, name, buffer.to(cpu_runtime.device()))
