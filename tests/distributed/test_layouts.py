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

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_BY_STAGE, TRAINABLE_PARTS
from megavl.model.trainable import part_of
from tests.tiny_run import free_port

TOLERANCE = 1e-5
RESUMED_LOSS_TOLERANCE = 1e-6

# Sizes laid over the tiny preset. Token pooling joins the towers along the sequence and needs an even grid.
MODELS: dict[str, dict[str, Any]] = {
    "usual": {},
    "pooling": {
        "siglip": {"image_size": 96},
        "sam": {"image_size": 256},
        "adaptor": {"kind": "token_pooling_width"},
    },
}
# A case's name says what it is: each word sets something, `1+3` is the decoder layers of each stage.
WORDS: dict[str, dict[str, Any]] = {
    "1x1x1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "vpp2": {"vpp": 2},
    "sp": {"sp": True},
    "mbs2": {"mbs": 2},
    "no-overlap": {"overlap": False},
    "deterministic": {"deterministic": True},
    "whole": {"distributed_optimizer": False},
    "split_tp": {"vision": "split_tp"},
    "split_all": {"vision": "split_all"},
    "selective": {"recompute": {"granularity": "selective"}},
    "selective-mlp": {"recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]}},
    "full": {"recompute": {"granularity": "full", "vision": True}},
    "full-by-2": {"recompute": {"granularity": "full", "num_layers": 2, "vision": True}},
    **{f"stage{stage}": {"train": parts} for stage, parts in TRAINABLE_BY_STAGE.items()},
    "pooling": {"model": "pooling"},
    "bf16": {"bf16": True},
}
# Every case, in order, and the earlier one whose state it resumes, if any. Without a stage every weight trains.
CASES: dict[str, str | None] = {
    "1x1x1": None,
    "tp2": "1x1x1",
    "pp2": "tp2",
    "dp2 no-overlap": "pp2",
    "tp2 pp2": "dp2 no-overlap",
    "tp2 dp2": "tp2 pp2",
    "pp2 dp2": "tp2 dp2",
    "tp2 sp": None,
    "tp2 dp2 whole": "pp2 dp2",
    "tp2 pp2 sp": "tp2 dp2 whole",
    "tp2 dp2 sp": None,
    "pp2 1+3": "tp2 pp2 sp",
    "tp2 pp2 3+1": None,
    "tp2 pp2 sp 0+4": "pp2 1+3",
    "pp2 vpp2": "tp2 pp2 sp 0+4",
    "tp2 pp2 sp vpp2 0+1+2+1": "pp2 vpp2",
    "dp2 mbs2": "tp2 pp2 sp vpp2 0+1+2+1",
    "tp2 selective": None,
    "pp2 full": None,
    "tp2 pp2 sp full-by-2": None,
    "tp2 split_tp": None,
    "tp2 pp2 sp split_tp": "dp2 mbs2",
    "tp2 dp2 split_tp": None,
    "pp2 split_all": None,
    "tp2 pp2 sp split_all": "tp2 pp2 sp split_tp",
    "pp2 dp2 split_all": None,
    "pp2 dp2 vpp2 split_all": "tp2 pp2 sp split_all",
    "1x1x1 mbs2": "pp2 dp2 vpp2 split_all",
    "tp2 pp2 sp vpp2 mbs2 split_tp deterministic": "1x1x1 mbs2",
    "tp2 split_all mbs2 no-overlap": "tp2 pp2 sp vpp2 mbs2 split_tp deterministic",
    "tp2 pp2 vpp2 split_all whole": "tp2 split_all mbs2 no-overlap",
    # Stage 1: no pipeline rank but the first holds a weight that trains.
    "stage1 1x1x1": None,
    "stage1 pp2": "stage1 1x1x1",
    "stage1 pp2 whole": "stage1 pp2",
    "stage1 pp2 dp2 1+3": "stage1 pp2 whole",
    "stage1 tp2 dp2 sp split_tp": "stage1 pp2 dp2 1+3",
    "stage1 tp2 pp2 sp split_all full": None,
    "stage2 1x1x1": None,
    "stage2 tp2 dp2 split_tp selective-mlp": None,
    "stage2 pp2 dp2 3+1 full": None,
    "stage2 tp2 pp2 sp split_all selective": "stage2 pp2 dp2 3+1 full",
    "stage3 1x1x1": None,
    "stage3 tp2 dp2 sp full": None,
    "stage3 tp2 dp2 split_tp": None,
    "stage3 pp2 split_all full": None,
    "stage3 pp2 dp2 split_all selective-mlp": None,
    "stage3 tp2 pp2 sp vpp2 split_tp full": "stage3 pp2 dp2 split_all selective-mlp",
    "pooling 1x1x1": None,
    "pooling tp2 pp2 sp": None,
    "bf16 1x1x1": None,
    "bf16 dp2 whole": "bf16 1x1x1",
    "bf16 tp2 pp2 sp": "bf16 dp2 whole",
}


def reference_of(name: str) -> str:
    """The one-rank case of the same model with the same weights training in the same precision."""
    kinds = [word for word in name.split() if word.startswith("stage") or word in ("pooling", "bf16")]
    return " ".join([*kinds, "1x1x1"])


REFERENCES = {reference_of(name) for name in CASES}
FP32 = [name for name in CASES if name not in REFERENCES and "bf16" not in name]
RESUMED = [name for name in FP32 if CASES[name]]


def settings(name: str) -> dict[str, Any]:
    """What `layout_worker.run_case` runs, the model's sizes and files apart."""
    case: dict[str, Any] = {"name": name, "resume": CASES[name], "saves": name in CASES.values()}
    case["goes on"] = any(resumed and reference_of(other) == name for other, resumed in CASES.items())
    for word in name.split():
        case |= {"layout": [int(count) for count in word.split("+")]} if "+" in word else WORDS[word]
    return case


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases run by four processes that are reused from case to case."""
    root = tmp_path_factory.mktemp("layouts")
    checkpoints = {}
    for model, changes in MODELS.items():
        config = load_model_config("tiny-hybrid", **changes)
        written = write_model_checkpoint(root / model, config=config, tensors=random_weights(config), files={})
        checkpoints[model] = {"sizes": changes, "checkpoint": str(written)}
    cases = [settings(name) for name in CASES]
    cases = [{**case, **checkpoints[case.get("model", "usual")], "port": free_port()} for case in cases]
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
    failed = {rank: output[-3000:] for rank, output in enumerate(outputs) if workers[rank].returncode}
    # All of them: where one rank fails, the others only see a connection closed.
    assert not failed, "\n".join(f"rank {rank}:\n{output}" for rank, output in failed.items())
    return {name: torch.load(root / f"{name}.pt", mmap=True) for name in CASES}


@pytest.mark.parametrize("name", FP32)
def test_layout_equals_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results[reference_of(name)], results[name]
    errors = {key: _relative(found[key][:3], reference[key][:3]) for key in ("losses", "norms")}
    for modality in ("text", "multimodal"):
        wanted, had = reference[f"{modality} gradients"], found[f"{modality} gradients"]
        assert wanted.keys() == had.keys()
        errors[f"{modality} gradients"] = max(_tensor_error(had[key], tensor) for key, tensor in wanted.items())
    _report(report_table, name, errors, f"tolerance {TOLERANCE:.0e}")
    assert found["loss tokens"][:3] == reference["loss tokens"][:3]
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_under_another_layout_equals_one_rank_that_went_on(
    results: dict[str, Any], name: str, report_table: Any
) -> None:
    reference, found = results[reference_of(name)], results[name]
    errors = {key: _relative(found[key][3:], reference[key][3:]) for key in ("losses", "norms")}
    limits = f"tolerances {RESUMED_LOSS_TOLERANCE:.0e} and {TOLERANCE:.0e}"
    _report(report_table, f"{CASES[name]} -> {name}", errors, limits)
    assert len(found["losses"]) == len(reference["losses"]) == 6
    assert errors["losses"] <= RESUMED_LOSS_TOLERANCE and errors["norms"] <= TOLERANCE, errors


def test_bf16_follows_its_own_one_rank_run_and_fp32(results: dict[str, Any], report_table: Any) -> None:
    alone, exact = results["bf16 1x1x1"], results["1x1x1"]
    errors = {"one rank to fp32": _relative(alone["losses"], exact["losses"])}
    for name in (name for name in CASES if "bf16" in name and name not in REFERENCES):
        errors[name] = max(_relative(results[name][key], alone[key]) for key in ("losses", "norms"))
    _report(report_table, "bf16", errors, "tolerance 1e-2")
    assert max(errors.values()) <= 1e-2


@pytest.mark.parametrize("name", CASES)
def test_text_step_leaves_vision_untouched(results: dict[str, Any], name: str) -> None:
    gradients = {key: g for key, g in results[name]["text gradients"].items() if key.startswith("vision.")}
    assert gradients and not any(gradient.any() for gradient in gradients.values())
    for counts in results[name]["text steps"]:
        assert counts["changed"] == 0
        # What must not change is there: values, moments that a multimodal step has made, its count of steps.
        trained = ["vision.adaptor."] + ["vision.siglip."] * ("stage1" not in name and "stage2" not in name)
        for part in trained:
            assert all(counts[f"{part} {key}"] > 0 for key in ("weight", "exp_avg", "exp_avg_sq", "step")), counts


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_reference_gradients_reach_every_weight_that_trains(results: dict[str, Any], name: str) -> None:
    gradients = results[name]["multimodal gradients"]
    parts = settings(name).get("train", TRAINABLE_PARTS)
    wanted = {key for key in gradients if part_of(key) in parts}
    assert wanted == {key for key, gradient in gradients.items() if gradient.any()}


def _report(report_table: Any, name: str, errors: dict[str, float], note: str) -> None:
    row = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_table(f"{name:<46} {row}  ({note})")


def _relative(found: list[float], reference: list[float]) -> float:
    # A stage-1 text step has no gradient at all: both norms are 0.
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, reference, strict=True))


def _tensor_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    scale = reference.abs().max()
    if scale == 0:
        return float(found.abs().max())
    return float((found - reference).abs().max() / scale)
