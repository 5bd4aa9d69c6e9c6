"""A stand-in for Transformer Engine in plain torch: the modules that megatron-core 0.16.1 imports from it.

    PYTHONPATH=tests/numerics/stand_in_te:tests/numerics/stand_in_cuda:. python -m megavl train ...

Classes have the names, arguments, parameters, extra state and state types of Transformer Engine 2.11. Their kernels are
torch's. What Transformer Engine refuses is refused here too: attention in fp32, borders off the device, a state that
would have to be unpickled. FP8, and what only mixtures of experts need, is missing.

This shows that MegaVL calls Transformer Engine as it expects to be called, and that checkpoints go both ways. Only a
GPU shows whether its kernels agree, and how fast they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import te_layers as layers
import te_optimizers as optimizers

__version__ = "2.11.0"
__path__: list[str] = []
"""Makes this module a package, whose modules are registered at the end."""


class FP8GlobalStateManager:
    """FP8 is off."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Whether products run in FP8."""
        return False


@contextmanager
def fp8_autocast(enabled: bool = True, **_: Any) -> Iterator[None]:
    """Refuses FP8."""
    assert not enabled, "the stand-in has no FP8"
    yield


def _missing(name: str) -> type:
    """A class to inherit from or to compare with, which cannot be built."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"the stand-in has no {name}")

    return type(name, (), {"__init__": refuse})


def _missing_function(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"the stand-in has no {name}")

    return refuse


_ROUTER = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
_MODULES: dict[str, dict[str, Any]] = {
    "common": {},
    "common.recipe": {"DelayedScaling": _missing("DelayedScaling")},
    "pytorch": {
        "DotProductAttention": layers.DotProductAttention,
        "GroupedLinear": _missing("GroupedLinear"),
        "LayerNorm": _missing("LayerNorm"),
        "LayerNormLinear": layers.LayerNormLinear,
        "Linear": layers.Linear,
        "RMSNorm": layers.RMSNorm,
    },
    "pytorch.attention": {"_SplitAlongDim": layers.SplitAlongDim},
    "pytorch.attention.rope": {"apply_rotary_pos_emb": layers.apply_rotary_pos_emb},
    "pytorch.distributed": {
        "CudaRNGStatesTracker": _missing("CudaRNGStatesTracker"),
        "activation_recompute_forward": _missing_function("activation_recompute_forward"),
    },
    "pytorch.fp8": {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast},
    "pytorch.module": {},
    "pytorch.module.base": {"get_dummy_wgrad": layers.get_dummy_wgrad},
    "pytorch.ops": {name: _missing(name) for name in ("FusibleOperation", "Sequential")},
    "pytorch.optimizers": {
        name: getattr(optimizers, name)
        for name in ("FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale")
    },
    "pytorch.router": {name: _missing_function(name) for name in _ROUTER},
    "pytorch.tensor": {"QuantizedTensor": _missing("QuantizedTensor")},
}
for _path, _names in _MODULES.items():
    _module = ModuleType(f"{__name__}.{_path}")
    _module.__path__ = []  # a package
    vars(_module).update(_names)
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
