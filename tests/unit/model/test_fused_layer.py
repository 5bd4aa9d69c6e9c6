"""Fused parts and layers give the losses and gradients of the plain ones, under every kind of recomputation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, ParallelConfig, RecomputeConfig
from megavl.model import kernels
from megavl.model.build import BuildSpec
from megavl.model.fused_layer import FusedLayer
from megavl.parallel import groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.step import forward_backward
from tests.distributed.synthetic import SyntheticSteps

LENGTH = 160
MODEL = load_model_config("tiny-hybrid")
CONFIG = dataclasses.replace(MODEL, llm=dataclasses.replace(MODEL.llm, num_layers=2))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
RECOMPUTE = {
    "none": RecomputeConfig(),
    "attention": RecomputeConfig(granularity="selective"),
    "attention and mlp": RecomputeConfig(granularity="selective", modules=("core_attn", "mlp")),
    "full": RecomputeConfig(granularity="full", num_layers=2),
}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    groups.start(ParallelConfig(), seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training.compile: TORCHDYNAMO_DISABLE")
        yield
    groups.stop()


def gradients(
    compiled: Any, *, dtype: torch.dtype, recompute: str = "none", train: tuple[str, ...] = TRAINABLE_PARTS
) -> tuple[float, dict[str, torch.Tensor], ModelChunks]:
    """Sum of the losses and the gradient buffers of one step with two micro-batches."""
    spec = BuildSpec(model=CONFIG, dtype=dtype, train=train, seed=1, recompute=RECOMPUTE[recompute], compile=compiled)
    model = build_model_chunks(spec)
    source = SyntheticSteps(
        CONFIG,
        modality="multimodal",
        seq_length=LENGTH,
        global_batch_size=2,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
    )
    model.zero_grad()
    losses = forward_backward(model, next_step(source, 0))
    (chunk,) = model.chunks
    named = chunk.module.named_parameters()
    return float(losses[0, 0]), {name: w.main_grad.clone() for name, w in named if w.requires_grad}, model


@pytest.fixture(scope="module")
def plain() -> dict[torch.dtype, tuple[float, dict[str, torch.Tensor]]]:
    return {dtype: gradients("none", dtype=dtype)[:2] for dtype in TOLERANCES}


@pytest.mark.parametrize(
    ("compiled", "dtype", "recompute"),
    [
        *(("layers", torch.float64, recompute) for recompute in RECOMPUTE),
        ("layers", torch.float32, "attention and mlp"),
        ("kernels", torch.float64, "none"),
        ("kernels", torch.float32, "full"),
    ],
)
def test_fused_gradients_equal_the_plain_ones(
    plain: Any, compiled: str, dtype: torch.dtype, recompute: str, report_table: Any
) -> None:
    loss, found, model = gradients(compiled, dtype=dtype, recompute=recompute)
    wanted_loss, wanted = plain[dtype]
    layers = model.chunks[0].module.language_model.decoder.layers
    assert all(isinstance(layer, FusedLayer) == (compiled == "layers") for layer in layers)
    error = max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)
    error = max(error, abs(loss / wanted_loss - 1))
    report_table(f"{compiled}, {dtype}, recompute {recompute}: {error:.1e} relative (tolerance {TOLERANCES[dtype]})")
    assert found.keys() == wanted.keys() and error <= TOLERANCES[dtype]


def test_frozen_decoder_passes_gradients_on(plain: Any) -> None:
    _, found, _ = gradients("layers", dtype=torch.float64, train=("adaptor",))
    wanted = plain[torch.float64][1]
    assert found and all(name.startswith("vision.adaptor.") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-12 * float(wanted[name].abs().max()))


def test_failing_compiler_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CppCompileError: g++ not found\nlong output")

    monkeypatch.setattr(kernels, "_failed", False)
    kernel, other = kernels.Kernel(lambda x: x + 1), kernels.Kernel(lambda x: x + 2)
    monkeypatch.setattr(kernel, "_compiled", broken)
    monkeypatch.setattr(other, "_compiled", broken)
    with pytest.warns(
        UserWarning, match=r"training\.compile: torch\.compile failed \(RuntimeError: CppCompile"
    ) as seen:
        assert float(kernel(torch.ones(1))) == 2
        assert float(other(torch.ones(1))) == 3
        assert float(kernel(torch.ones(1))) == 2
    assert len(seen) == 1 and "long output" not in str(seen[0].message)


def test_missing_compiler_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(kernels, "_missing", kernels._missing.__wrapped__)
    with pytest.warns(UserWarning, match=r"training\.compile: torch\.compile needs a compiler"):
        assert kernels.compile_level("layers") == "none"
    assert kernels.compile_level("none") == "none"
