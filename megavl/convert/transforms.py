"""How one flat tensor and the tensors of a file correspond; every transform is exact in both directions.

Legend: H decoder width, d channels of an attention head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavl.convert.flat_names import Shape


@dataclass(frozen=True)
class Copy:
    """One tensor, unchanged."""

    def part_shapes(self, flat: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a flat tensor of shape `flat`."""
        return (flat,)

    def to_flat(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of the file to the flat tensor."""
        (only,) = parts
        return only

    def from_flat(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The flat tensor to the tensors of the file."""
        return (flat,)


@dataclass(frozen=True)
class DropFirstAxis:
    """Flat (1, ...), in the file (...)."""

    def part_shapes(self, flat: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a flat tensor of shape `flat`."""
        return (flat[1:],)

    def to_flat(self, parts: Sequence[Tensor]) -> Tensor:
        """(...) to (1, ...)."""
        (only,) = parts
        return only.unsqueeze(0)

    def from_flat(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(1, ...) to (...)."""
        return (flat.squeeze(0),)


@dataclass(frozen=True)
class StackRows:
    """Flat (parts x n, ...) holds the rows of one tensor after those of the other; in the file each is (n, ...)."""

    parts: int

    def part_shapes(self, flat: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a flat tensor of shape `flat`."""
        return ((flat[0] // self.parts, *flat[1:]),) * self.parts

    def to_flat(self, parts: Sequence[Tensor]) -> Tensor:
        """`parts` tensors (n, ...) to (parts x n, ...)."""
        return torch.cat(list(parts))

    def from_flat(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(parts x n, ...) to `parts` tensors (n, ...)."""
        return tuple(flat.chunk(self.parts))


@dataclass(frozen=True)
class InterleaveHeads:
    """Flat (3H, H) with rows ordered (heads, [q, k, v], d); in the file q, k and v, each (H, H).

    Source: megatron-core 0.16.1, `SelfAttention.get_query_key_value_tensors`, one query head per group.
    """

    heads: int

    def part_shapes(self, flat: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a flat tensor of shape `flat`."""
        return ((flat[0] // 3, *flat[1:]),) * 3

    def to_flat(self, parts: Sequence[Tensor]) -> Tensor:
        """q, k, v, each (H, H), to (3H, H)."""
        rows, columns = parts[0].shape
        by_head = [part.reshape(self.heads, rows // self.heads, columns) for part in parts]
        return torch.stack(by_head, dim=1).reshape(3 * rows, columns)

    def from_flat(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(3H, H) to q, k, v, each (H, H)."""
        rows, columns = flat.shape
        by_head = flat.reshape(self.heads, 3, rows // (3 * self.heads), columns)
        return tuple(part.reshape(rows // 3, columns) for part in by_head.unbind(dim=1))


Transform = Copy | DropFirstAxis | StackRows | InterleaveHeads
