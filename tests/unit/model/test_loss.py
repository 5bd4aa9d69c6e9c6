"""The loss that overwrites its logits, against torch's cross-entropy in fp64 of the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megavl.config.recipe import ParallelConfig
from megavl.model import loss
from megavl.model.loss import vocab_parallel_loss
from megavl.parallel import groups

ROWS, VOCABULARY = 37, 1000
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Of the gradient, against its largest value; bf16 rounds to 8 bits."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("dtype", LIMITS)
def test_loss_and_gradient(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch, report_table: Any) -> None:
    """Whole rows at a time, some of them, or all; some labels are nearly certain, some nearly impossible."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    torch.manual_seed(0)
    labels = torch.randint(VOCABULARY, (ROWS,))
    logits = torch.randn(ROWS, VOCABULARY) * 3
    logits[torch.arange(10), labels[:10]] = 20.0
    logits[torch.arange(10, 20), labels[10:20]] = -40.0
    logits = logits.to(dtype)
    scale = torch.rand(ROWS) + 0.5
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * scale).sum(), exact)
    leaf = logits.clone().requires_grad_()
    found = vocab_parallel_loss(leaf * 1, labels, group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad((found * scale).sum(), leaf)
    error = float((found - expected).abs().max() / expected.max())
    of_gradient = float((gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max())
    certain = (torch.arange(10), labels[:10])
    # 1 - p is tiny there: its own relative error shows whether p was rounded before the subtraction.
    of_certain = float((gradient.double()[certain] / expected_gradient[certain] - 1).abs().max())
    report_table(
        f"loss of {dtype} logits, {chunk} at once: {error:.1e} (1e-6), gradient {of_gradient:.1e} "
        f"({LIMITS[dtype]:.0e}), of certain labels {of_certain:.1e} (1e-2)"
    )
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert error < 1e-6 and of_gradient < LIMITS[dtype] and of_certain < 1e-2


def test_without_a_gradient_the_logits_stay() -> None:
    logits = torch.randn(3, 10)
    before = logits.clone()
    vocab_parallel_loss(logits, torch.tensor([1, 2, 3]), group=dist.group.WORLD)
    assert torch.equal(logits, before)


def test_loss_of_no_rows() -> None:
    logits = torch.zeros(0, 10, requires_grad=True)
    found = vocab_parallel_loss(logits * 1, torch.zeros(0, dtype=torch.int64), group=dist.group.WORLD)
    assert found.shape == (0,)
    found.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 10)
