"""MegaVL's code paths for CUDA, on a stand-in for CUDA devices (`tests/numerics/stand_in_cuda`).

No CUDA kernel runs here; `bash launch/bench/gpu.sh` runs the same tests on a GPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_run import ROOT, environment, forked, metrics, run_training

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the stand-in needs a CPU build of torch"),
]
TOLERANCE = 1e-5
"""Relative, of losses along a run in fp32; attention and collectives sum in another order."""
BAND = 1e-3
"""The same in bf16."""

DEVICE_RULES = """
import warnings
import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

assert torch.cuda.is_available() and torch.ones(2).pin_memory().is_pinned()
x = torch.arange(6.0, device="cuda").view(2, 3)
assert x.is_cuda and x.T.device == torch.device("cuda:0") and x[1].untyped_storage().data_ptr() == x.data_ptr()
view = x[:, 1:]
view.mul_(2)
assert x.tolist() == [[0, 2, 4], [3, 8, 10]], "views share memory"
for wrong in (lambda: x + torch.ones(3), lambda: x @ torch.ones(3, 2), lambda: torch.cat([x, torch.ones(1, 3)])):
    try:
        wrong()
    except RuntimeError as error:
        assert "same device" in str(error)
    else:
        raise AssertionError("tensors of two devices were accepted")

torch.cuda.set_sync_debug_mode("warn")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = (x * 2).sum() + torch.ones((), device="cuda")
    torch.ones(3).to("cuda", non_blocking=True)
    assert not caught, "none of these waits"
    for waits in (y.item, lambda: x.nonzero(), lambda: x[x > 2], lambda: x.cpu(), lambda: torch.ones(3).to("cuda")):
        caught.clear()
        waits()
        assert caught, "all of these wait"
torch.cuda.set_sync_debug_mode("default")

before = torch.cuda.memory_allocated()
held = torch.zeros(1000, device="cuda")
assert torch.cuda.memory_allocated() - before == 4000
del held
assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + 4000

q, k, v = (torch.randn(12, 2, 16, device="cuda").bfloat16().requires_grad_() for _ in range(3))
borders = torch.tensor([0, 5, 12], dtype=torch.int32, device="cuda")
out = varlen_attn(q, k, v, borders, borders, 7, 7, scale=0.3, window_size=(-1, 0))
weight = torch.randn_like(out)
found = torch.autograd.grad((out * weight).sum(), (q, k, v))
pieces = [
    F.scaled_dot_product_attention(*(t[a:b].float().transpose(0, 1) for t in (q, k, v)), is_causal=True, scale=0.3)
    for a, b in ((0, 5), (5, 12))
]
expected = torch.cat([piece.transpose(0, 1) for piece in pieces])
wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
for one, other in zip((out, *found), (expected, *wanted)):
    assert ((one - other).abs().max() / other.abs().max()) < 2e-2

from megavl.config.load import load_model_config
from megavl.train.batch_broadcast import StepPrefetcher
from tests.distributed.synthetic import SyntheticSteps

sizes = {"seq_length": 128, "global_batch_size": 2, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
prefetcher = StepPrefetcher(SyntheticSteps(load_model_config("tiny-siglip"), modality="multimodal", **sizes), steps=1)
batches = prefetcher.get(0)
assert all(batch.images.is_pinned() for batch in batches)
assert [len(batch.images) for batch in batches] == [1, 2]
prefetcher.close()
"""

GRADIENTS = """
from unittest import mock

import torch
from megavl.config.recipe import ParallelConfig
from megavl.model import decoder, weight_gradients
from megavl.parallel import groups
from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import MegaVL, made_up_batches
from launch.bench.engines.step_work import make_work

groups.start(ParallelConfig(), seed=1)
words = {"part": "whole", "layers": 2, "recompute": "none", "memory_bytes": None}


def gradients(precision, fused):
    work = make_work("tiny", micro_batches=3, precision=precision, **words)
    with mock.patch.object(decoder, "fuses_weight_gradients", lambda: fused):
        side = MegaVL(work, marks=Marks(), lr=1e-12, local=False, weights=random_tensors(work.recipe.model))
    calls = weight_gradients.layers.fused_weight_gradient_mlp_cuda
    with mock.patch.object(calls, "wgrad_gemm_accum_fp32", wraps=weight_gradients.add_weight_gradient) as product:
        side.step(side.prepare(made_up_batches(work, "text", steps=1)[0], "text"))
    # Four projections a layer and the head.
    assert product.call_count == (3 * (2 * 4 + 1) if fused else 0), product.call_count
    (chunk,) = side.model.chunks
    named = chunk.module.language_model.named_parameters()
    return {name: weight.main_grad.double().clone() for name, weight in named if "linear_fc1" in name}


def distance(one, other):
    apart = sum((one[name] - other[name]).square().sum() for name in one)
    return float((apart / sum(value.square().sum() for value in other.values())).sqrt())


assert weight_gradients.fuses_weight_gradients()
exact, fused = gradients("fp32", False), gradients("fp32", True)
print("fp32", distance(fused, exact))
assert distance(fused, exact) < 1e-6
assert 1e-4 < distance(gradients("bf16", True), gradients("bf16", False)) < 1e-2

# Three micro-batches through one projection.
pairs = [[torch.randn(64, width, device="cuda").bfloat16() for width in (24, 40)] for _ in range(3)]
exact = sum(grad.double().t() @ x.double() for x, grad in pairs)
total, rounded = (torch.zeros(40, 24, device="cuda") for _ in range(2))
for x, grad in pairs:
    weight_gradients.add_weight_gradient(x, grad, total)
    rounded += grad.t() @ x
errors = [float((found.double() - exact).norm() / exact.norm()) for found in (total, rounded)]
print("bf16 added in fp32", errors[0], "and after rounding", errors[1])
assert errors[0] < 1e-6 < 1e-4 < errors[1]
"""


def stand_in() -> dict[str, str]:
    """Environment of a process that finds eight devices."""
    path = os.pathsep.join((str(ROOT / "tests/numerics/stand_in_cuda"), str(ROOT)))
    return {**environment(), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


def run(*words: str) -> str:
    """Standard output of Python on the stand-in."""
    env = forked(stand_in())
    done = subprocess.run(
        [env["PYTHON_EXEC"], "-W", "ignore", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_stand_in_follows_the_rules_of_devices() -> None:
    run("-c", DEVICE_RULES)


def test_weight_gradients_are_added_in_fp32(report_table) -> None:
    report_table(f"weight gradients against fp32: {run('-c', GRADIENTS).strip().replace(chr(10), ', ')}")


def test_the_tests_for_gpus_pass_on_it(report_table) -> None:
    """The first fp32 loss and the waits of the host; bf16 follows below."""
    names = "first_loss or host_waits"
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/numerics/test_cuda.py", "-k", names)
    assert "2 passed" in found, found
    for line in found.splitlines():
        if "CUDA against CPU" in line or "host waits" in line:
            report_table(f"stand-in: {line.strip()}")


LAYOUTS = {
    "fp32": ("parallel.tensor=2", "parallel.pipeline=2", "parallel.layout=[1,3]"),
    "bf16": (
        *("parallel.tensor=1", "parallel.sequence_parallel=false", "parallel.pipeline=2"),
        *("parallel.virtual_pipeline=2", "parallel.layout=[1,1,1,1]", "parallel.vision=split_all"),
        *("optimizer.lr=1e-5", "optimizer.min_lr=0"),
    ),
}


@pytest.fixture(scope="module")
def five_steps(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], list[dict[str, Any]]]:
    """Metrics of five steps of four processes in a precision, on the CPU or on the stand-in; each run once."""

    @functools.cache
    def train(precision: str, stands_in: bool) -> list[dict[str, Any]]:
        run = tmp_path_factory.mktemp(precision)
        words = (*LAYOUTS[precision], f"training.precision={precision}", "training.steps=5")
        words += ("training.micro_batch_size=1", "run.timeline_steps=[2]")
        done = run_training(dataset, run, *words, processes=4, env=stand_in() if stands_in else environment())
        assert done.returncode == 0, done.stderr[-3000:]
        assert (run / "timeline/step_000002.svg").is_file()
        return metrics(run)

    return train


@pytest.mark.parametrize(
    ("precision", "limit"),
    [
        pytest.param("fp32", TOLERANCE, id="fp32 tp2 pp2", marks=pytest.mark.slow),
        pytest.param("bf16", BAND, id="bf16 pp2 vpp2 split_all dp2"),
    ],
)
def test_a_run_trains_as_on_the_cpu(
    five_steps: Callable[[str, bool], list[dict[str, Any]]], precision: str, limit: float, report_table
) -> None:
    """Losses and gradient norms of five steps.

    Adam moves a weight by the learning rate along the sign of its gradient, and rounding decides signs of gradients
    near zero. So the bf16 run takes small steps: at larger ones two runs have other weights, and other norms, on CPUs
    that add in another order. The fp32 run shows that the learning rate is heeded.
    """
    cpu, found = five_steps(precision, False), five_steps(precision, True)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5]
    assert {row["modality"] for row in cpu} == {"text", "multimodal"}
    assert all(row["mfu"] for row in found), "the stand-in's name is in the table of devices"
    losses, norms = (_apart(found, cpu, key) for key in ("loss", "grad_norm"))
    report_table(
        f"five steps in {precision} on the stand-in, against the CPU; losses: limit {limit:.0e}",
        ("losses", *losses),
        ("norms", *norms),
    )
    assert max(losses) <= limit and max(norms) <= 10 * limit


def _apart(found: list[dict[str, Any]], expected: list[dict[str, Any]], key: str) -> list[float]:
    """Relative differences, step by step."""
    return [abs(a[key] / b[key] - 1) for a, b in zip(found, expected, strict=True)]
