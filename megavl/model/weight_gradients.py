"""Weight gradients that a matrix product adds to megatron-core's fp32 buffers itself, by torch instead of Apex.

Otherwise every micro-batch's gradient is rounded to bf16, written, read again and added: megatron-core knows the
product that accumulates only from Apex's extension `fused_weight_gradient_mlp_cuda`.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers

from megavl.config.errors import first_line
from megavl.parallel import cpu_runtime


def add_weight_gradient(x: torch.Tensor, grad: torch.Tensor, total: torch.Tensor) -> None:
    """Add grad^T x to the gradient of a weight.

    Args:
        x: (T, H), inputs of the projection.
        grad: (T, F), of its outputs.
        total: fp32 (F, H), added to in place and not rounded in between.
    """
    if x.dtype == total.dtype:
        total.addmm_(grad.t(), x)
    else:
        torch.addmm(total, grad.t(), x, total.dtype, out=total)


def weight_gradient(weight: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """Gradient of a projection's weight, or its shape alone where the product adds it to megatron-core's buffer.

    Args:
        weight: (F, H); where the buffer has its gradient, it is marked for megatron-core's hook.
        grad: (T, F), of its outputs.
        x: (T, H), its inputs.
        fused: megatron-core's `gradient_accumulation_fusion`.
    """
    if not (fused and hasattr(weight, "main_grad")):
        return torch.mm(grad.t(), x)
    add_weight_gradient(x, grad, weight.main_grad)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


@cache
def fuses_weight_gradients() -> bool:
    """Whether megatron-core's projections may add to fp32 gradients; makes them use torch where Apex is absent."""
    device = cpu_runtime.device()
    if device.type != "cuda":
        return False
    if layers._grad_accum_fusion_available:
        return True
    small = 2.0**-12
    ones, total = torch.ones(16, 16, device=device, dtype=torch.bfloat16), torch.full((16, 16), small, device=device)
    try:
        add_weight_gradient(ones, ones, total)
        problem = "" if bool((total == 16 + small).all()) else f"16 + {small} gave {float(total[0, 0])}"
    except (RuntimeError, TypeError) as error:
        problem = first_line(error)
    if problem:
        warnings.warn(
            f"torch {torch.__version__} does not add products of bf16 to fp32 here ({problem}): weight gradients are "
            "rounded to bf16 in every micro-batch",
            stacklevel=2,
        )
        return False
    _use_torch()
    return True


def fuses_on_cpu(dtype: torch.dtype) -> bool:
    """The same without CUDA: products of fp32 add to fp32, those of other types do not."""
    if torch.cuda.is_available() or dtype != torch.float32:
        return False
    _use_torch()
    return True


def _use_torch() -> None:
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    layers._grad_accum_fusion_available = True
