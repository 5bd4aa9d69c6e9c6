"""What newer releases of megatron-core name otherwise, or import without need."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from megavl.parallel import releases
from megavl.parallel.releases import allow_missing_triton, gradients_for_norm

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


@pytest.mark.parametrize(
    ("release", "triton", "replaced"), [((0, 18), False, True), ((0, 19), True, False), ((0, 16), False, False)]
)
def test_kernels_without_triton_are_replaced(
    monkeypatch: pytest.MonkeyPatch, release: tuple[int, int], triton: bool, replaced: bool
) -> None:
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.setattr(releases, "_release", lambda: release)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    allow_missing_triton()
    found = sys.modules.pop(MODULE, None)
    assert (found is not None) == replaced
    if found is not None:
        assert not hasattr(found, "__path__")
        with pytest.raises(ImportError, match="paged_stash_reset needs triton"):
            found.paged_stash_reset(enabled=True)
