"""The loss curve of a small run stays what it was; `make golden` rewrites the file after an intended change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.bench.engines.random_models import random_weights
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig
from megavl.model.build import BuildSpec
from megavl.model.kernels import Level
from megavl.parallel import groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.schedule import learning_rate
from megavl.train.step import train_step
from tests.distributed.synthetic import SyntheticSteps

GOLDEN = Path(__file__).parent / "golden" / "tiny_hybrid_fp32.txt"
STEPS = 8
# Kernels differ between processors; over eight steps rounding stays far below this.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A world of one process."""
    groups.start(ParallelConfig(), seed=1)
    yield
    groups.stop()


@pytest.mark.filterwarnings("ignore:training.compile. TORCHDYNAMO_DISABLE")
@pytest.mark.parametrize("compiled", ["none", "kernels", "layers"])
def test_loss_curve_matches_the_golden_file(compiled: Level, update_golden: bool, report_table: Any) -> None:
    """Under `make test` the compiler is off, so that the formulas of the kernels run op by op."""
    losses = _curve(compiled)
    if update_golden and compiled == "none":
        GOLDEN.write_text("".join(f"{loss:.8f}\n" for loss in losses))
    golden = [float(line) for line in GOLDEN.read_text().splitlines()]
    error = max(abs(a - b) / b for a, b in zip(losses, golden, strict=True))
    report_table(f"{compiled}: loss curve against {GOLDEN.name}: {error:.1e} relative (tolerance {TOLERANCE:.0e})")
    assert error <= TOLERANCE
    assert losses[-2] < losses[0]


@pytest.mark.slow
def test_compiled_curves_match_it_too() -> None:
    variables = {
        name: value for name, value in os.environ.items() if not name.endswith(("DYNAMO_DISABLE", "COMPILE_DISABLE"))
    }
    words = ["-m", "pytest", "-q", "-s", "-W", "error:training.compile", __file__, "-m", "not slow"]
    done = subprocess.run(
        [sys.executable, *words],
        env={**variables, "TORCH_LOGS": "output_code"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    assert "cpp_fused" in done.stdout + done.stderr, "nothing was compiled"


def _curve(compiled: Level) -> list[float]:
    config, parallel = load_model_config("tiny-hybrid"), ParallelConfig()
    settings = OptimizerConfig(lr=1e-3, warmup_steps=2)
    spec = BuildSpec(model=config, parallel=parallel, train=TRAINABLE_PARTS, seed=1, compile=compiled)
    if spec.compiled != compiled:
        pytest.skip("no C++ compiler")
    model = build_model_chunks(spec)
    model.chunks[0].module.load_state_dict(dict(random_weights(config)), strict=False)
    optimizer = build_optimizer(model, optimizer=settings, bf16=False)
    losses = []
    for step in range(STEPS):
        source = SyntheticSteps(
            config,
            modality="text" if step % 2 else "multimodal",
            seq_length=160,
            global_batch_size=2,
            micro_batch_size=1,
            dp_rank=0,
            dp_size=1,
        )
        set_learning_rate(
            optimizer, lr=learning_rate(settings, step=step + 1, steps=STEPS), weight_decay=settings.weight_decay
        )
        losses.append(train_step(model, optimizer, next_step(source, 0), stop_flag=False).loss)
    return losses
