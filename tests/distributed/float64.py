"""Lets megatron-core train in fp64, where the sums of two layouts differ by 1e-13 and a true error stands out.

megatron-core's gradient buffers, schedules and transfers take any type. Its optimizers know three types of weights by
name, and cast gradients and the state of a checkpoint to fp32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from torch.overrides import TorchFunctionMode


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        # `DistributedOptimizer.get_parameter_state_dp_zero` gathers master weights and moments so.
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        # `DistributedOptimizer._copy_model_grads_to_main_grads` casts gradients so.
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        found = func(*args, **kwargs)
        # `DistributedOptimizer` and `Float16OptimizerWithFloat16Params` refuse every other name.
        return "torch.cuda.FloatTensor" if isinstance(found, str) and found == "torch.cuda.DoubleTensor" else found


def fp32_is_fp64(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Inside, megatron-core takes and makes fp64 where it names fp32; nothing changes for weights of another type."""
    return _Float64() if dtype == torch.float64 else contextlib.nullcontext()


def keep_float64(optimizer: ChainedOptimizer) -> None:
    """Let an optimizer over fp64 weights use fp64 gradients."""
    for part in optimizer.chained_optimizers:
        part.prepare_grads = _inside(part.prepare_grads)


def _inside(prepare: Callable[[], bool]) -> Callable[[], bool]:
    def run() -> bool:
        with _Float64():
            return prepare()

    return run
