"""CUDA computes what the CPU computes, from the same weights, batches and recipe, in one process for each device.

`bash launch/bench/gpu.sh` runs this file on a machine with a GPU; elsewhere only the limits themselves are tested.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from functools import cache

import pytest
import torch

from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import MegaVL, made_up_batches
from launch.bench.engines.step_work import make_work
from launch.bench.programs import ask
from megavl.config.recipe import ParallelConfig
from megavl.parallel import groups

KINDS = ("text", "multimodal")
# torch asks for it once in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
LOSS_TOLERANCE = 1e-4
"""Relative, of the first loss in fp32."""
STEPS = 20
ALONE = ParallelConfig()
BAND = 0.05
"""Relative, of every loss along 20 steps in bf16, along which the loss falls to less than two thirds.

On the CPU, bf16 stays within 1.8e-2 of fp32.
"""
LR = 1e-3
ON_CUDA = torch.cuda.is_available()

needs_cuda = pytest.mark.skipif(not ON_CUDA, reason="no CUDA here; launch/bench/gpu.sh runs this on a GPU")


@cache
def curves(device: str, precision: str, *, steps: int, lr: float = LR) -> dict[str, list[float]]:
    """Losses of training the tiny model, by kind of step; the multimodal steps follow the text ones."""
    words = ("--model", "tiny", "--threads", 1, "--precision", precision, "--warm-up", 0, "--steps", steps, "--lr", lr)
    rows = ask("launch.bench.engines.step_speed", *words, gpu=device == "cuda")
    return {row["kind"]: row["losses"] for row in rows}


def distance(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


@needs_cuda
def test_first_loss_in_fp32_agrees(report_table) -> None:
    # At this learning rate the text step leaves the weights unchanged for the multimodal step.
    cpu, cuda = (curves(device, "fp32", steps=1, lr=1e-12) for device in ("cpu", "cuda"))
    errors = {kind: distance(cuda[kind][:1], cpu[kind][:1]) for kind in KINDS}
    report_table(f"first loss, CUDA against CPU, fp32: {errors}, limit {LOSS_TOLERANCE:.0e}")
    assert max(errors.values()) <= LOSS_TOLERANCE


@needs_cuda
def test_twenty_bf16_steps_agree(report_table) -> None:
    cpu, cuda = (curves(device, "bf16", steps=STEPS) for device in ("cpu", "cuda"))
    errors = {kind: distance(cuda[kind], cpu[kind]) for kind in KINDS}
    report_table(f"{STEPS} steps, CUDA against CPU, bf16: {errors}, band {BAND}")
    assert max(errors.values()) <= BAND


@needs_cuda
def test_the_host_waits_once_in_a_step(report_table) -> None:
    """It waits for the step's totals at the end, however many micro-batches there are."""
    groups.start(ParallelConfig(), seed=1)
    try:
        waits = {count: host_waits(count) for count in (1, 4)}
    finally:
        groups.stop()
    report_table(f"times that the host waits for the device, by micro-batches of a step: {waits}")
    assert waits == {1: 1, 4: 1}


def host_waits(micro_batches: int) -> int:
    """Synchronising calls of one multimodal step."""
    words = {"part": "whole", "layers": 0, "recompute": "none", "memory_bytes": None, "precision": "bf16"}
    work = make_work("tiny", micro_batches=micro_batches, **words)
    side = MegaVL(work, marks=Marks(), lr=LR, local=False, weights=random_tensors(work.recipe.model))
    first, second = (side.prepare(batches, KINDS[1]) for batches in made_up_batches(work, KINDS[1], steps=2))
    side.step(first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            side.step(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def test_a_deterministic_run_repeats_its_bits() -> None:
    parallel = ParallelConfig(deterministic=True)
    # A CPU adds in one order anyway, and is slow.
    steps = STEPS if ON_CUDA else 3
    groups.start(parallel, seed=1)
    try:
        assert torch.are_deterministic_algorithms_enabled() and os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"
        first, second = (own_curve("bf16", lr=LR, kind="multimodal", parallel=parallel, steps=steps) for _ in range(2))
    finally:
        groups.stop()
        torch.use_deterministic_algorithms(False)
    assert first == second and first[-1] < first[0]


def test_the_band_admits_rounding_only(report_table) -> None:
    groups.start(ParallelConfig(), seed=1)
    try:
        fp32, bf16, slower = own_curve("fp32", lr=LR), own_curve("bf16", lr=LR), own_curve("fp32", lr=LR / 2)
    finally:
        groups.stop()
    assert fp32[-1] < 2 / 3 * fp32[0], "the loss falls in these steps"
    rounding, wrong = distance(bf16, fp32), distance(slower, fp32)
    report_table(f"{STEPS} steps here: bf16 against fp32 {rounding:.1e}, half the rate {wrong:.1e}, band {BAND}")
    assert rounding <= BAND < wrong


def own_curve(
    precision: str, *, lr: float, kind: str = "text", parallel: ParallelConfig = ALONE, steps: int = STEPS
) -> list[float]:
    """Losses of the tiny model's steps in this process."""
    words = {"part": "whole", "layers": 0, "micro_batches": 1, "recompute": "none", "memory_bytes": None}
    work = make_work("tiny", precision=precision, **words)
    work = dataclasses.replace(work, recipe=dataclasses.replace(work.recipe, parallel=parallel))
    side = MegaVL(work, marks=Marks(), lr=lr, local=False, weights=random_tensors(work.recipe.model))
    data = [side.prepare(batches, kind) for batches in made_up_batches(work, kind, steps=2)]
    return [side.step(data[step % 2]) for step in range(steps)]
