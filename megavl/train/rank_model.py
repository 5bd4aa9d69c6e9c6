"""This rank's part of the model, ready to train: stages in megatron-core's gradient buffers, its schedule's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig, RecomputeConfig
from megavl.model.build import build_stages
from megavl.train.split_encoders import SplitEncoders


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """What one rank trains."""

    chunks: tuple[DistributedDataParallel, ...]
    """Its pipeline stages: one, or `parallel.virtual_pipeline` of them."""
    encoders: SplitEncoders | None
    """Under `parallel.vision: split_all`, the towers that encode before the pipeline starts."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A part of the step that goes by `name` where the step is recorded (`recorder.py`)."""
        timers = self.chunks[0].config.timers
        if timers is not None:
            timers(name).start()
        yield
        if timers is not None:
            timers(name).stop()

    def zero_grad(self) -> None:
        """Empty the gradient buffers."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def gather_weights(self) -> None:
        """Complete the weights that the last step updated; they may still wait to be gathered. Collective."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def gather_vision(self) -> None:
        """Complete the vision weights in one order on all replicas, before a step's first micro-batch. Collective.

        Left to the modules that use them, their gathers would start in the order of this replica's images, which is not
        that of another one where a micro-batch, or a rank's share of it, has none; gathers would then be mixed up.
        """
        first = self.chunks[0]
        if first.ddp_config.overlap_param_gather and first.module.vision is not None:
            for weight in first.module.vision.parameters():
                if weight.requires_grad:
                    first.param_to_bucket_group[weight].finish_param_sync()

    def sharded_weights(self) -> dict[str, Any]:
        """Weights of each stage for dist_checkpointing; only the names inside, from `model.` on, are stored."""
        return {f"stage{i}": chunk.module.sharded_state_dict(prefix="model.") for i, chunk in enumerate(self.chunks)}

    def load_weights(self, load: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Fill the weights alone from what `load` makes of their sharded state. Collective."""
        self.fill(load(self.sharded_weights()))

    def fill(self, loaded: dict[str, Any]) -> None:
        """Take loaded weights. Collective."""
        for index, chunk in enumerate(self.chunks):
            # A stage without weights has no entry.
            weights = loaded.get(f"stage{index}", {})
            chunk.module.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
        if self.encoders is not None:
            self.encoders.copy_weights()


def build_rank_model(
    model: ModelConfig,
    *,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    layout: str | None,
    dtype: torch.dtype,
    train: tuple[str, ...],
    seed: int,
) -> RankModel:
    """Build this rank's stages with random weights and put the trainable ones into gradient buffers.

    Gradients add up in fp32, or in fp64 where the weights are.

    Args:
        model: sizes.
        parallel: how the model is cut; process groups must exist.
        recompute: activation recompute.
        layout: megatron-core's layout string, None for one stage.
        dtype: dtype of the weights.
        train: groups of parameters that train.
        seed: seed of the initial weights.
    """
    stages = build_stages(
        model, parallel=parallel, recompute=recompute, layout=layout, dtype=dtype, train=train, seed=seed
    )
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=parallel.bucket_size,
        # These would start megatron-core's rerun machinery; bad steps are handled here.
        check_for_nan_in_grad=False,
    )
    chunks = tuple(
        # Only the first of several stages is cut into buckets: the others reduce while earlier ones still compute.
        DistributedDataParallel(config=stage.config, ddp_config=config, module=stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    )
    encoders = None
    if parallel.vision == "split_all":
        encoders = SplitEncoders(chunks, model, dtype=dtype, train=train, recompute=recompute.vision)
        encoders.copy_weights()
    rank_model = RankModel(chunks=chunks, encoders=encoders)
    _set_hooks(rank_model)
    return rank_model


def _divide_by_tokens(stages: Sequence[DistributedDataParallel], num_tokens: torch.Tensor) -> None:
    """Turn gradients of sums over the replicas' tokens into those of their mean.

    megatron-core does it alike, but has the host wait for the number.

    Args:
        stages: this rank's.
        num_tokens: int32 (), loss tokens of this replica; zero but on the last stage.
    """
    dist.broadcast(
        num_tokens,
        src=mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    dist.all_reduce(num_tokens, group=mpu.get_data_parallel_group(with_context_parallel=True))
    scale = 1.0 / num_tokens.clamp(min=1)
    for stage in stages:
        stage.scale_gradients(scale)


def _set_hooks(model: RankModel) -> None:
    """What megatron-core's schedule calls; every stage of a rank shares one configuration."""
    chunks, encoders = model.chunks, model.encoders
    config = chunks[0].config
    config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]

    def finalize(stages: Sequence[DistributedDataParallel], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        if encoders is not None:
            with model.timed("encoders backward"):
                encoders.backward()
        finalize_model_grads(stages, **kwargs)
        _divide_by_tokens(stages, num_tokens)

    config.finalize_model_grads_func = finalize
