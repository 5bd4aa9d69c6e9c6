"""Tensors that are read when asked for, and the check that a set of them is exactly the expected one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megavl.config.errors import CheckpointError
from megavl.convert.flat_names import Shape


class LazyTensor(Protocol):
    """A tensor whose shape and dtype are known before its values are read."""

    @property
    def shape(self) -> Sequence[int]:
        """Shape, known without reading."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type, known without reading."""

    def load(self) -> Tensor:
        """Read the values."""


@dataclass(frozen=True)
class LoadedTensor:
    """A tensor already in memory."""

    tensor: Tensor

    @property
    def shape(self) -> Sequence[int]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tensor."""
        return self.tensor.dtype

    def load(self) -> Tensor:
        """The tensor itself."""
        return self.tensor

    def load_slice(self, start: int, stop: int, *, axis: int = 0) -> Tensor:
        """What lies between two indices of an axis."""
        return self.tensor.narrow(axis, start, stop - start)


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
        found: the tensors there are.
        locate: where a name is, or should be: a file or checkpoint, for the message.
        ignored: names that may be there and are not looked at.
        wanted: what states the expected shapes, for the message.

    Raises:
        CheckpointError: naming the place, the first missing, unexpected or misshapen name, and how many more.
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
        if tuple(found[name].shape) != shape:
            raise CheckpointError(
                f"{locate(name)}: tensor {name!r} has shape {list(found[name].shape)}, {wanted} asks for "
                f"{list(shape)}; the weights do not belong to its sizes"
            )


def _listed(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
