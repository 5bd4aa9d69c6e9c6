"""Every way of cutting the model gives the gradients of one rank (fp32, real gloo processes)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from tests.distributed.synthetic import random_weights

TOLERANCE = 1e-5

CASES: list[dict[str, Any]] = [
    {"name": "1x1x1", "tp": 1, "pp": 1, "dp": 1},
    {"name": "tp2", "tp": 2, "pp": 1, "dp": 1},
    {"name": "pp2", "tp": 1, "pp": 2, "dp": 1},
    {"name": "pp2 uneven 1+3", "tp": 1, "pp": 2, "dp": 1, "layout": [1, 3]},
    {"name": "tp2 pp2", "tp": 2, "pp": 2, "dp": 1},
    {"name": "tp2 pp2 sp", "tp": 2, "pp": 2, "dp": 1, "sp": True},
    {"name": "tp2 pp2 sp uneven 0+4", "tp": 2, "pp": 2, "dp": 1, "sp": True, "layout": [0, 4]},
    {"name": "tp2 dp2", "tp": 2, "pp": 1, "dp": 2},
    {"name": "pp2 dp2", "tp": 1, "pp": 2, "dp": 2},
    {"name": "dp2 mbs2", "tp": 1, "pp": 1, "dp": 2, "mbs": 2},
    {"name": "recompute full", "tp": 1, "pp": 2, "dp": 1, "recompute": {"granularity": "full", "vision": True}},
    {"name": "recompute selective", "tp": 2, "pp": 1, "dp": 1, "recompute": {"granularity": "selective"}},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases run by four processes that are reused from case to case."""
    root = tmp_path_factory.mktemp("layouts")
    config = load_model_config("tiny-hybrid")
    checkpoint = write_model_checkpoint(root / "weights", config=config, tensors=random_weights(config), files={})
    ports = _free_ports(len(CASES))
    plan = {"checkpoint": str(checkpoint), "cases": [{**case, "port": port} for case, port in zip(CASES, ports)]}
    (root / "cases.json").write_text(json.dumps(plan))
    script = Path(__file__).with_name("layout_worker.py")
    repository = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(root / "cases.json"), str(root)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(4)
    ]
    outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    for rank, (worker, output) in enumerate(zip(workers, outputs)):
        assert worker.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    return {case["name"]: torch.load(root / f"{case['name']}.pt") for case in CASES}


@pytest.mark.parametrize("name", [case["name"] for case in CASES[1:]])
def test_layout_equals_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results["1x1x1"], results[name]
    errors = {
        "loss": _relative(found["losses"], reference["losses"]),
        "norm": _relative(found["norms"], reference["norms"]),
    }
    for modality in ("text", "multimodal"):
        pairs = {
            key: (found[f"{modality} gradients"][key], tensor)
            for key, tensor in reference[f"{modality} gradients"].items()
        }
        assert pairs.keys() == found[f"{modality} gradients"].keys()
        errors[modality] = max(_tensor_error(*pair) for pair in pairs.values())
    row = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_table("layout equivalence, largest relative error", f"{name:<24} {row}  (tolerance {TOLERANCE:.0e})")
    assert found["loss tokens"] == reference["loss tokens"]
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_text_step_leaves_vision_untouched(results: dict[str, Any], name: str) -> None:
    assert results[name]["vision untouched"]
    gradients = results[name]["text gradients"]
    assert all(not tensor.any() for key, tensor in gradients.items() if key.startswith("vision."))


def test_reference_gradients_reach_every_weight(results: dict[str, Any]) -> None:
    gradients = results["1x1x1"]["multimodal gradients"]
    assert [key for key, tensor in gradients.items() if not tensor.any()] == []


def _relative(found: list[float], reference: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))


def _tensor_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    scale = reference.abs().max()
    if scale == 0:
        return float(found.abs().max())
    return float((found - reference).abs().max() / scale)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
