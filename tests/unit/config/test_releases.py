"""What newer releases of megatron-core name otherwise, or import without need."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavl.config.releases import allow_missing_triton, gradients_for_norm, parts_of

MODULE = "megatron.core.transformer.moe.paged_stash"


class Older:
    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        return [torch.ones(1)]


class Newer:
    def get_grads_for_grad_norm(self) -> list[torch.Tensor]:
        return [torch.ones(1)]


@pytest.mark.parametrize("optimizer", [Older(), Newer()])
def test_both_names_of_the_gradients(optimizer: Any) -> None:
    assert gradients_for_norm(optimizer) == [torch.ones(1)]


@pytest.mark.parametrize("triton", [False, True])
def test_kernels_without_triton_are_replaced(monkeypatch: pytest.MonkeyPatch, triton: bool) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    allow_missing_triton()
    found = sys.modules.pop(MODULE, None)
    assert (found is None) == triton
    if found is not None:
        assert not hasattr(found, "__path__")
        with pytest.raises(ImportError, match="paged_stash_reset needs triton"):
            found.paged_stash_reset(enabled=True)


def test_both_kinds_of_an_mlp_specification() -> None:
    parts = object()
    assert parts_of(functools.partial(print, submodules=parts)) is parts
    assert parts_of(SimpleNamespace(submodules=parts)) is parts
