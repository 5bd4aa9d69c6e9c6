"""How a tensor of the model and the tensors of a file correspond; every transform is exact in both directions.

Legend: H decoder width, d channels of an attention head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavl.weights.canonical_names import Shape

RowReader = Callable[[int, int], Tensor]
"""Reads the rows of a tensor in a file between two indices."""


@dataclass(frozen=True)
class Copy:
    """One tensor, unchanged."""

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a model tensor of shape `shape`."""
        return (shape,)

    def to_canonical(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors of the file to the tensor of the model."""
        (only,) = parts
        return only

    def rows_to_canonical(self, parts: Sequence[RowReader], shape: Shape, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the model tensor of shape `shape`."""
        (only,) = parts
        return only(start, stop)

    def from_canonical(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor of the model to the tensors of the file."""
        return (tensor,)


@dataclass(frozen=True)
class DropFirstAxis:
    """In the model (1, ...), in the file (...)."""

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a model tensor of shape `shape`."""
        return (shape[1:],)

    def to_canonical(self, parts: Sequence[Tensor]) -> Tensor:
        """(...) to (1, ...)."""
        (only,) = parts
        return only.unsqueeze(0)

    def rows_to_canonical(self, parts: Sequence[RowReader], shape: Shape, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the model tensor of shape `shape`, which has but one row."""
        (only,) = parts
        return only(0, shape[1]).unsqueeze(0)[start:stop]

    def from_canonical(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(1, ...) to (...)."""
        return (tensor.squeeze(0),)


@dataclass(frozen=True)
class StackRows:
    """In the model (parts x n, ...): the rows of one tensor after those of the other; in the file each is (n, ...)."""

    parts: int

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a model tensor of shape `shape`."""
        return ((shape[0] // self.parts, *shape[1:]),) * self.parts

    def to_canonical(self, parts: Sequence[Tensor]) -> Tensor:
        """`parts` tensors (n, ...) to (parts x n, ...)."""
        return torch.cat(list(parts))

    def rows_to_canonical(self, parts: Sequence[RowReader], shape: Shape, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the model tensor of shape `shape`."""
        size = shape[0] // self.parts
        spans = [(max(start - index * size, 0), min(stop - index * size, size)) for index in range(self.parts)]
        return torch.cat([read(*span) for read, span in zip(parts, spans) if span[0] < span[1]])

    def from_canonical(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(parts x n, ...) to `parts` tensors (n, ...)."""
        return tuple(tensor.chunk(self.parts))


@dataclass(frozen=True)
class InterleaveHeads:
    """In the model (3H, H) with rows ordered (heads, [q, k, v], d); in the file q, k and v, each (H, H).

    Source: megatron-core 0.16.1, `SelfAttention.get_query_key_value_tensors`, one query head per group.
    """

    heads: int

    def part_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes in the file of a model tensor of shape `shape`."""
        return ((shape[0] // 3, *shape[1:]),) * 3

    def to_canonical(self, parts: Sequence[Tensor]) -> Tensor:
        """q, k, v, each (H, H), to (3H, H)."""
        rows, columns = parts[0].shape
        by_head = [part.reshape(self.heads, rows // self.heads, columns) for part in parts]
        return torch.stack(by_head, dim=1).reshape(3 * rows, columns)

    def rows_to_canonical(self, parts: Sequence[RowReader], shape: Shape, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the model tensor of shape `shape`; both lie between two heads."""
        head = shape[0] // self.heads
        assert start % head == 0 and stop % head == 0, f"rows {start} to {stop} split a head of {head} rows"
        several = InterleaveHeads((stop - start) // head)
        return several.to_canonical([read(start // 3, stop // 3) for read in parts])

    def from_canonical(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(3H, H) to q, k, v, each (H, H)."""
        rows, columns = tensor.shape
        by_head = tensor.reshape(self.heads, 3, rows // (3 * self.heads), columns)
        return tuple(part.reshape(rows // 3, columns) for part in by_head.unbind(dim=1))


Transform = Copy | DropFirstAxis | StackRows | InterleaveHeads
