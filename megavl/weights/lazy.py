"""Tensors that are read on demand, and the check that a set of them is exactly the expected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.weights.canonical_names import Shape


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor whose shape and type are known before its values are read."""

    shape: Shape
    dtype: torch.dtype
    load: Callable[[], Tensor] = field(repr=False)
    """Reads the values, onto the CPU."""
    slicer: Callable[..., Tensor] | None = field(default=None, repr=False)
    """Reads a slice, called as `load_slice`; without it, a slice is taken of the whole tensor."""

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(shape=tuple(tensor.shape), dtype=tensor.dtype, load=lambda: tensor)

    def load_slice(self, start: int, stop: int, *, axis: int = 0) -> Tensor:
        """Read the indices `start` to `stop` of an axis, and where the file allows it only their bytes."""
        if not 0 <= axis < len(self.shape) or not 0 <= start <= stop <= self.shape[axis]:
            raise IndexError(f"{start} to {stop} on axis {axis} of shape {self.shape}")
        if self.slicer is None:
            return self.load().narrow(axis, start, stop - start)
        return self.slicer(start, stop, axis=axis)


def require_exactly(
    expected: Mapping[str, Shape],
    *,
    found: Mapping[str, LazyTensor],
    locate: Callable[[str], str],
    ignored: Iterable[str] = (),
    wanted: str = "the configuration",
) -> None:
    """Check names and shapes of a set of tensors.

    Args:
        expected: shape by name.
        ignored: names that may be there and are not looked at.

    Raises:
        CheckpointError: names the file, the first missing, unexpected or misshapen tensor, and how many more there are.
    """
    missing = [name for name in expected if name not in found]
    extra = sorted(set(found) - set(expected) - set(ignored))
    if missing or extra:
        problems = [
            f"{locate(names[0])}: {what} {_listed(names)}"
            for what, names in (("no tensor", missing), ("unexpected tensor", extra))
            if names
        ]
        raise CheckpointError("; ".join(problems) + f"; the weights do not belong to the sizes in {wanted}")
    for name, shape in expected.items():
        if (actual := found[name].shape) != shape:
            raise CheckpointError(
                f"{locate(name)}: tensor {name!r} has shape {list(actual)}, {wanted} asks for "
                f"{list(shape)}; the weights do not belong to its sizes"
            )


def _listed(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
