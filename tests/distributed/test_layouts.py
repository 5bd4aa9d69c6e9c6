"""Every way of cutting the model gives the gradients of one rank (fp32, real gloo processes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from tests.distributed.synthetic import random_weights
from tests.tiny_run import free_port

TOLERANCE = 1e-5

ADAPTOR = ["adaptor", "sam_downsamples", "sam_hd"]
# Sizes laid over the tiny preset. Token pooling joins the towers along the sequence and needs an even grid.
MODELS: dict[str, dict[str, Any]] = {
    "usual": {},
    "pooling": {
        "siglip": {"image_size": 96},
        "sam": {"image_size": 256},
        "adaptor": {"kind": "token_pooling_width"},
    },
}
CASES: list[dict[str, Any]] = [
    {"name": "1x1x1", "tp": 1, "pp": 1, "dp": 1},
    {"name": "tp2", "tp": 2, "pp": 1, "dp": 1, "resume": "1x1x1"},
    {"name": "pp2", "tp": 1, "pp": 2, "dp": 1, "resume": "tp2"},
    {"name": "pp2 uneven 1+3", "tp": 1, "pp": 2, "dp": 1, "layout": [1, 3], "resume": "pp2"},
    {"name": "tp2 pp2", "tp": 2, "pp": 2, "dp": 1, "resume": "pp2 uneven 1+3"},
    {"name": "tp2 pp2 sp", "tp": 2, "pp": 2, "dp": 1, "sp": True, "resume": "tp2 pp2"},
    {"name": "tp2 dp2", "tp": 2, "pp": 1, "dp": 2, "resume": "tp2 pp2 sp"},
    {"name": "tp2 pp2 sp uneven 0+4", "tp": 2, "pp": 2, "dp": 1, "sp": True, "layout": [0, 4], "resume": "tp2 dp2"},
    {"name": "pp2 dp2", "tp": 1, "pp": 2, "dp": 2, "resume": "tp2 pp2 sp uneven 0+4"},
    {"name": "dp2 mbs2", "tp": 1, "pp": 1, "dp": 2, "mbs": 2, "resume": "pp2 dp2"},
    {"name": "recompute selective", "tp": 2, "pp": 1, "dp": 1, "recompute": {"granularity": "selective"}}
    | {"resume": "dp2 mbs2"},
    {"name": "recompute full", "tp": 1, "pp": 2, "dp": 1, "recompute": {"granularity": "full", "vision": True}}
    | {"resume": "recompute selective"},
    # Stage 1: the last pipeline rank holds no trainable weight.
    {"name": "adaptor 1x1x1", "tp": 1, "pp": 1, "dp": 1, "train": ADAPTOR},
    {"name": "adaptor pp2", "tp": 1, "pp": 2, "dp": 1, "train": ADAPTOR, "resume": "adaptor 1x1x1"},
    {"name": "adaptor pp2 dp2", "tp": 1, "pp": 2, "dp": 2, "train": ADAPTOR, "resume": "adaptor pp2"},
    {"name": "tp2 split_tp", "tp": 2, "pp": 1, "dp": 1, "vision": "split_tp", "resume": "recompute full"},
    {"name": "tp2 pp2 sp split_tp", "tp": 2, "pp": 2, "dp": 1, "sp": True, "vision": "split_tp"}
    | {"resume": "tp2 split_tp"},
    {"name": "tp2 dp2 split_tp mbs2", "tp": 2, "pp": 1, "dp": 2, "mbs": 2, "vision": "split_tp"}
    | {"resume": "tp2 pp2 sp split_tp"},
    {"name": "pp2 split_all", "tp": 1, "pp": 2, "dp": 1, "vision": "split_all", "resume": "tp2 dp2 split_tp mbs2"},
    {"name": "tp2 pp2 sp split_all", "tp": 2, "pp": 2, "dp": 1, "sp": True, "vision": "split_all"}
    | {"resume": "pp2 split_all"},
    {"name": "pp2 dp2 split_all", "tp": 1, "pp": 2, "dp": 2, "vision": "split_all", "resume": "tp2 pp2 sp split_all"},
    {"name": "pp2 vpp2", "tp": 1, "pp": 2, "dp": 1, "vpp": 2, "resume": "pp2 dp2 split_all"},
    {"name": "tp2 pp2 sp vpp2 uneven", "tp": 2, "pp": 2, "dp": 1, "sp": True, "vpp": 2, "layout": [0, 1, 2, 1]}
    | {"resume": "pp2 vpp2"},
    {"name": "pp2 dp2 vpp2 split_all", "tp": 1, "pp": 2, "dp": 2, "vpp": 2, "vision": "split_all"}
    | {"resume": "tp2 pp2 sp vpp2 uneven"},
    {"name": "adaptor tp2 pp2 split_all", "tp": 2, "pp": 2, "dp": 1, "train": ADAPTOR, "vision": "split_all"}
    | {"resume": "adaptor pp2 dp2"},
    {"name": "pooling 1x1x1", "tp": 1, "pp": 1, "dp": 1, "model": "pooling"},
    {"name": "pooling tp2 pp2 sp", "tp": 2, "pp": 2, "dp": 1, "sp": True, "model": "pooling"},
    {"name": "bf16 1x1x1", "tp": 1, "pp": 1, "dp": 1, "bf16": True},
    {"name": "bf16 tp2 pp2 sp", "tp": 2, "pp": 2, "dp": 1, "sp": True, "bf16": True, "resume": "bf16 1x1x1"},
]
FP32 = [case["name"] for case in CASES if not case.get("bf16")]
REFERENCES = ("1x1x1", "adaptor 1x1x1", "pooling 1x1x1", "bf16 1x1x1")


def reference_of(name: str) -> str:
    """The one-rank case of the same model with the same weights training in the same precision."""
    return next(r for r in reversed(REFERENCES) if r.removesuffix("1x1x1").strip() in name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases run by four processes that are reused from case to case."""
    root = tmp_path_factory.mktemp("layouts")
    checkpoints = {}
    for model, changes in MODELS.items():
        config = load_model_config("tiny-hybrid", **changes)
        written = write_model_checkpoint(root / model, config=config, tensors=random_weights(config), files={})
        checkpoints[model] = {"model": changes, "checkpoint": str(written)}
    cases = [{**case, **checkpoints[case.get("model", "usual")], "port": free_port()} for case in CASES]
    (root / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("layout_worker.py")
    repository = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    for rank, (worker, output) in enumerate(zip(workers, outputs)):
        assert worker.returncode == 0, f"rank {rank}:\n{output[-4000:]}"
    return {case["name"]: torch.load(root / f"{case['name']}.pt") for case in CASES}


@pytest.mark.parametrize("name", [name for name in FP32 if name not in REFERENCES])
def test_layout_equals_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results[reference_of(name)], results[name]
    errors = {
        "loss": _relative(found["losses"], reference["losses"]),
        "norm": _relative(found["norms"], reference["norms"]),
        "resumed": _relative(found["resumed"], reference["resumed"]),
    }
    for modality in ("text", "multimodal"):
        wanted, had = reference[f"{modality} gradients"], found[f"{modality} gradients"]
        assert wanted.keys() == had.keys()
        errors[modality] = max(_tensor_error(had[key], tensor) for key, tensor in wanted.items())
    row = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_table(f"{name:<22} {row}  (largest relative error; tolerance {TOLERANCE:.0e})")
    assert found["loss tokens"] == reference["loss tokens"]
    assert max(errors.values()) <= TOLERANCE, errors


def test_bf16_follows_its_own_one_rank_run_and_fp32(results: dict[str, Any], report_table: Any) -> None:
    alone, cut, exact = results["bf16 1x1x1"], results["bf16 tp2 pp2 sp"], results["1x1x1"]
    between = max(_relative(cut[key], alone[key]) for key in ("losses", "resumed"))
    to_fp32 = _relative(alone["losses"], exact["losses"])
    report_table(f"bf16: tp2 pp2 sp against one rank {between:.1e}, one rank against fp32 {to_fp32:.1e} (limit 1e-2)")
    assert between <= 1e-2 and to_fp32 <= 1e-2


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_text_step_leaves_vision_untouched(results: dict[str, Any], name: str) -> None:
    assert results[name]["vision untouched"]
    gradients = results[name]["text gradients"]
    assert all(not tensor.any() for key, tensor in gradients.items() if key.startswith("vision."))


def test_reference_gradients_reach_every_weight(results: dict[str, Any]) -> None:
    gradients = results["1x1x1"]["multimodal gradients"]
    assert [key for key, tensor in gradients.items() if not tensor.any()] == []


def _relative(found: list[float], reference: list[float]) -> float:
    # A stage-1 text step has no gradient at all: both norms are 0.
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, reference, strict=True))


def _tensor_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    scale = reference.abs().max()
    if scale == 0:
        return float(found.abs().max())
    return float((found - reference).abs().max() / scale)
