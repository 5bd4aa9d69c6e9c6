"""Lazy tensors: slices, and the check that a set of tensors is the expected one."""

from __future__ import annotations

import pytest
import torch

from megavl.config.errors import CheckpointError
from megavl.weights.lazy import LazyTensor, require_exactly


def test_slice_is_part_of_the_whole() -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensor = LazyTensor.of(whole)
    assert (tensor.shape, tensor.dtype) == ((3, 4), torch.float32) and tensor.load() is whole
    assert torch.equal(tensor.load_slice(1, 3), whole[1:3])
    assert torch.equal(tensor.load_slice(1, 3, axis=1), whole[:, 1:3])


@pytest.mark.parametrize(("start", "stop", "axis"), [(0, 4, 0), (2, 1, 0), (-1, 1, 0), (0, 1, 2), (0, 1, -1)])
def test_slice_outside_the_shape_is_refused(start: int, stop: int, axis: int) -> None:
    tensor = LazyTensor(shape=(3, 4), dtype=torch.float32, load=pytest.fail)
    with pytest.raises(IndexError, match=f"{start} to {stop} on axis {axis}"):
        tensor.load_slice(start, stop, axis=axis)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "f: no tensor 'b'"),
        ([], r"f: no tensor 'a' \(and 1 more\)"),
        (["a", "b", "c"], "f: unexpected tensor 'c'"),
        (["a", "c"], "f: no tensor 'b'; f: unexpected tensor 'c'"),
    ],
)
def test_missing_and_unexpected_names_are_stated(names: list[str], message: str) -> None:
    found = {name: LazyTensor.of(torch.zeros(2)) for name in [*names, "derived"]}
    with pytest.raises(CheckpointError, match=message):
        require_exactly({"a": (2,), "b": (2,)}, found=found, locate=lambda _: "f", ignored=["derived"])


def test_wrong_shape_is_stated() -> None:
    with pytest.raises(CheckpointError, match=r"f: tensor 'a' has shape \[2\], the configuration asks for \[3\]"):
        require_exactly({"a": (3,)}, found={"a": LazyTensor.of(torch.zeros(2))}, locate=lambda _: "f")
