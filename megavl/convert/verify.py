"""Compares two sets of weights tensor by tensor, with two tensors in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megavl.foreign.printing import visible
from megavl.weights.lazy import LazyTensor

_CHUNK = 1 << 22
"""Elements compared at a time; each takes 16 bytes as float64."""


@dataclass(frozen=True)
class TensorDifference:
    """Difference of two tensors of one name."""

    name: str
    max_abs: float
    """Largest absolute difference of two elements; infinite where one is NaN or infinite and the other is not."""
    max_rel: float
    """The same divided by the largest absolute value of the first tensor."""


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`."""

    compared: int
    """Tensors of equal name and shape."""
    different: tuple[TensorDifference, ...]
    """Tensors with at least one different value, the largest relative difference first."""
    missing: tuple[str, ...]
    """Names of the first set that the second lacks."""
    extra: tuple[str, ...]
    """Names of the second set that the first lacks."""
    misshapen: tuple[str, ...]
    """Names whose shapes differ."""

    @property
    def identical(self) -> bool:
        """Same names, same shapes, same values; the types may differ."""
        return not (self.different or self.missing or self.extra or self.misshapen)

    @property
    def max_abs(self) -> float:
        """Largest absolute difference over all tensors."""
        return max((item.max_abs for item in self.different), default=0.0)

    @property
    def max_rel(self) -> float:
        """Largest relative difference over all tensors."""
        return max((item.max_rel for item in self.different), default=0.0)

    def summary(self, *, limit: int = 5) -> str:
        """A few printed lines: the verdict and the first `limit` names of each kind."""
        if self.identical:
            return f"{self.compared} tensors, all equal"
        lines = [
            f"{self.compared} tensors compared, {len(self.different)} different "
            f"(max abs {self.max_abs:.3g}, max rel {self.max_rel:.3g})"
        ]
        lines += [
            f"  {item.name}: max abs {item.max_abs:.3g}, max rel {item.max_rel:.3g}" for item in self.different[:limit]
        ]
        for what, names in (("missing", self.missing), ("extra", self.extra), ("other shape", self.misshapen)):
            if names:
                rest = f" and {len(names) - limit} more" if len(names) > limit else ""
                lines.append(f"  {what}: {', '.join(names[:limit])}{rest}")
        # Names come from files.
        return "\n".join(visible(line, keep="") for line in lines)


def compare(a: Mapping[str, LazyTensor], b: Mapping[str, LazyTensor]) -> Comparison:
    """Compare two sets of tensors by name; values of any type are compared in float64."""
    common = [name for name in a if name in b]
    misshapen = tuple(name for name in common if tuple(a[name].shape) != tuple(b[name].shape))
    alike = [name for name in common if name not in misshapen]
    measured = (_difference(name, a[name].load(), b[name].load()) for name in alike)
    different = sorted((item for item in measured if item.max_abs > 0), key=lambda item: -item.max_rel)
    return Comparison(
        compared=len(alike),
        different=tuple(different),
        missing=tuple(name for name in a if name not in b),
        extra=tuple(name for name in b if name not in a),
        misshapen=misshapen,
    )


def _difference(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    max_abs = scale = 0.0
    values_a, values_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, values_a.numel(), _CHUNK):
        wide_a, wide_b = (side[start : start + _CHUNK].double() for side in (values_a, values_b))
        same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
        gap = torch.where(same, 0.0, (wide_a - wide_b).abs()).nan_to_num(nan=math.inf)
        max_abs = max(max_abs, float(gap.max()))
        scale = max(scale, float(wide_a.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    max_rel = 0.0 if max_abs == 0.0 else max_abs / scale if scale else math.inf
    return TensorDifference(name, max_abs, max_rel)
