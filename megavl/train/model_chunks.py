"""This rank's part of the model: its stages in megatron-core's gradient buffers, with hooks for its schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megavl.model.build import BuildSpec, build_stages
from megavl.train.own_work import OwnWork
from megavl.train.split_encoders import SplitEncoders


@dataclass(frozen=True, kw_only=True)
class ModelChunks:
    """The part of the model that one rank trains."""

    chunks: tuple[DistributedDataParallel, ...]
    """Its pipeline stages: one, or `parallel.virtual_pipeline` of them."""
    encoders: SplitEncoders | None
    """Under `parallel.vision: split_all`, the towers, which encode before the pipeline starts."""
    own_work: OwnWork = field(default_factory=OwnWork)
    """How long this rank works on a step before it waits for the others."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a part of the step under `name` if the step profiler records this step."""
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

    def gather_weights(self, *, changed: bool = False) -> None:
        """Finish gathering the weights that the last step updated. Collective.

        Args:
            changed: each data-parallel rank has changed weights of its shard since.
        """
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather or changed:
                chunk.start_param_sync(force_sync=True)

    def gather_vision(self) -> None:
        """Finish gathering the vision weights before a step's first micro-batch. Collective.

        All replicas gather in the same order here. If the modules started the gathers themselves, the order would
        depend on which micro-batches have images, and gathers of replicas would be mixed up.
        """
        first = self.chunks[0]
        if first.ddp_config.overlap_param_gather and first.module.vision is not None:
            for weight in first.module.vision.parameters():
                if weight.requires_grad:
                    first.param_to_bucket_group[weight].finish_param_sync()

    def sharded_weights(self) -> dict[str, Any]:
        """Sharded weights of each stage for dist_checkpointing, which stores the inner names (`model. ...`).

        Extra states are stored as None: Transformer Engine's are empty without FP8, and others have none.
        """
        state = {f"stage{i}": chunk.module.sharded_state_dict(prefix="model.") for i, chunk in enumerate(self.chunks)}
        for entry in nested_values(state):
            if isinstance(entry, ShardedObject):
                assert _is_extra_state(entry.key), f"{entry.key} would be lost"
                entry.data = None
        return state

    def load_weights(self, load: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Load only the weights: `load` reads what their sharded state describes. Collective."""
        self.fill(load(self.sharded_weights()))

    def fill(self, loaded: dict[str, Any]) -> None:
        """Copy loaded weights into the modules. Collective."""
        for index, chunk in enumerate(self.chunks):
            # A stage without weights has no entry.
            weights = loaded.get(f"stage{index}", {})
            # An extra state from a file is never passed on: Transformer Engine would unpickle it.
            named = {
                key.removeprefix("model."): None if _is_extra_state(key) else value for key, value in weights.items()
            }
            chunk.module.load_state_dict(named)
        if self.encoders is not None:
            self.encoders.copy_weights()


def _is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2] == "_extra_state"


def build_model_chunks(spec: BuildSpec) -> ModelChunks:
    """Build this rank's stages with random weights and put the trainable ones into gradient buffers.

    Gradients add up in fp32, or in fp64 where the weights are.
    """
    stages, parallel = build_stages(spec), spec.parallel
    # One replica exchanges nothing, and overlap would cost it hooks at every weight and a dummy image in text steps.
    several = mpu.get_data_parallel_world_size(with_context_parallel=True) > 1
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=spec.dtype != torch.float64,
        overlap_grad_reduce=parallel.overlap_grad_reduce and several,
        overlap_param_gather=parallel.overlap_param_gather and several,
        use_distributed_optimizer=parallel.distributed_optimizer,
        bucket_size=parallel.bucket(ranks=mpu.get_data_parallel_world_size(with_context_parallel=True)),
        # These would start megatron-core's rerun machinery; bad steps are handled here.
        check_for_nan_in_grad=False,
    )
    chunks = tuple(
        # Only the first of several stages needs buckets: the others reduce while earlier stages still compute.
        DistributedDataParallel(config=stage.config, ddp_config=config, module=stage, disable_bucketing=index > 0)
        for index, stage in enumerate(stages)
    )
    for chunk in chunks:
        _free_of_hooks(chunk)
    encoders = None
    if parallel.vision == "split_all":
        encoders = SplitEncoders(chunks, spec)
        encoders.copy_weights()
    model = ModelChunks(chunks=chunks, encoders=encoders)
    _set_hooks(model)
    return model


def _free_of_hooks(chunk: DistributedDataParallel) -> None:
    """Remove megatron-core's hooks, which wait for gathered weights, where nothing trains: they would break the graphs
    of compiled towers."""
    for module, hook in chunk.remove_forward_pre_hook_handles.items():
        if not any(weight.requires_grad for weight in module.parameters(recurse=False)):
            hook.remove()


def _divide_by_tokens(stages: Sequence[DistributedDataParallel], num_tokens: torch.Tensor) -> None:
    """Divide gradients, which are sums over tokens, by the number of loss tokens of all replicas.

    megatron-core does the same, but its host waits for the number.

    Args:
        num_tokens: int32 (), loss tokens of this replica on the last stage, zero on others.
    """
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            num_tokens,
            src=mpu.get_pipeline_model_parallel_last_rank(),
            group=mpu.get_pipeline_model_parallel_group(),
        )
    replicas = mpu.get_data_parallel_group(with_context_parallel=True)
    if replicas.size() > 1:
        dist.all_reduce(num_tokens, group=replicas)
    scale = 1.0 / num_tokens.clamp(min=1)
    for stage in stages:
        stage.scale_gradients(scale)


def _set_hooks(model: ModelChunks) -> None:
    """Set the functions that megatron-core's schedule calls; all stages of a rank share one configuration."""
    chunks, encoders = model.chunks, model.encoders
    config = chunks[0].config
    config.no_sync_func = chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]

    def finalize(stages: Sequence[DistributedDataParallel], num_tokens: torch.Tensor, **kwargs: Any) -> None:
        if encoders is not None:
            with model.timed("encoders backward"):
                encoders.backward()
        model.own_work.end()
        finalize_model_grads(stages, **kwargs)
        _divide_by_tokens(stages, num_tokens)

    config.finalize_model_grads_func = finalize
