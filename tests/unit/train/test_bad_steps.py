"""Loss and gradients that are not finite change nothing; the optimizer's groups are what the modality rule needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig, RecomputeConfig
from megavl.parallel import groups
from megavl.train.feed import next_step
from megavl.train.optimizer import VISION_GROUP, build_optimizer, set_learning_rate
from megavl.train.rank_model import RankModel, build_rank_model
from megavl.train.step import train_step
from tests.distributed.synthetic import SyntheticSteps

PARALLEL = ParallelConfig()
CONFIG = load_model_config("tiny-siglip")


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(PARALLEL, seed=1)
    yield
    groups.stop()


def _build(bf16: bool = False, distributed_optimizer: bool = True) -> tuple:
    model = build_rank_model(
        CONFIG,
        parallel=dataclasses.replace(
            PARALLEL, distributed_optimizer=distributed_optimizer, overlap_param_gather=distributed_optimizer
        ),
        recompute=RecomputeConfig(),
        layout=None,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        train=tuple(part for part in TRAINABLE_PARTS if not part.startswith("sam")),
        seed=1,
    )
    optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1), bf16=bf16)
    set_learning_rate(optimizer, lr=1e-3, weight_decay=0.1)
    return model, optimizer


def _data(modality: str, step: int = 0):
    source = SyntheticSteps(
        CONFIG, modality=modality, seq_length=128, global_batch_size=2, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    return next_step(source, step)


def _weights(model: RankModel) -> dict[str, torch.Tensor]:
    model.gather_weights()
    return {name: p.detach().clone() for name, p in model.chunks[0].module.named_parameters()}


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_norm_is_megatron_cores_and_one_kernel_updates(bf16: bool, distributed_optimizer: bool) -> None:
    model, optimizer = _build(bf16, distributed_optimizer)
    (part,) = optimizer.chained_optimizers
    seen: list[float] = []

    def update() -> bool:
        # Clipping has scaled the gradients to a norm of 1 by now.
        seen.append(get_grad_norm_fp32(part.get_main_grads_for_grad_norm(), grad_stats_parallel_group=None))
        return type(part).step_with_ready_grads(part)

    part.step_with_ready_grads = update
    found = train_step(model, optimizer, _data("multimodal"), stop_flag=False)
    assert found.grad_norm > 1 and seen == [pytest.approx(1.0, rel=1e-5)]
    assert all(group["fused"] for group in optimizer.param_groups)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert train_step(model, optimizer, _data("text"), stop_flag=False).grad_norm > 0
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    optimizer.load_state_dict(state)
    assert all(group["fused"] for group in optimizer.param_groups), "a file does not say how torch computes"


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_not_finite_gradient_skips_the_step(bf16: bool, distributed_optimizer: bool) -> None:
    model, optimizer = _build(bf16, distributed_optimizer)
    good = train_step(model, optimizer, _data("multimodal"), stop_flag=False)
    assert not good.skipped and good.grad_norm > 0
    before = _weights(model)
    weight = model.chunks[0].module.language_model.decoder.final_layernorm.weight
    kept = weight.detach().clone()
    handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    bad = train_step(model, optimizer, _data("multimodal", 1), stop_flag=True)
    handle.remove()
    assert bad.skipped and bad.grad_norm is None and bad.asked_to_stop
    assert torch.isfinite(torch.tensor(bad.loss))
    assert all(torch.equal(before[name], value) for name, value in _weights(model).items())
    with torch.no_grad():
        weight.fill_(float("inf"))
    assert train_step(model, optimizer, _data("text"), stop_flag=False).skipped
    with torch.no_grad():
        weight.copy_(kept)
    assert not train_step(model, optimizer, _data("text"), stop_flag=False).skipped


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_groups_separate_vision_and_decay(distributed_optimizer: bool) -> None:
    model, optimizer = _build(distributed_optimizer=distributed_optimizer)
    seen = {(group.get("name"), group["wd_mult"]): group for group in optimizer.param_groups}
    assert set(seen) == {(None, 1.0), (None, 0.0), (VISION_GROUP, 1.0), (VISION_GROUP, 0.0)}
    assert {key: group["weight_decay"] for key, group in seen.items()} == {
        (None, 1.0): 0.1,
        (None, 0.0): 0.0,
        (VISION_GROUP, 1.0): 0.1,
        (VISION_GROUP, 0.0): 0.0,
    }
    before = _weights(model)
    train_step(model, optimizer, _data("multimodal"), stop_flag=False)
    after = _weights(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"vision", "language_model"}
    train_step(model, optimizer, _data("text"), stop_flag=False)
    last = _weights(model)
    assert all(torch.equal(after[name], last[name]) for name in last if name.startswith("vision."))
    assert not torch.equal(after["language_model.output_layer.weight"], last["language_model.output_layer.weight"])
