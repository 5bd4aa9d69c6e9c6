"""The elementwise work between matrix products: each function is as few kernels as torch.compile makes of it.

All functions are pure or overwrite one argument. Autograd and collectives stay outside, so they serve every layout, and
where torch.compile fails they run op by op.

Legend: T tokens, H hidden, A heads of this rank, D channels per head, F inner width of this rank, R rows, V vocabulary
of this rank.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F

from megavl.config.errors import first_line
from megavl.config.recipe import Compile
from megavl.parallel import cpu_runtime

Level = Literal["none", "kernels", "layers"]
"""What torch.compile is used for, where it is known that it can run."""

CHUNK = 8 << 20
"""Logits that go through fp32 at once where no kernel does it: 32 MiB, which stay in the cache of a GPU."""

_failed = False
"""A compilation failed in this process, so that no other one is tried."""


class Kernel:
    """A function of tensors through torch.compile; from the first failure on, all of them run as written."""

    def __init__(self, function: Callable[..., Any], *, otherwise: Callable[..., Any] | None = None) -> None:
        """Wrap `function`; `otherwise` does the same where it is not compiled, with less memory."""
        self._function, self._otherwise = function, otherwise or function

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        """Made at the first call: this alone imports the compiler, which takes a second."""
        return torch.compile(self._function)

    def __call__(self, *args: Any, compiled: bool = True) -> Any:
        """Call the function, as written unless `compiled`."""
        global _failed
        if _failed or not compiled:
            return self._otherwise(*args)
        try:
            with cpu_runtime.without_redirection():
                return self._compiled(*args)
        except torch.OutOfMemoryError:
            raise
        # The errors of Dynamo, Inductor, Triton and the host's compiler have no class in common.
        except Exception as error:
            found = self._otherwise(*args)
            _failed = True
            _warn(f"torch.compile failed ({type(error).__name__}: {first_line(error)})")
            return found


def _warn(reason: str) -> None:
    warnings.warn(
        f"training.compile: {reason}; norms, SwiGLU, rotary embedding and loss run op by op, slower", stacklevel=3
    )


def compile_level(wanted: Compile) -> Level:
    """What `training.compile` means on this machine.

    `auto` compiles on CUDA alone: on a CPU the compiler takes about a minute of a first start, which short runs do not
    win back, and losses would depend on whether the machine has a compiler.
    """
    if wanted == "none" or (wanted == "auto" and not torch.cuda.is_available()):
        return "none"
    if missing := _missing():
        _warn(f"torch.compile needs {missing}")
        return "none"
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name) == "1":
            _warn(f"{name}=1 is set")
    return "layers" if wanted == "auto" else wanted


@cache
def _missing() -> str:
    """What torch.compile lacks here: it builds a launcher for each CUDA kernel, and each CPU kernel, on the host."""
    on_cuda = torch.cuda.is_available()
    variable, programs = ("CC", ("gcc", "clang")) if on_cuda else ("CXX", ("g++", "clang++"))
    if on_cuda and find_spec("triton") is None:
        return "Triton"
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else programs)):
        return f"a compiler ({' or '.join(programs)})"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if headers.is_file() else "Python's headers (python3-dev)"


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _wide(x)
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * _wide(weight)).to(x.dtype), scale


def _added_normalized(
    x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x + more
    return total, *_normalized(total, weight, eps)


def _again(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (_wide(x) * scale * _wide(weight)).to(x.dtype)


def _normalized_back(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    unit, wide = _wide(x) * scale, _wide(grad)
    inner = wide * _wide(weight)
    out = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
    if residual is not None:
        out = out + _wide(residual)
    return out.to(x.dtype), (wide * unit).sum(0).to(weight.dtype)


def _split_rotated(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = qkv.chunk(3, dim=-1)
    return _turned(query, cos, sin), _turned(key, cos, sin), value.clone(memory_format=torch.contiguous_format)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def _split_rotated_back(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    joined = torch.cat([_turned(query, cos, -sin), _turned(key, cos, -sin), value], dim=-1)
    return joined, _again(x, scale, weight)


def _swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return (F.silu(_wide(gate)) * _wide(up)).to(both.dtype)


def _swiglu_back(both: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = (_wide(half) for half in both.chunk(2, dim=-1))
    wide, sigmoid = _wide(grad), gate.sigmoid()
    active = gate * sigmoid
    of_gate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([of_gate, wide * active], dim=-1).to(both.dtype), (active * up).to(both.dtype)


def _mlp_back(
    both: torch.Tensor, grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_swiglu_back(both, grad), _again(x, scale, weight)


def _exp_sums(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (_wide(logits) - largest[:, None]).exp().sum(dim=1)


def _exp_sums_in_chunks(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    chunks = logits.split(max(1, CHUNK // logits.shape[1]))
    shifts = largest[:, None].split(len(chunks[0]))
    return torch.cat([(chunk - shift).exp_().sum(dim=1) for chunk, shift in zip(chunks, shifts)])


def _to_probabilities(logits: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> None:
    logits.copy_((_wide(logits) - shift[:, None]).exp() * scale[:, None])


def _to_probabilities_in_chunks(logits: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> None:
    chunks = logits.split(max(1, CHUNK // logits.shape[1]))
    rows = len(chunks[0])
    for chunk, low, factor in zip(chunks, shift[:, None].split(rows), scale[:, None].split(rows)):
        chunk.copy_((chunk - low).exp_().mul_(factor))


normalized = Kernel(_normalized)
"""RMSNorm of x (T, H) by weight (H,) and eps: its result (T, H), and 1 / rms (T, 1), at least fp32."""
added_normalized = Kernel(_added_normalized)
"""`normalized` of x + more: the sum, its norm, and 1 / rms."""
again = Kernel(_again)
"""The result of `normalized` once more, from x, its second result and the weight."""
normalized_back = Kernel(_normalized_back)
"""From the gradient (T, H) of RMSNorm's result, x, 1 / rms, the weight, and a gradient of x to add or None: gradients
of x (T, H) and of the weight (H,)."""
split_rotated = Kernel(_split_rotated)
"""From qkv (T, A, 3 D) and cos, sin (T, 1, D / 2): rotated query and key, and value, each (T, A, D)."""
split_rotated_back = Kernel(_split_rotated_back)
"""From gradients of query, key and value, cos and sin: the gradient of qkv; and `again`."""
turned = Kernel(_turned)
"""Rotary embedding of x (T, A, D) by cos and sin (T, 1, D / 2)."""
swiglu = Kernel(_swiglu)
"""silu(gate) x up, (T, F), of gate and up side by side, (T, 2 F)."""
swiglu_back = Kernel(_swiglu_back)
"""From gate and up and the gradient (T, F) of `swiglu`: their gradient (T, 2 F), and the result once more."""
mlp_back = Kernel(_mlp_back)
"""`swiglu_back`, and `again` of x, 1 / rms and the weight."""
exp_sums = Kernel(_exp_sums, otherwise=_exp_sums_in_chunks)
"""Of logits (R, V) and the largest ones (R,): the sum of exp(logit - largest) of each row (R,)."""
to_probabilities = Kernel(_to_probabilities, otherwise=_to_probabilities_in_chunks)
"""Overwrite logits (R, V) by exp(logit - shift) x scale, both (R,)."""
