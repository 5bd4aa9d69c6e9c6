"""Every layout of the model gives the gradients of one rank, on real gloo processes.

Almost all cases run in fp64. There another order of additions changes a result by 1e-14, on every CPU, and a true error
stands out by six digits or more: the cases with a deliberate fault show it. Weights, activations, gradients, moments
and checkpoints are fp64. A few factors stay fp32 by design and are the same numbers on every layout: rotary angles, one
over the loss tokens, the factor that clips gradients, and step counts.

A few cases run one step in fp32 and are compared with fp64. How far rounding moves a gradient depends on the size of
its summands, not of their sum: those of the scalar `vision.sam.hd_alpha_downsamples` nearly cancel. The `moved` cases
measure that size in fp64, so with the same outcome on every CPU. They change every number of every weight by one
rounding of fp32, and with it every summand. A run in fp32 rounds in each of about 160 operations in a row, forward and
backward. Such errors add up like the square root of their number, 13, so a gradient may move 16 times as far. Losses
and norms are sums of positive terms and may move by 16 roundings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megavl.config.recipe import TRAINABLE_BY_STAGE, TRAINABLE_PARTS
from megavl.model.trainable import part_of
from tests import fork_server
from tests.distributed.faults import FAULTS
from tests.distributed.workers import run_workers
from tests.tiny_run import environment

TOLERANCE = 1e-12
FP32_MOVES = 16
FP32_EPS = torch.finfo(torch.float32).eps
BF16_TOLERANCE = 1e-2

# Sizes laid over the tiny preset: a narrow decoder, since in fp64 its products would take most of the time, and towers
# of two blocks, of which one in SAM has windows. Token pooling joins the towers along the sequence and needs an even
# grid.
SMALL: dict[str, Any] = {
    "llm": {"hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 256},
    "siglip": {"depth": 2},
    "sam": {"depth": 2, "global_attn_indexes": [1]},
}
MODELS: dict[str, dict[str, Any]] = {
    "usual": SMALL,
    "pooling": {
        **SMALL,
        "siglip": {**SMALL["siglip"], "image_size": 96},
        "sam": {**SMALL["sam"], "image_size": 256},
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
    "kernels": {"compile": "kernels"},
    "layers": {"compile": "layers"},
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    **{f"fault:{name}": {"fault": name} for name in FAULTS},
    **{f"moved:{seed}": {"moved": seed} for seed in (1, 2)},
}
# Every case, in order, and the earlier one whose state it resumes, if any. Without a stage every weight trains.
CASES: dict[str, str | None] = {
    "1x1x1": None,
    "tp2": "1x1x1",
    "pp2": None,
    "dp2 no-overlap": None,
    "tp2 pp2": None,
    "tp2 dp2": None,
    "pp2 dp2": None,
    "tp2 sp": None,
    "tp2 dp2 whole": "tp2",
    "tp2 pp2 sp": "tp2 dp2 whole",
    "tp2 dp2 sp": None,
    "pp2 1+3": None,
    "tp2 pp2 3+1": None,
    "tp2 pp2 sp 0+4": "tp2 pp2 sp",
    "pp2 vpp2": None,
    "tp2 pp2 sp vpp2 0+1+2+1": "tp2 pp2 sp 0+4",
    "dp2 mbs2": "tp2 pp2 sp vpp2 0+1+2+1",
    "tp2 selective": None,
    "pp2 full layers": None,
    "tp2 pp2 sp full-by-2 kernels": None,
    "tp2 split_tp": None,
    "tp2 pp2 sp split_tp": None,
    "tp2 dp2 split_tp": None,
    "pp2 split_all": None,
    "tp2 pp2 sp split_all": None,
    "pp2 dp2 split_all": None,
    "pp2 dp2 vpp2 split_all": "dp2 mbs2",
    "1x1x1 mbs2": None,
    "tp2 pp2 sp vpp2 mbs2 split_tp deterministic": None,
    "tp2 split_all mbs2 no-overlap": None,
    "tp2 pp2 vpp2 split_all whole": "pp2 dp2 vpp2 split_all",
    # Stage 1: no pipeline rank but the first holds a weight that trains.
    "stage1 1x1x1": None,
    "stage1 pp2": None,
    "stage1 pp2 whole layers": "stage1 1x1x1",
    "stage1 pp2 dp2 1+3": "stage1 pp2 whole layers",
    "stage1 tp2 dp2 sp split_tp": "stage1 pp2 dp2 1+3",
    "stage1 tp2 pp2 sp split_all full": None,
    "stage2 1x1x1": None,
    "stage2 tp2 dp2 split_tp selective-mlp kernels": None,
    "stage2 pp2 dp2 3+1 full": None,
    "stage2 tp2 pp2 sp split_all selective": "stage2 pp2 dp2 3+1 full",
    "stage3 1x1x1": None,
    "stage3 tp2 dp2 sp full": None,
    "stage3 tp2 dp2 split_tp": None,
    "stage3 pp2 split_all full": None,
    "stage3 pp2 dp2 split_all selective-mlp layers": None,
    "stage3 tp2 pp2 sp vpp2 split_tp full": "stage3 pp2 dp2 split_all selective-mlp layers",
    "pooling 1x1x1": None,
    "pooling tp2 pp2 sp": None,
    "moved:1 1x1x1": None,
    "moved:2 1x1x1": None,
    "fp32 1x1x1": None,
    "fp32 tp2 split_tp": None,
    "fp32 pp2 dp2 layers": None,
    "fp32 tp2 pp2 sp vpp2 split_all kernels": None,
    # Without its fault each of these is a case above.
    "fault:norms-not-summed tp2 sp": None,
    "fault:tokens-not-summed dp2 no-overlap": None,
    "fault:shares-not-scaled tp2 split_tp": None,
    "fault:a-millionth-more pp2": None,
    "bf16 1x1x1": None,
    "bf16 dp2 whole": "bf16 1x1x1",
    "bf16 tp2 pp2 sp": "bf16 dp2 whole",
}


# Options are scored after the third step, in the layout's own stages.
SCORED = (
    *("1x1x1", "tp2", "pp2", "dp2 no-overlap", "tp2 dp2", "tp2 pp2", "tp2 pp2 sp", "pp2 vpp2"),
    *("tp2 pp2 sp vpp2 0+1+2+1", "tp2 pp2 sp split_tp", "pp2 dp2 split_all"),
)


def reference_of(name: str) -> str:
    """The one-rank case of the same model with the same weights training, in fp64 unless it is bf16."""
    kinds = [word for word in name.split() if word.startswith("stage") or word in ("pooling", "bf16")]
    return " ".join([*kinds, "1x1x1"])


def precision_of(name: str) -> str:
    """`fp64` where the name does not say otherwise."""
    return next((word for word in name.split() if word in ("fp32", "bf16")), "fp64")


REFERENCES = {reference_of(name) for name in CASES}
FAULTY = [name for name in CASES if "fault:" in name]
FP32 = [name for name in CASES if precision_of(name) == "fp32"]
BF16 = [name for name in CASES if precision_of(name) == "bf16" and name not in REFERENCES]
MOVED = [name for name in CASES if "moved:" in name]
WHOLE = [name for name in CASES if name not in FAULTY + FP32 + MOVED]
FP64 = [name for name in WHOLE if name not in REFERENCES and precision_of(name) == "fp64"]
RESUMED = [name for name in FP64 if CASES[name]]


def settings(name: str) -> dict[str, Any]:
    """What `layout_worker.run_case` runs, the model's sizes and files apart."""
    case: dict[str, Any] = {"name": name, "resume": CASES[name], "saves": name in CASES.values()}
    case |= {"precision": "fp64", "one step": name not in WHOLE, "scores": name in SCORED}
    case["goes on"] = any(resumed and reference_of(other) == name for other, resumed in CASES.items())
    for word in name.split():
        case |= {"layout": [int(count) for count in word.split("+")]} if "+" in word else WORDS[word]
    return case


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """All cases run by four processes that are reused from case to case."""
    root = tmp_path_factory.mktemp("layouts")
    cases = [settings(name) for name in CASES]
    cases = [{**case, "sizes": MODELS[case.get("model", "usual")]} for case in cases]
    (root / "cases.json").write_text(json.dumps(cases))
    worker = [fork_server.python(environment()), "-W", "ignore", str(Path(__file__).with_name("layout_worker.py"))]
    run_workers(
        [[*worker, str(rank), str(root / "cases.json"), str(root)] for rank in range(4)],
        logs=root,
        progress=lambda: len(list(root.glob("*.pt"))),
    )
    yield {name: torch.load(root / f"{name}.pt", mmap=True) for name in CASES}
    shutil.rmtree(root)


@pytest.mark.parametrize("name", SCORED[1:])
def test_scores_equal_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results["1x1x1"]["scores"], results[name]["scores"]
    error = max(abs(a / b - 1) for a, b in zip(found, reference, strict=True))
    report_table([name, "log-probabilities of options, relative", error, f"tolerance {TOLERANCE:.0e}"])
    assert error <= TOLERANCE
    assert len({round(value, 6) for value in reference}) == len(reference) == 21


@pytest.mark.parametrize("name", FP64)
def test_layout_equals_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results[reference_of(name)], results[name]
    errors = errors_of(found, reference)
    _report(report_table, name, errors, f"tolerance {TOLERANCE:.0e}")
    assert found["loss tokens"][:3] == reference["loss tokens"][:3]
    assert found["losses by source"][0] and None not in found["losses by source"][0]
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_under_another_layout_equals_one_rank(results: dict[str, Any], name: str, report_table: Any) -> None:
    reference, found = results[reference_of(name)], results[name]
    errors = {key: _relative(found[key][3:], reference[key][3:]) for key in ("losses", "norms")}
    _report(report_table, f"{CASES[name]} -> {name}", errors, f"tolerance {TOLERANCE:.0e}")
    assert len(found["losses"]) == len(reference["losses"]) == 6
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", FAULTY)
def test_deliberate_fault_stands_out(results: dict[str, Any], name: str, report_table: Any) -> None:
    layout = name.partition(" ")[2]
    right, wrong = (errors_of(results[case], results[reference_of(name)]) for case in (layout, name))
    _report(report_table, name, wrong, f"{right['multimodal gradients']:.1e} without the fault")
    assert max(wrong.values()) >= 1e5 * TOLERANCE


@pytest.mark.parametrize("name", FP32)
def test_fp32_rounds_within_its_bound(results: dict[str, Any], name: str, report_table: Any) -> None:
    """Errors of losses and norms are in roundings, those of gradients in how far a `moved` case took the tensor."""
    reference, found = results[reference_of(name)], results[name]
    errors = {key: _relative(found[key], reference[key][:1]) / FP32_EPS for key in ("losses", "norms")}
    errors["gradients"], key = max(
        (
            float((found["multimodal gradients"][key] - tensor).abs().max())
            / max(float((results[moved]["multimodal gradients"][key] - tensor).abs().max()) for moved in MOVED),
            key,
        )
        for key, tensor in reference["multimodal gradients"].items()
    )
    _report(report_table, name, errors, f"most in {key}; tolerance {FP32_MOVES}")
    assert max(errors.values()) <= FP32_MOVES, errors


def test_bf16_follows_one_rank_and_fp64(results: dict[str, Any], report_table: Any) -> None:
    alone, exact = results["bf16 1x1x1"], results["1x1x1"]
    errors = {"one rank to fp64": _relative(alone["losses"], exact["losses"])}
    for name in BF16:
        errors[name] = max(_relative(results[name][key], alone[key]) for key in ("losses", "norms"))
    _report(report_table, "bf16", errors, f"tolerance {BF16_TOLERANCE:.0e}")
    assert max(errors.values()) <= BF16_TOLERANCE


@pytest.mark.parametrize("name", WHOLE)
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


def errors_of(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Largest relative errors of the first three steps, or of the one that `found` has."""
    count = min(3, len(found["losses"]))
    errors = {key: _relative(found[key][:count], reference[key][:count]) for key in ("losses", "norms")}
    errors["losses by source"] = max(
        _relative(list(of_found), list(of_reference))
        for of_found, of_reference in zip(found["losses by source"][:count], reference["losses by source"][:count])
    )
    for key in ("text gradients", "multimodal gradients"):
        if key in found:
            assert found[key].keys() == reference[key].keys()
            errors[key] = max(_tensor_error(found[key][name], tensor) for name, tensor in reference[key].items())
    return errors


def _report(report_table: Any, name: str, errors: dict[str, float], note: str) -> None:
    row = "  ".join(f"{key} {value:.1e}" for key, value in errors.items())
    report_table(f"{name:<46} {row}  ({note})")


def _relative(found: list[float], reference: list[float]) -> float:
    # A stage-1 text step has no gradient at all: both norms are 0.
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(found, reference, strict=True))


def _tensor_error(found: torch.Tensor, reference: torch.Tensor) -> float:
    # A frozen tensor has no gradient at all.
    return float((found - reference).abs().max()) / (float(reference.abs().max()) or 1.0)
