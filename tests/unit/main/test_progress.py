"""The bar of long conversions: amount, rate and time left on a terminal, nothing elsewhere."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from megavl.convert.lazy import LoadedTensor
from megavl.main.progress import counted

TENSORS = {"a": LoadedTensor(torch.zeros(1000, 1000)), "b": LoadedTensor(torch.zeros(500, 1000, dtype=torch.bfloat16))}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_bar(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with counted(TENSORS, what="from-hf") as tensors:
        for name, tensor in tensors.items():
            assert (tensor.shape, tensor.dtype) == (TENSORS[name].shape, TENSORS[name].dtype)
            assert tensor.load() is TENSORS[name].tensor
            tensors[name].bar.refresh()  # type: ignore[attr-defined]
    shown = stream.getvalue().split("\r")
    if not terminal:
        assert shown == [""]
        return
    halfway = next(line for line in shown if "4.00M/5.00M" in line)
    assert halfway.startswith("from-hf:  80%") and "B/s" in halfway
    assert any("5.00M/5.00M" in line for line in shown)
