"""Progress of long work on the terminal: amount, rate and time left; nothing where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from tqdm import tqdm

from megavl.convert.lazy import LazyTensor


@dataclass(frozen=True)
class _Counted:
    """A tensor that moves the bar when it is read."""

    tensor: LazyTensor
    bar: tqdm[None]

    @property
    def shape(self) -> Sequence[int]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def load(self) -> torch.Tensor:
        values = self.tensor.load()
        self.bar.update(values.nbytes)
        return values


@contextmanager
def counted(tensors: Mapping[str, LazyTensor], *, what: str) -> Iterator[dict[str, LazyTensor]]:
    """The same tensors, with a bar on the terminal that counts the bytes read of them."""
    total = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield {name: _Counted(tensor, bar) for name, tensor in tensors.items()}
