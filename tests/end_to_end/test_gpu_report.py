"""`launch/bench/gpu.sh`: without a GPU it runs every part at tiny size and leaves the full-size columns empty."""

from __future__ import annotations

import json
import math
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from launch.bench import programs, step
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import MegaVL, made_up_batches
from launch.bench.engines.step_work import make_work
from megavl.config.recipe import ParallelConfig
from megavl.parallel import groups
from tests.tiny_run import environment, forked

ROOT = Path(__file__).resolve().parents[2]
TINY = ("tiny whole megavl precision fp32", "tiny whole megatron-local precision fp32")
TINY += ("tiny whole transformers precision fp32",)
WORDS = {"recompute": "none", "precision": "fp32", "memory_bytes": None}


def rows(report: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, its head left out."""
    lines = report.partition(f"\n{heading}")[2].splitlines()[1:]
    start = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 1 : end]]


@pytest.mark.slow
def test_without_a_gpu_only_tiny_cases_run(tmp_path: Path) -> None:
    variables = forked(environment())
    variables["PYTHON"] = variables["PYTHON_EXEC"]
    command = ["bash", "launch/bench/gpu.sh", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "gpu.sh: no GPU here" in done.stdout
    (path,) = tmp_path.glob("step_*.md")
    report, found = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "**Dry run: there is no GPU on this machine.**" in report

    assert "twenty steps in bf16.\n\n- not measured\n" in report

    full = rows(report, "## Full size")
    assert len(full) > 20 and {row[0].split()[0] for row in full} == {"1b", "7b"}
    assert all(row[2] == "not measured" and not any(row[3:]) for row in full)
    assert all(row[-1] == "not measured" for row in rows(report, "| goal"))

    assert set(found["cases"]) == set(TINY)
    tiny = {(row[0], row[1]): row[2:] for row in rows(report, "## Tiny size")}
    losses = {}
    for side in ("MegaVL", "megatron-core's local attention", "transformers"):
        for kind in ("text", "multimodal"):
            layers, ms, rate, mfu, share, ratio, memory, loss = tiny[f"tiny whole: {side} --precision fp32", kind]
            assert layers == "4" and mfu == "no peak known" and share.endswith("%")
            assert float(ms.replace(",", "")) > 0 and float(rate.replace(",", "")) > 0 and float(ratio) > 0
            losses.setdefault(kind, set()).add(loss)
            assert float(memory.split()[0]) > 0.1
    assert {kind: len(values) for kind, values in losses.items()} == {"text": 1, "multimodal": 1}
    assert len(rows(report, "## Where the time goes")) == 6
    assert len(rows(report, "### tiny whole megavl precision fp32, one multimodal step")) == 15
    assert (ROOT / found["cases"][TINY[0]]["multimodal"]["profile"]["trace"]).is_file()


def made_up(*, step_s: float, mfu: float, seconds: list[float]) -> dict[str, Any]:
    """What the measuring program prints for one kind of step on a GPU, with figures that nobody measured."""
    regions = {"vision": 0.1, "decoder": 0.6, "head": 0.1, "communication": 0.0, "optimizer": 0.15, "other": 0.05}
    operators = [{"name": "gemm|x", "calls": 3, "ms": 2.0, "share": 0.5}]
    profile = {"trace": "t.json.gz", "clock": "CUDA kernels", "milliseconds": 4.0, "operators": operators, "idle": 0.25}
    return {
        "layers": 24,
        "seconds": seconds,
        "step_s": step_s,
        "tokens_per_s": 32768 / step_s,
        "flops_per_s": 4e14,
        "mfu": mfu,
        "peak_bytes": 3 * 2**30,
        "planned_bytes": 4 * 2**30,
        "update_bytes": 300_000_000_000,
        "losses": [11.5],
        "regions": regions,
        "profile": profile,
    }


def test_figures_of_a_gpu_fill_the_report() -> None:
    slow, fast = {"step_s": 2.0, "mfu": 0.3}, {"step_s": 1.0, "mfu": 0.6}
    steady, rising = [1.0] * 20, [1.0] * 18 + [1.5] * 2
    cases = {
        "1b whole megavl": {"text": made_up(**fast, seconds=rising), "multimodal": made_up(**slow, seconds=steady)},
        "1b whole transformers": {kind: made_up(**slow, seconds=steady) for kind in ("text", "multimodal")},
        "1b whole transformers checkpointing": {"text": made_up(**fast, seconds=steady)},
        "1b whole transformers compile": {"failed": "RuntimeError: no compiler"},
        "1b whole megavl recompute selective": {"text": made_up(**slow, seconds=steady)},
        "7b last megavl": {"text": made_up(**fast, seconds=steady)},
    }
    ceilings = {
        "cuda": True,
        "device": "NVIDIA H200",
        "memory_bytes": 150_000_000_000,
        "cuda_version": "13.0",
        "products": {"bf16": {"8192 x 8192 x 8192": 8e14}, "fp32": {"8192 x 8192 x 8192": 5e13}},
        "flops_per_s": {"bf16": 8e14, "fp32": 5e13},
        "copy_bytes_per_s": 4e12,
    }
    sizes = dict.fromkeys(("weights", "gradients", "optimizer", "activations", "peak"), 1e9)
    plan = {"layers": 24, "of_layers": 30, "bytes": sizes, "usable_bytes": 135e9, "convention": "MFU: causal"}
    plans = {"1b whole": plan, "7b last": plan}
    assert step.device(ceilings) == "nvidia-h200"
    tests = {"passed": True, "lines": ["first loss, CUDA against CPU", "3 passed"]}
    found = {"cases": cases, "ceilings": ceilings, "plans": plans, "cuda_tests": tests}
    report = "\n".join(step.report(found | {"versions": "torch", "load": 0.0}))
    assert "Dry run" not in report and "\n- first loss, CUDA against CPU\n- 3 passed\n" in report
    full = {(row[0], row[1]): row[2:] for row in rows(report, "## Full size")}
    assert full["1b whole: MegaVL", "text"] == [
        *("24", "1,000.0", "32,768", "60.0%", "50.0%", "1.00", "3.00 (4.00)", "11.50000")
    ]
    assert full["1b whole: transformers --compile", "text"] == ["failed, see below", *[""] * 7]
    assert full["7b whole: MegaVL", "text"] == ["not measured", *[""] * 7]
    assert [row[-1] for row in rows(report, "| goal")] == ["60.0%", "60.0%", "0.50", "1.00", "1.500"]
    shares = ["10.0%", "60.0%", "10.0%", "0.0%", "15.0%", "5.0%", "25.0%"]
    # 300 GB in 15% of a second are half of what the copy moves.
    assert rows(report, "## Where the time goes")[-1] == ["7b last megavl", "text", *shares, "50.0%"]
    assert "- 1b whole transformers compile: did not run, `RuntimeError: no compiler`" in report
    assert "- 1b whole transformers checkpointing, text: 2.00 of the tokens/s without it, 1.00 of the memory" in report
    assert "- 1b whole megavl recompute selective, text: 0.50 of the tokens/s without it" in report
    assert step.sound(cases)
    assert not step.sound(cases | {"7b last megavl": {"failed": "OutOfMemoryError"}})


def test_two_parts_hold_every_case_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    parts = [
        [case.name for case in step.chosen(Namespace(quick=False, case=None, set=part), on_gpu=True)]
        for part in ("first", "rest", None)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(parts[2]) and set(parts[0]) == set(step.FIRST)
    assert "7b whole megavl half-state" not in parts[2], "it takes Transformer Engine"
    case = step.FULL[0]
    words = [step.words_of(case, layers=24, quick=False, most=most) for most in (12, None)]
    assert [line[line.index("--steps") + 1] for line in words] == [12, 200]


def test_weights_are_drawn_where_they_are() -> None:
    work = make_work("tiny-siglip", part="whole", layers=2, micro_batches=1, **WORDS)
    groups.start(ParallelConfig(), seed=1)
    try:
        side = MegaVL(work, marks=Marks(), lr=1e-3, local=False, weights=None)
        loss = side.step(side.prepare(made_up_batches(work, "multimodal", steps=1)[0], "multimodal"))
    finally:
        groups.stop()
    spread = [float(p.std()) for p in side.model.chunks[0].parameters() if p.dim() > 1 and p.numel() > 1000]
    assert 0.015 < min(spread) < max(spread) < 0.025
    # Nearly uniform over the vocabulary, as a new model's answers are.
    assert abs(loss - math.log(work.recipe.model.llm.vocab_size)) < 0.5


def test_unequal_losses_are_no_success() -> None:
    ours, theirs = made_up(step_s=1.0, mfu=0.5, seconds=[1.0]), made_up(step_s=1.0, mfu=0.5, seconds=[1.0])
    theirs["losses"] = [11.5 * (1 + 2e-5)]
    cases = {TINY[0]: {"text": ours}, TINY[2]: {"text": ours}}
    assert step.sound(cases)
    assert not step.sound(cases | {TINY[2]: {"text": theirs}})


def test_a_failed_program_keeps_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    (tmp_path / "broken.py").write_text("print('{\"kind\": \"text\"}')\nraise ValueError('too large')")
    text, failure = programs.run("broken")
    assert programs.json_lines(text) == [{"kind": "text"}] and failure == "ValueError: too large"
    with pytest.raises(SystemExit, match="error: broken: ValueError: too large"):
        programs.ask("broken")

    def late(command: list[str], *, stdout: Any, timeout: float, **_: Any) -> None:
        stdout.write('{"kind": 1}\n')
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", late)
    assert programs.run("slow", limit=5) == ('{"kind": 1}\n', "not done after 5 s")
