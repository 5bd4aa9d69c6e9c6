"""The benchmark of training steps compares equal work: losses, FLOPs, parts, and the regions of its time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import REGIONS, Marks
from launch.bench.engines.step_sides import MegaVL, Transformers, made_up_batches
from launch.bench.engines.step_speed import idle_share, measure, parse, vendor_peak
from launch.bench.engines.step_work import PARTS, make_work
from launch.bench.programs import json_lines, run
from megavl.config.recipe import ParallelConfig
from megavl.parallel import groups

KINDS = ("text", "multimodal")
TOLERANCE = 1e-5
"""Relative, fp32; measured 2e-7."""
LR = 1e-4


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    # Convolutions would otherwise round to TF32 on CUDA.
    torch.backends.cudnn.allow_tf32 = False
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


def tiny(model: str = "tiny", part: str = "whole"):
    return make_work(model, part=part, layers=2, micro_batches=2, recompute="none", precision="fp32", memory_bytes=None)


def losses(side, work, kind: str) -> list[float]:
    data = side.prepare(made_up_batches(work, kind, steps=1)[0], kind)
    return [float(side.step(data)) for _ in range(3)]


@pytest.mark.parametrize("model", ["tiny", "tiny-siglip"])
def test_all_sides_train_alike(model: str, report_table) -> None:
    work = tiny(model)
    weights = random_tensors(work.recipe.model)
    for kind in KINDS:
        expected = losses(Transformers(work, marks=Marks(), lr=LR, weights=weights), work, kind)
        assert expected[-1] < expected[0] - 0.01, "the steps train"
        sides = {
            "megavl": MegaVL(work, marks=Marks(), lr=LR, local=False, weights=weights),
            "megatron-local": MegaVL(work, marks=Marks(), lr=LR, local=True, weights=weights),
            "checkpointing": Transformers(work, marks=Marks(), lr=LR, weights=weights, checkpointing=True),
        }
        for name, side in sides.items():
            found = losses(side, work, kind)
            errors = [abs(a / b - 1) for a, b in zip(found, expected)]
            report_table(f"{model}, {kind}, {name} against transformers: {max(errors):.1e} over three steps")
            assert max(errors) < TOLERANCE


@pytest.mark.parametrize("model", ["tiny", "tiny-siglip"])
def test_transformers_trains_in_bf16_from_own_weights(model: str) -> None:
    """As the large models do, which draw their own weights."""
    work = tiny(model)
    training = dataclasses.replace(work.recipe.training, precision="bf16")
    work = dataclasses.replace(work, recipe=dataclasses.replace(work.recipe, training=training))
    side = Transformers(work, marks=Marks(), lr=LR, weights=None, checkpointing=True)
    assert {parameter.dtype for parameter in side.model.parameters()} == {torch.bfloat16}
    assert side.model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32, "as from_pretrained leaves it"
    for kind in KINDS:
        found = losses(side, work, kind)
        assert found[-1] < found[0]


def test_the_local_attention_is_megatron_cores_own() -> None:
    work = tiny()
    names = {}
    for local in (False, True):
        side = MegaVL(work, marks=Marks(), lr=LR, local=local, weights=None)
        layers = side.model.chunks[0].module.language_model.decoder.layers
        names[local] = {type(layer.self_attention.core_attention).__name__ for layer in layers}
    assert names == {False: {"PackedAttention"}, True: {"LocalAttention"}}


def test_parts_hold_what_their_names_say() -> None:
    held = {}
    for part in PARTS:
        work = tiny(part=part)
        side = MegaVL(work, marks=Marks(), lr=LR, local=False, weights=random_tensors(work.recipe.model))
        stage = side.model.chunks[0].module
        held[part] = {name.split(".")[1] if name.startswith("language") else "vision" for name in stage.state_dict()}
        before = {name: weight.clone() for name, weight in stage.named_parameters() if weight.requires_grad}
        losses(side, work, "text" if part == "last" else "multimodal")
        moved = {name for name, weight in stage.named_parameters() if name in before and not weight.equal(before[name])}
        assert moved == set(before), "every trained weight of the part gets a gradient"
    assert held == {
        "whole": {"vision", "embedding", "decoder", "output_layer"},
        "first": {"vision", "embedding", "decoder"},
        "last": {"decoder", "output_layer"},
    }


def test_two_parts_are_one_model() -> None:
    def of(part: str, layers: int):
        return make_work(
            "7b", part=part, layers=layers, micro_batches=4, recompute="none", precision="bf16", memory_bytes=None
        )

    for kind in KINDS:
        assert of("first", 8).flops(kind) + of("last", 22).flops("text") == of("whole", 30).flops(kind)
    assert of("first", 8).memory().weights + of("last", 22).memory().weights == of("whole", 30).memory().weights


def test_as_many_layers_as_fit() -> None:
    def most(memory_bytes: float) -> int:
        work = make_work(
            "7b", part="first", layers=0, micro_batches=1, recompute="none", precision="bf16", memory_bytes=memory_bytes
        )
        assert work.memory().total <= memory_bytes
        return work.recipe.model.llm.num_layers

    assert 0 < most(40e9) < most(80e9) < most(125e9) < 30 == most(1e12)
    with pytest.raises(SystemExit, match="not even one layer fits"):
        most(1e9)


@pytest.mark.parametrize("part", PARTS)
def test_marks_cover_the_step(part: str, tmp_path: Path) -> None:
    kind, trace = "text" if part == "last" else "multimodal", tmp_path / "trace.json.gz"
    words = ["--part", part, "--kind", kind, "--steps", "2", "--warm-up", "1", "--precision", "fp32"]
    work, marks = tiny(part=part), Marks()
    side = MegaVL(work, marks=marks, lr=LR, local=False, weights=None)
    found = measure(side, work, kind, arguments=parse([*words, "--profile", str(trace)]), marks=marks)
    assert len(found["seconds"]) == 2 and len(found["losses"]) == 3
    assert set(found["regions"]) == set(REGIONS) and sum(found["regions"].values()) == pytest.approx(1.0)
    empty = {"whole": set(), "first": {"head"}, "last": set()}[part]
    assert {name for name, share in found["regions"].items() if share == 0} == empty
    assert trace.stat().st_size > 1000 and found["profile"]["operators"][0]["ms"] > 0
    assert found["flops"] == work.flops(kind) and (found["mfu"] is None) == (vendor_peak("fp32") is None)


def test_marks_become_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0, 11.0, 15.0])
    monkeypatch.setattr("launch.bench.engines.step_marks.time.perf_counter", lambda: next(times))
    marks = Marks()
    marks.on_cuda = False
    for name in ("step", "vision", "decoder", "head", "decoder", "step", "optimizer", "end"):
        marks.mark(name)
    first, second = marks.steps()
    assert {name: value for name, value in first.items() if value} == {
        "step": 10.0,
        "vision": 2.0,
        "decoder": 1.0 + 4.0,
        "head": 2.0,
        "other": 1.0,
    }
    assert (second["step"], second["optimizer"], second["other"]) == (5.0, 4.0, 1.0)


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_share([(0, 4), (2, 5), (6, 8), (9, 10)]) == pytest.approx(0.2)
    assert idle_share([(3, 9), (4, 5), (1, 3)]) == 0


def test_stock_attention_refuses_segments() -> None:
    work = tiny()
    side = MegaVL(work, marks=Marks(), lr=LR, local=True, weights=None)
    (batch, _) = made_up_batches(work, "text", steps=1)[0]
    batch = dataclasses.replace(batch, borders=(0, 7, len(batch.tokens)))
    with pytest.raises(AssertionError, match="one document a sequence"):
        side.step(side.prepare([batch], "text"))


@pytest.mark.slow
def test_compiled_steps_train_as_plain_ones(report_table) -> None:
    """The only test that really compiles, which takes a minute."""
    words = ["--side", "megavl", "--model", "tiny", "--precision", "fp32", "--lr", LR, "--threads", 1]
    found = {}
    for level in ("none", "kernels", "layers"):
        text, failure = run(
            "launch.bench.engines.step_speed", *words, "--steps", 3, "--compiled", level, gpu=True, limit=1800
        )
        assert not failure, failure
        found[level] = {row["kind"]: row["losses"] for row in json_lines(text)}
    for level in ("kernels", "layers"):
        for kind in KINDS:
            errors = [abs(a / b - 1) for a, b in zip(found[level][kind], found["none"][kind], strict=True)]
            report_table(f"{level}, {kind}: {max(errors):.1e} over {len(errors)} steps (tolerance {TOLERANCE:.0e})")
            assert found[level][kind][-1] < found[level][kind][0] and max(errors) < TOLERANCE
