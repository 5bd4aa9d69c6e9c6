"""The head where the loss counts, against the head at every position and a mask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from launch.bench.engines.random_models import random_weights
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, ParallelConfig
from megavl.data.batch import make_batch
from megavl.model.build import BuildSpec
from megavl.model.loss import counted_loss, loss_by_source
from megavl.parallel import groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from tests.distributed.synthetic import SyntheticSteps

TOLERANCE = 1e-5
LENGTH = 160
CONFIG = load_model_config("tiny-hybrid")


@pytest.fixture(scope="module")
def model() -> Iterator[ModelChunks]:
    groups.start(ParallelConfig(), seed=1)
    built = build_model_chunks(BuildSpec(model=CONFIG, train=TRAINABLE_PARTS, seed=1))
    built.chunks[0].module.load_state_dict(dict(random_weights(CONFIG)), strict=False)
    yield built
    groups.stop()


def steps(modality: str) -> SyntheticSteps:
    return SyntheticSteps(
        CONFIG, modality=modality, seq_length=LENGTH, global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1
    )


@pytest.mark.parametrize("modality", ["text", "multimodal"])
def test_loss_and_gradients_equal_the_masked_loss(model: ModelChunks, modality: str, report_table: Any) -> None:
    (batch,) = next_step(steps(modality), 0)
    assert 0 < len(batch.loss_rows) < LENGTH
    stage = model.chunks[0].module
    weights = dict(stage.named_parameters())
    total, count, _ = counted_loss(stage(batch))
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    mask = torch.zeros(LENGTH).index_fill(0, batch.loss_rows, 1)
    per_token = F.cross_entropy(stage.logits(batch), batch.tokens.roll(-1), reduction="none")
    masked = (per_token * mask).sum()
    wanted = torch.autograd.grad(masked, list(weights.values()), allow_unused=True)
    assert int(count) == int(mask.sum())
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True) if b is not None)
    loss_error = abs(float(total - masked)) / float(masked)
    report_table(f"{modality}: loss {loss_error:.1e}, gradients {error:.1e} relative (tolerance {TOLERANCE:.0e})")
    assert max(error, loss_error) <= TOLERANCE
    assert [a is None for a in found] == [b is None for b in wanted]


def test_losses_of_sources_are_told_apart() -> None:
    """Sequences of 4 tokens of the sources 2, 0, 2 and 1, the last without a label."""
    mask = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    batch = make_batch(torch.arange(16), loss_mask=mask, sources=(2, 0, 2, 1))
    per_token = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.nan]])
    assert loss_by_source(per_token[:, :6].repeat(1, 2)[:, :7], batch=batch, sources=4).tolist() == [
        [28.0, 3.0],
        [0.0, 0.0],
        [36.0, 4.0],
        [0.0, 0.0],
    ]
    alone = loss_by_source(per_token[:, :3], batch=make_batch(torch.arange(4), sources=(1,)), sources=2)
    assert alone.tolist() == [[0.0, 0.0], [7.0, 3.0]]
    found = loss_by_source(per_token, batch=batch, sources=3)
    assert found[0].tolist() == [28.0, 3.0] and math.isnan(float(found[2, 0])) and found[1].tolist() == [0.0, 0.0]


def test_no_labels_give_zero_gradients(model: ModelChunks) -> None:
    """As when all its samples failed to load; gradient reduction waits for every weight."""
    stage = model.chunks[0].module
    total, count, report = counted_loss(stage(make_batch(torch.ones(8, dtype=torch.int64))))
    weights = list(stage.language_model.parameters())
    assert (float(total), int(count), report["loss"].tolist()) == (0.0, 0, [0.0, 0.0])
    assert not any(gradient.any() for gradient in torch.autograd.grad(total, weights))
