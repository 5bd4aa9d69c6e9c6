"""The loss that overwrites its logits, against torch's cross-entropy in fp64 of the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megavl.config.recipe import ParallelConfig
from megavl.model import kernels
from megavl.model.loss import vocab_parallel_loss
from megavl.parallel import groups

ROWS, VOCABULARY = 37, 1000
KERNEL = 0
"""Instead of a chunk."""
ROUNDINGS = 10
"""Additions in a row that a sum over the vocabulary takes when pairs are added: log2(1000)."""


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 1 << 20, KERNEL])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradient(dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch, report_table: Any) -> None:
    """One row at a time, some, all, or all by a kernel; some labels are nearly certain, some nearly impossible.

    Errors are measured in roundings of what is added up: logit x and logsumexp for a loss and for the exponent of a
    probability p, p and 1 for the gradient p - 1 of a label. Rounding p itself to bf16 would be off by thousands.
    """
    monkeypatch.setattr(kernels, "CHUNK", chunk)
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
    found = vocab_parallel_loss(leaf * 1, labels, group=dist.group.WORLD, compiled=chunk == KERNEL)
    (gradient,) = torch.autograd.grad((found * scale).sum(), leaf)
    wide = torch.promote_types(dtype, torch.float32)
    assert found.dtype == wide and gradient.dtype == dtype
    size = exact.detach().abs() + exact.detach().logsumexp(1).abs()[:, None]
    rows = torch.arange(ROWS)
    off = (found - expected).abs() / size[rows, labels]
    sizes = expected_gradient.abs() * size
    # torch computes the reference's p - 1 from x - logsumexp, rounded to fp64.
    sizes[rows, labels] = scale.double() * (size[rows, labels] if wide == torch.float64 else 1.0)
    rounded = torch.finfo(dtype).eps * expected_gradient.abs() if dtype != wide else 0.0
    off_gradient = ((gradient.double() - expected_gradient).abs() - rounded).clamp(min=0) / sizes
    errors = [float(each.max()) / torch.finfo(wide).eps for each in (off, off_gradient)]
    report_table((f"{dtype}, {chunk} at once: loss, gradient", *errors, f"roundings; tolerance {ROUNDINGS}"))
    assert max(errors) < ROUNDINGS


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
