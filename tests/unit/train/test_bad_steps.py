"""Loss and gradients that are not finite change nothing; the optimizer's groups are what the modality rule needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig
from megavl.model.build import BuildSpec
from megavl.parallel import groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.optimizer import VISION_GROUP, build_optimizer, set_learning_rate
from megavl.train.step import forward_backward, train_step
from tests.distributed.gather import own_state
from tests.distributed.synthetic import SyntheticSteps

PARALLEL = ParallelConfig()
CONFIG = load_model_config("tiny-siglip", llm={"hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 256})


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(PARALLEL, seed=1)
    yield
    groups.stop()


def _build(bf16: bool = False, distributed_optimizer: bool = True) -> tuple:
    spec = BuildSpec(
        model=CONFIG,
        parallel=dataclasses.replace(
            PARALLEL, distributed_optimizer=distributed_optimizer, overlap_param_gather=distributed_optimizer
        ),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        train=tuple(part for part in TRAINABLE_PARTS if not part.startswith("sam")),
        seed=1,
    )
    model = build_model_chunks(spec)
    optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.1), bf16=bf16)
    set_learning_rate(optimizer, lr=1e-3, weight_decay=0.1)
    return model, optimizer


def _data(modality: str, step: int = 0):
    source = SyntheticSteps(
        CONFIG, modality=modality, seq_length=128, global_batch_size=2, micro_batch_size=1, dp_rank=0, dp_size=1
    )
    return next_step(source, step)


def _weights(model: ModelChunks) -> dict[str, torch.Tensor]:
    model.gather_weights()
    return {name: p.detach().clone() for name, p in model.chunks[0].module.named_parameters()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def _copy_state(
    model: ModelChunks, optimizer: ChainedOptimizer, *, source: ModelChunks, other: ChainedOptimizer
) -> None:
    """Weights, master weights, moments and step counts."""
    for weight, value in zip(model.chunks[0].parameters(), source.chunks[0].parameters(), strict=True):
        weight.copy_(value)
    (part,), (wanted,) = optimizer.chained_optimizers, other.chained_optimizers
    for weight, value in zip(part.get_parameters(), wanted.get_parameters(), strict=True):
        weight.copy_(value)
        for key, tensor in part.optimizer.state[weight].items():
            tensor.copy_(wanted.optimizer.state[value][key])


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, kind: str) -> float:
    pairs = [(one[name], other[name]) for name in other if name.endswith(f" {kind}")]
    return float(sum((a.double() - b.double()).square().sum() for a, b in pairs) ** 0.5)


@pytest.mark.parametrize("clip_grad", [0.1, 0.0])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_equals_megatron_cores(bf16: bool, distributed_optimizer: bool, clip_grad: float, report_table) -> None:
    """Norm, clipping and update decided on the device, against megatron-core's own step, decided on the host."""
    (model, optimizer), (stock, stock_optimizer) = (_build(bf16, distributed_optimizer) for _ in range(2))

    def stock_step(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        updated, norm, _ = ChainedOptimizer.step(stock_optimizer)
        return torch.tensor(norm), torch.tensor(updated)

    stock_optimizer.step = stock_step
    for chained in (optimizer, stock_optimizer):
        chained.config.clip_grad = clip_grad
        for part in chained.chained_optimizers:
            part.config.clip_grad = clip_grad
    errors: dict[str, float] = {}
    for step, kind in enumerate(("multimodal", "text", "multimodal")):
        before = own_state(stock, stock_optimizer)
        result = train_step(model, optimizer, _data(kind, step), stop_flag=False)
        wanted = train_step(stock, stock_optimizer, _data(kind, step), stop_flag=False)
        after, expected = own_state(model, optimizer), own_state(stock, stock_optimizer)
        zero = {name: torch.zeros_like(value) for name, value in expected.items()}
        now = {
            "norm": abs(result.grad_norm / wanted.grad_norm - 1),
            "weights": _distance(after, expected, kind="master") / _distance(before, expected, kind="master"),
            # Moments show how far gradients were clipped, which AdamW's weights hardly do.
            "moments": _distance(after, expected, kind="exp_avg") / _distance(zero, expected, kind="exp_avg"),
        }
        errors = {key: max(value, errors.get(key, 0.0)) for key, value in now.items()}
        assert wanted.grad_norm > 0.5
        # Every step starts from the same numbers: a weight that rounds to another bf16 number would change it.
        _copy_state(model, optimizer, source=stock, other=stock_optimizer)
    found = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_table(f"bf16 {bf16}, clip {clip_grad}, distance to megatron-core's step: {found}, limit 1e-5")
    assert max(errors.values()) <= 1e-5
    assert all(group["fused"] for group in optimizer.param_groups)


def test_loaded_state_does_not_change_the_kernels() -> None:
    model, optimizer = _build()
    train_step(model, optimizer, _data("multimodal"), stop_flag=False)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert train_step(model, optimizer, _data("text"), stop_flag=False).grad_norm > 0
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    optimizer.load_state_dict(state)
    assert all(group["fused"] for group in optimizer.param_groups)


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
@pytest.mark.parametrize("bf16", [False, True])
def test_a_loss_not_finite_changes_no_bit(bf16: bool, distributed_optimizer: bool) -> None:
    """Though every gradient is finite: no weight, master, moment or step count."""
    model, optimizer = _build(bf16, distributed_optimizer)
    train_step(model, optimizer, _data("multimodal"), stop_flag=False)
    model.zero_grad()
    forward_backward(model, _data("multimodal", 1))
    before = own_state(model, optimizer)
    norm, updated = optimizer.step(torch.tensor(float("nan"), dtype=torch.float64))
    assert norm.isfinite() and norm > 0 and not updated
    assert before and _same(before, own_state(model, optimizer))
    norm, updated = optimizer.step(torch.tensor(1.0, dtype=torch.float64))
    after = own_state(model, optimizer)
    assert updated and not any(torch.equal(before[name], after[name]) for name in before if name.endswith(" step"))


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
