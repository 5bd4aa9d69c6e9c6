"""What differs between the releases of megatron-core, and the names without a promise that we rely on.

Releases from 0.16.1 to below 0.20 are used; `setup.py` states them. From 0.17 on they need Python 3.12. Where triton is
missing, this module must be imported before megatron-core.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

UNPROMISED = (
    # Found in the source by the contract test.
    "megatron.core.tensor_parallel.layers._grad_accum_fusion_available",
    "torch._C",
    "torch._foreach_div_",
    "torch.autograd._engine_run_backward",
    "torch.cpu._is_amx_tile_supported",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cuda.memory._dump_snapshot",
    "torch.cuda.memory._record_memory_history",
    "torch.distributed.checkpoint.default_planner._validate_global_plan",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.utils._create_file_view",
    "torch.distributed.distributed_c10d._get_default_group",
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.storage._dtype_to_storage_type_map",
    # Inherited, or reached through an object.
    "megatron.core.models.gpt.gpt_model.GPTModel._postprocess",
    "megatron.core.models.gpt.gpt_model.GPTModel._preprocess",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._get_main_param_and_optimizer_states",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._get_model_param_range_map",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
    "megatron.core.tensor_parallel.random._get_cuda_rng_state",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
    "torch.distributed.ProcessGroupGloo._Options",
    "torch.distributed.ProcessGroupGloo._Options._devices",
    "torch.distributed.ProcessGroupGloo._Options._threads",
    "torch.distributed.ProcessGroupGloo._Options._timeout",
    "torch.nn.Module._forward_pre_hooks",
)
"""Private names of torch and megatron-core."""

_NEEDS_TRITON = "megatron.core.transformer.moe.paged_stash"


def gradients_for_norm(optimizer: Any) -> list[Any]:
    """Gradients that count in the norm over all ranks; 0.19 renamed the method."""
    newer = getattr(optimizer, "get_grads_for_grad_norm", None)
    found: list[Any] = newer() if newer is not None else optimizer.get_main_grads_for_grad_norm()
    return found


def parts_of(spec: Any) -> Any:
    """Submodules of an MLP's specification; 0.18 made a partial function of it."""
    return spec.keywords["submodules"] if isinstance(spec, functools.partial) else spec.submodules


def allow_missing_triton() -> None:
    """Let megatron-core be imported without triton: 0.18 and 0.19 import kernels of mixtures of experts.

    A stand-in takes the place of that module; whoever calls it is told what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(_NEEDS_TRITON, _Missing(_NEEDS_TRITON))


class _Missing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*_: Any, **__: Any) -> Any:
            raise ImportError(f"{self.__name__}.{name} needs triton, which is not installed")

        return call


allow_missing_triton()
