"""Element types of weights, and the cast between them."""

from __future__ import annotations

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that an export or a start checkpoint may have, by the name used on the command line and in `config.json`."""


def cast(tensor: Tensor, dtype: torch.dtype | None, *, name: str, source: str) -> Tensor:
    """The tensor in another type; None and its own type leave it as it is.

    Raises:
        CheckpointError: a finite value would become infinite in float16.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        largest = float(tensor.abs().max())
        raise CheckpointError(
            f"{source}: tensor {name!r} reaches {largest:g}, beyond float16's 65504; choose bfloat16 or float32"
        )
    return result
