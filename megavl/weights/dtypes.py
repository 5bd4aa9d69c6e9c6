"""The element types of weights under every name that they have, and the cast between them."""

from __future__ import annotations

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError

# Name in `config.json` and on the command line, torch's type, code in a safetensors header, `training.precision`.
_TYPES = (
    ("float64", torch.float64, "F64", None),
    ("float32", torch.float32, "F32", "fp32"),
    ("bfloat16", torch.bfloat16, "BF16", "bf16"),
    ("float16", torch.float16, "F16", None),
)

DTYPES = {name: dtype for name, dtype, _, _ in _TYPES if name != "float64"}
"""Types that an export, a start checkpoint or a loaded model may have, by name."""
DTYPE_OF_CODE = {code: dtype for _, dtype, code, _ in _TYPES}
"""Types that a weight file may have, by their code in a safetensors header."""
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
DTYPE_OF_PRECISION = {precision: dtype for _, dtype, _, precision in _TYPES if precision is not None}
"""Types of the weights during training, by `training.precision`."""


def dtype_name(dtype: torch.dtype) -> str:
    """Name without torch's prefix, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def cast(tensor: Tensor, dtype: torch.dtype | None, *, name: str, source: str) -> Tensor:
    """Cast a tensor; None and its own type leave it as it is.

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
