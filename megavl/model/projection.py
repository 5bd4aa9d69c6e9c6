"""megatron-core's tensor-parallel projections for models that only generate.

megatron-core's own pass every input and output through autograd functions, also where no gradient is wanted. For the
single tokens of decoding that costs more than the arithmetic of a small layer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_tensor_model_parallel_region,
)
from torch.nn import functional as F


class ColumnProjection(ColumnParallelLinear):
    """x W^T with the rows of W split over the ranks; without a bias."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """(..., H) to this rank's (..., F / ranks), or to all of (..., F) when gathered."""
        out = F.linear(input_, self.weight)
        if runtime_gather_output or (runtime_gather_output is None and self.gather_output):
            out = gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, None


class RowProjection(RowParallelLinear):
    """x W^T with the columns of W split over the ranks, summed over them; without a bias."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """This rank's (..., F / ranks) to (..., H)."""
        out = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(out, group=self.tp_group)
        return out, None
