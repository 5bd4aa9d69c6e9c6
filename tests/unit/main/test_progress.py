"""The bar of long conversions: amount, rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
import sys
from functools import partial

import pytest
import torch
from tqdm import tqdm

from megavl.main import progress
from megavl.main.progress import counted
from megavl.weights.lazy import LazyTensor

TENSORS = {
    "a": LazyTensor.of(torch.zeros(1000, 1000)),
    "b": LazyTensor.of(torch.zeros(500, 1000, dtype=torch.bfloat16)),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bar(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))
    with counted(TENSORS, what="from-hf") as tensors:
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
            assert tensor.load() is TENSORS[name].load()
    shown = stream.getvalue().split("\r")
    if not terminal:
        assert shown == [""]
        return
    halfway = next(line for line in shown if "4.00M/5.00M" in line)
    assert halfway.startswith("from-hf:  80%") and "B/s" in halfway
    assert any("5.00M/5.00M" in line for line in shown)
