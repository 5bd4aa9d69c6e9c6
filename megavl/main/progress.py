"""Progress of long work on the terminal: amount, rate and time left; nothing where the output is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod

import torch
from tqdm import tqdm

from megavl.weights.lazy import LazyTensor


@contextmanager
def counted(tensors: Mapping[str, LazyTensor], *, what: str) -> Iterator[dict[str, LazyTensor]]:
    """The same tensors, with a bar on the terminal that counts the bytes read of them."""
    total = sum(prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        yield {name: _counting(tensor, bar) for name, tensor in tensors.items()}


def _counting(tensor: LazyTensor, bar: tqdm[None]) -> LazyTensor:
    def load() -> torch.Tensor:
        values = tensor.load()
        bar.update(values.nbytes)
        return values

    return LazyTensor(shape=tensor.shape, dtype=tensor.dtype, load=load)
