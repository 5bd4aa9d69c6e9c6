"""Full training steps of the 1.3B and the 7B on one GPU, against transformers and megatron-core's stock attention.

First the ceilings (matrix product, copy), then every case in a process of its own (`engines/step_speed.py`). Writes
`launch/bench/results/step_<device>_<YYYYMM>.md` from the JSON beside it, in which `--case` replaces single cases.
Where there is no GPU only the tiny cases run, and the full-size columns stay empty. Needs the extras `test` and `hf`.

    bash launch/bench/gpu.sh
    bash launch/bench/gpu_first.sh; bash launch/bench/gpu_rest.sh    # the same in two parts, the first in 8 minutes
    python -m launch.bench.step [--case "1b whole megavl" ...] [--steps N] [--cuda-tests] [--quick] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launch.bench.engines.step_work import plan
from launch.bench.programs import ROOT, ask, environment, json_lines, run
from launch.bench.report import RESULTS, hardware, report_path, table, table_row, versions, write_report
from megavl.planner.hardware.devices import DEVICES, USABLE_SHARE

NAMES = {
    "megavl": "MegaVL",
    "megatron-local": "megatron-core's local attention",
    "transformers": "transformers",
}
PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine")
NOT_MEASURED = "not measured"
ONE_THREAD = ("--threads", 1)
"""Where there is no GPU; cores may be shared."""
BOTH = ("text", "multimodal")


@dataclass(frozen=True)
class Case:
    """One process of `engines/step_speed.py`."""

    model: str
    part: str
    side: str
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = BOTH
    steps: int = 20
    micro_batches: int = 8

    @property
    def name(self) -> str:
        """What `--case` takes."""
        return " ".join([self.model, self.part, self.side, *(word.lstrip("-") for word in self.options)])

    @property
    def halves(self) -> bool:
        """Whether it needs Transformer Engine's optimizer."""
        return "--half-state" in self.options


FULL = (
    Case("1b", "whole", "megavl", steps=200),
    Case("1b", "whole", "megavl", ("--uncompiled",)),
    Case("1b", "whole", "megavl", ("--rounded-gradients",)),
    Case("1b", "whole", "megavl", ("--recompute", "selective")),
    Case("1b", "whole", "megatron-local"),
    Case("1b", "whole", "transformers"),
    Case("1b", "whole", "transformers", ("--checkpointing",)),
    Case("1b", "whole", "transformers", ("--compile",)),
    Case("7b", "whole", "megavl"),
    Case("7b", "whole", "megavl", ("--half-state",)),
    Case("7b", "whole", "transformers"),
    Case("7b", "whole", "transformers", ("--checkpointing",)),
    Case("7b", "first", "megavl"),
    Case("7b", "first", "megatron-local", ("--recompute", "selective")),
    Case("7b", "last", "megavl", kinds=("text",)),
    Case("7b", "last", "megatron-local", ("--recompute", "selective"), kinds=("text",)),
)
"""Full-size models in bf16, on a GPU only. Half the optimizer's state takes Transformer Engine."""
TINY_OPTIONS = ("--precision", "fp32")
TINY = (
    *(Case("tiny", "whole", side, TINY_OPTIONS, steps=5, micro_batches=2) for side in NAMES),
    Case("tiny", "whole", "transformers", (*TINY_OPTIONS, "--checkpointing"), steps=5, micro_batches=2),
    Case("tiny", "whole", "transformers", (*TINY_OPTIONS, "--compile"), steps=5, micro_batches=2),
    Case("tiny", "whole", "megavl", ("--precision", "bf16"), steps=5, micro_batches=2),
    Case("tiny", "whole", "megavl", (*TINY_OPTIONS, "--recompute", "selective"), steps=5, micro_batches=2),
    Case("tiny", "first", "megavl", TINY_OPTIONS, steps=5, micro_batches=2),
    Case("tiny", "last", "megavl", TINY_OPTIONS, kinds=("text",), steps=5, micro_batches=2),
    *(
        Case("tiny-siglip", "whole", side, TINY_OPTIONS, steps=5, micro_batches=2)
        for side in ("megavl", "transformers")
    ),
)
"""The tiny models, anywhere. All sides have equal weights, so their losses must be equal."""
SWITCHES = (
    ("--checkpointing",),
    ("--compile",),
    ("--uncompiled",),
    ("--rounded-gradients",),
    ("--half-state",),
    ("--recompute", "selective"),
)
"""Options that the report compares with the case without them."""
FIRST = (
    "1b whole megavl",
    "1b whole transformers",
    "1b whole megavl recompute selective",
    "7b last megavl",
    "tiny whole megavl precision fp32",
    "tiny whole transformers precision fp32",
)
"""The most telling cases; with the tests of CUDA and few steps they take 8 minutes on a GPU."""
PROFILED = ("1b whole megavl", "1b whole transformers", "7b first megavl", "tiny whole megavl precision fp32")
LOSS_TOLERANCE = 1e-5
"""Largest relative difference of the tiny model's first losses from MegaVL's, fp32."""


def main() -> int:
    """Measure, print and write the report."""
    names = [case.name for case in (*FULL, *TINY)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", choices=names, metavar="CASE", help="default: all. " + "; ".join(names)
    )
    parser.add_argument("--set", choices=("first", "rest"), help="the most telling cases with the tests, or the others")
    parser.add_argument("--steps", type=int, metavar="N", help="most steps of a case, besides 3 that warm up")
    parser.add_argument("--cuda-tests", action="store_true", help="run the tests of CUDA also with --case")
    parser.add_argument("--quick", action="store_true", help="only two steps of the tiny model on the three sides")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the report goes")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds that a case may take")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps: {arguments.steps} is too few; measure at least 1")
    if arguments.case and arguments.set:
        parser.error("--case and --set choose cases both; give one of them")
    arguments.out = arguments.out.resolve()
    os.chdir(ROOT)
    repeats = ("--repeats", 2 if arguments.quick else 20)
    (ceilings,) = ask("launch.bench.engines.step_ceiling", *ONE_THREAD, *repeats, gpu=True, limit=arguments.limit)
    path = report_path("step", where=device(ceilings), folder=arguments.out).with_suffix(".json")
    some = bool(arguments.case or arguments.set)
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and some else {}
    plans = plans_of(ceilings)
    found: dict[str, Any] = {"cases": kept.get("cases", {}), "ceilings": ceilings, "plans": plans}
    found |= {"versions": versions(*PACKAGES), "load": os.getloadavg()[0], "cuda_tests": kept.get("cuda_tests")}
    if ceilings["cuda"] and (not some or arguments.cuda_tests or arguments.set == "first"):
        found["cuda_tests"] = cuda_tests(limit=arguments.limit)
    for case in chosen(arguments, on_gpu=ceilings["cuda"]):
        print(f"{case.name} ...", flush=True)
        # 0 stands for as many as fit: more do with half the state.
        layers = plans[f"{case.model} {case.part}"]["layers"] if case in FULL and not case.halves else 0
        words = words_of(case, layers=layers, quick=arguments.quick, most=arguments.steps)
        found["cases"][case.name] = measure(case, words, limit=arguments.limit)
        # Whatever ends the command, the report has the cases that are done.
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_report(path.with_suffix(".md"), report(found))
    return 0 if sound(found["cases"]) and (found["cuda_tests"] or {"passed": True})["passed"] else 1


def cuda_tests(*, limit: float) -> dict[str, Any]:
    """Whether CUDA agrees with the CPU, and what the tests printed about it in at most `limit` seconds."""
    print("tests/numerics/test_cuda.py ...", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "tests/numerics/test_cuda.py"]
    try:
        done = subprocess.run(command, env=environment(gpu=True), capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"passed": False, "lines": [f"not done after {limit:g} s"]}
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    tables = ("CUDA against CPU", "times that the host waits", "FAILED", "ERROR")
    shown = [line for line in lines[:-1] if any(word in line for word in tables)]
    return {"passed": done.returncode == 0, "lines": [*shown, *lines[-1:]]}


def chosen(arguments: argparse.Namespace, *, on_gpu: bool) -> list[Case]:
    """The cases to run here."""
    if arguments.quick:
        return list(TINY[: len(NAMES)])
    able = find_spec("transformer_engine") is not None
    cases = [*(case for case in FULL if on_gpu and (able or not case.halves)), *TINY]
    if arguments.set:
        return [case for case in cases if (case.name in FIRST) == (arguments.set == "first")]
    if arguments.case:
        cases = [case for case in cases if case.name in arguments.case]
        if len(cases) < len(set(arguments.case)):
            raise SystemExit("error: --case: full-size cases need a GPU, and half-state Transformer Engine")
    return cases


def plans_of(ceilings: dict[str, Any]) -> dict[str, Any]:
    """How many layers of each full-size part the device holds; without a GPU, an H200 by its data sheet."""
    memory = USABLE_SHARE * (ceilings["memory_bytes"] or DEVICES["h200"].memory_bytes)
    parts = dict.fromkeys((case.model, case.part) for case in FULL)
    return {f"{model} {part}": plan(model, part, memory_bytes=memory) for model, part in parts}


def words_of(case: Case, *, layers: int, quick: bool, most: int | None) -> list[object]:
    """Arguments of the measuring program."""
    words = ["--side", case.side, "--model", case.model, "--part", case.part, "--layers", layers, *case.options]
    words += ["--kind", *case.kinds, "--micro-batches", case.micro_batches]
    steps = 2 if quick else case.steps
    words += ["--steps", steps if most is None else min(steps, most), "--warm-up", 1 if quick else 3]
    words += ONE_THREAD
    if case.name in PROFILED:
        words += ["--profile", f"runs/step_traces/{case.name.replace(' ', '_')}.json.gz"]
    return words


def measure(case: Case, words: Sequence[object], *, limit: float) -> dict[str, Any]:
    """What one case printed by kind, or why it failed."""
    began = time.perf_counter()
    text, failure = run("launch.bench.engines.step_speed", *words, gpu=True, limit=limit)
    print(f"{case.name}: {time.perf_counter() - began:.0f} s {failure}", flush=True)
    return {row["kind"]: row for row in json_lines(text)} | ({"failed": failure} if failure else {})


def sound(cases: dict[str, Any]) -> bool:
    """Whether MegaVL ran in all its cases, and the first losses of all sides of a tiny model are the same."""
    ours = [found for name, found in cases.items() if " megavl" in name]
    return (
        not any("failed" in found for found in ours) and max(loss_errors(cases).values(), default=0) <= LOSS_TOLERANCE
    )


def loss_errors(cases: dict[str, Any]) -> dict[str, float]:
    """Relative difference of the first loss from MegaVL's, by case and kind."""
    errors = {}
    for case in TINY:
        ours = cases.get(f"{case.model} whole megavl precision fp32", {})
        for kind in case.kinds:
            row = cases.get(case.name, {}).get(kind)
            if case.part == "whole" and "fp32" in case.options and row and kind in ours:
                errors[f"{case.name} {kind}"] = abs(row["losses"][0] / ours[kind]["losses"][0] - 1)
    return errors


def device(ceilings: dict[str, Any]) -> str:
    """The device in the name of the report's file."""
    return re.sub(r"[^a-z0-9]+", "-", str(ceilings["device"]).lower()) if ceilings["cuda"] else hardware()


def rows_of(cases: dict[str, Any], case: Case, ceilings: dict[str, Any]) -> list[str]:
    """A line of the table for each kind of step."""
    lines = []
    for kind in case.kinds:
        found = cases.get(case.name, {})
        title = f"{case.model} {case.part}: {' '.join([NAMES[case.side], *case.options])}"
        if kind not in found:
            reason = "failed, see below" if "failed" in found else NOT_MEASURED
            lines.append(table_row(title, kind, reason, *[""] * 7))
            continue
        row = found[kind]
        precision = "fp32" if "fp32" in case.options else "bf16"
        # The planner's formulas are MegaVL's, and a process holds more than its tensors.
        planned = ceilings["cuda"] and case.side == "megavl"
        expected = f" ({row['planned_bytes'] / 2**30:.2f})" if planned else ""
        best = best_rate(cases, case, kind)
        cells = [
            str(row["layers"]),
            f"{1000 * row['step_s']:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            "no peak known" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['flops_per_s'] / ceilings['flops_per_s'][precision]:.1%}",
            "-" if best is None else f"{row['tokens_per_s'] / best:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f}{expected}",
            f"{row['losses'][0]:.5f}",
        ]
        lines.append(table_row(title, kind, *cells))
    return lines


def best_rate(cases: dict[str, Any], case: Case, kind: str) -> float | None:
    """Tokens per second of the fastest of transformers' settings on a case's work."""
    peers = [c for c in (*FULL, *TINY) if (c.model, c.part, c.side) == (case.model, case.part, "transformers")]
    rates = [cases[c.name][kind]["tokens_per_s"] for c in peers if kind in cases.get(c.name, {})]
    return max(rates, default=None)


def goals(cases: dict[str, Any]) -> list[str]:
    """The goals for one H200, and what was reached."""
    small = FULL[0]
    text, images = (cases.get(small.name, {}).get(kind) for kind in BOTH)
    large = [
        cases[case.name]["text"]["mfu"]
        for case in FULL
        if case.model == "7b" and case.side == "megavl" and "text" in cases.get(case.name, {})
    ]
    speedups = []
    for kind, row in (("text", text), ("multimodal", images)):
        best = best_rate(cases, small, kind)
        if row and best:
            speedups.append(row["tokens_per_s"] / best)
    ratio = images["tokens_per_s"] / text["tokens_per_s"] if text and images else None
    slowest = max((drift(row["seconds"]) for row in (text, images) if row), default=None)
    rows = (
        ("1.3B, MFU of text steps", ">= 50%", text and text["mfu"], "{:.1%}"),
        ("7B or its slices, MFU of text steps, the best", ">= 52%", max(filter(None, large), default=None), "{:.1%}"),
        ("1.3B, tokens/s of multimodal against text steps", ">= 0.93", ratio, "{:.2f}"),
        ("1.3B, tokens/s against transformers' best, the smaller", ">= 1.5", min(speedups, default=None), "{:.2f}"),
        ("1.3B, the last 10% of 200 steps against the first 10%, the larger", "no drift", slowest, "{:.3f}"),
    )
    return [
        table_row(what, goal, NOT_MEASURED if value is None else shape.format(value))
        for what, goal, value, shape in rows
    ]


def drift(seconds: list[float]) -> float:
    """Median step of the last tenth over that of the first."""
    part = max(1, len(seconds) // 10)
    return statistics.median(seconds[-part:]) / statistics.median(seconds[:part])


def where_the_time_goes(cases: dict[str, Any], ceilings: dict[str, Any]) -> list[str]:
    """Regions of every case, and the largest operators of the profiled ones."""
    measured = [(case, kind) for case in (*FULL, *TINY) for kind in case.kinds if kind in cases.get(case.name, {})]
    shown = [(case, kind, cases[case.name][kind]["regions"]) for case, kind in measured]
    regions = next((list(found) for _, _, found in shown if found), [])
    head = ["case", "step", *regions, "idle", "optimizer's traffic, of the copy"]
    lines, profiles = [], []
    for case, kind, found in shown:
        profile = cases[case.name][kind].get("profile")
        if profile:
            profiles.append((case, kind, profile))
        if found:
            idle = f"{profile['idle']:.1%}" if profile and profile["idle"] is not None else "-"
            row = cases[case.name][kind]
            rate = row["update_bytes"] / (found["optimizer"] * statistics.mean(row["seconds"]))
            cells = [*(f"{found[name]:.1%}" for name in regions), idle, f"{rate / ceilings['copy_bytes_per_s']:.1%}"]
            lines.append(table_row(case.name, kind, *cells))
    lines = table(table_row(*head), lines)
    for case, kind, profile in profiles:
        lines += ["", f"### {case.name}, one {kind} step", ""]
        whole = sum(row["share"] for row in profile["operators"])
        lines += [
            f"{profile['clock']}: {profile['milliseconds']:,.1f} ms together, {whole:.0%} of them in the operators "
            f"below. Chrome trace: `{profile['trace']}`.",
            *table("| operator | calls | ms | share |", map(operator_row, profile["operators"])),
        ]
    return lines


def operator_row(found: dict[str, Any]) -> str:
    """One line of the table of operators."""
    name = found["name"].replace("|", "\\|")[:100]
    return table_row(f"`{name}`", found["calls"], f"{found['ms']:,.2f}", f"{found['share']:.1%}")


def tried(cases: dict[str, Any]) -> list[str]:
    """What each switch changed, whether it helped or not, and what did not run."""
    lines = []
    for case in (*FULL, *TINY):
        switch = next((words for words in SWITCHES if case.options[-len(words) :] == words), None)
        if switch is None:
            continue
        base = cases.get(replace(case, options=case.options[: -len(switch)]).name, {})
        found = cases.get(case.name, {})
        for kind in case.kinds:
            if kind in found and kind in base:
                speed = found[kind]["tokens_per_s"] / base[kind]["tokens_per_s"]
                memory = found[kind]["peak_bytes"] / base[kind]["peak_bytes"]
                lines.append(
                    f"- {case.name}, {kind}: {speed:.2f} of the tokens/s without it, {memory:.2f} of the memory"
                )
    lines += [f"- {name}: did not run, `{found['failed']}`" for name, found in cases.items() if "failed" in found]
    return lines or [NOT_MEASURED]


def fitting(plans: dict[str, Any]) -> list[str]:
    """What the device is expected to hold."""
    lines = []
    for part, row in plans.items():
        cells = (row["bytes"][key] for key in ("weights", "gradients", "optimizer", "activations", "peak"))
        held = f"{row['layers']} of {row['of_layers']}"
        lines.append(table_row(part, held, *(f"{value / 1e9:.1f}" for value in cells)))
    return table("| part | decoder layers | weights GB | gradients | optimizer | activations | peak |", lines)


TABLE = (
    "| case | step | layers | step ms | tokens/s | MFU | of the matrix product | tokens/s against transformers' best "
    "| peak GiB (expected) | first loss |"
)


METHOD = (
    "- Work: the second stage's recipe (decoder and adaptor train, the towers are frozen). Sequences have 4,096 tokens "
    "(tiny: 512) of random tokens, each one document, with five images or none; 8 sequences a step (tiny: 2), one "
    "forward pass each. Batches are on the device before the step begins; transformers gets normalised pixels, MegaVL "
    "uint8.",
    "- transformers: its own class, loss and SDPA, weights and moments in the type of the step, torch's fused AdamW, "
    "clipping at norm 1. MegaVL: fp32 gradients, master weights and moments. megatron-core's local attention: MegaVL "
    "with `DotProductAttention` instead of `PackedAttention`.",
    "- Times: CUDA events (on a CPU, the host's clock, one thread). The measurement waits for the device after the "
    "last step only. Times are the median of the steps after three that warm up. Regions lie between events where "
    "tensors pass from part to part, forward and back; `vision` holds the embedding. Idle: share of a profiled step in "
    "which no kernel ran. The optimizer's traffic is what an update must read and write at least.",
    "- Memory: the largest sum of tensors on CUDA; on a CPU the process, libraries included.",
)
DRY = (
    "**Dry run: there is no GPU on this machine.** Every part of the command ran at tiny size on the CPU; the "
    "full-size columns are empty, and none of them is estimated. `bash launch/bench/gpu.sh` on a machine with one GPU "
    "fills them."
)


def report(found: dict[str, Any]) -> list[str]:
    """Markdown with the command, ceilings, figures, goals, and where the time goes."""
    cases, ceilings, plans = found["cases"], found["ceilings"], found["plans"]
    errors, some = loss_errors(cases), next(iter(plans.values()))
    planned = "The device" if ceilings["cuda"] else "An H200 (141 GB by its data sheet)"
    worst = f"{max(errors.values()):.1e}" if errors else NOT_MEASURED
    products = ceilings["products"]
    return [
        f"# Training steps on {ceilings['device']}",
        "",
        f"`bash launch/bench/gpu.sh`; {found['versions']}, CUDA {ceilings['cuda_version'] or 'absent'}; "
        f"load average {found['load']:.1f} at the start.",
        "",
        *([] if ceilings["cuda"] else [DRY, ""]),
        "## Ceilings",
        *table(
            "| | TFLOP/s bf16 | TFLOP/s fp32 |",
            (
                table_row(shape, f"{rate / 1e12:,.3f}", f"{products['fp32'][shape] / 1e12:,.3f}")
                for shape, rate in products["bf16"].items()
            ),
        ),
        "",
        f"A copy reads and writes {ceilings['copy_bytes_per_s'] / 1e9:,.1f} GB/s. Shares below are of the fastest "
        "product of the same type.",
        "",
        "## Full size, bf16",
        *table(TABLE, (line for case in FULL for line in rows_of(cases, case, ceilings))),
        *table("| goal for one H200 | | reached |", goals(cases)),
        "",
        f"{planned} is planned with up to {some['usable_bytes'] / 1e9:.1f} GB. The whole 7B with fp32 master weights "
        "and moments exceeds that. It fits with half the optimizer's state (`--half-state`), which takes Transformer "
        "Engine. Else it is measured with as many layers as the planner's formulas allow: with vision side, embedding "
        "and head (`whole`), as a first pipeline stage (`first`, no head) and as a last one (`last`, no vision side).",
        *fitting(plans),
        "",
        "## Tiny size, fp32 unless stated otherwise",
        "",
        f"All sides hold the same weights. Largest relative difference of a first loss from MegaVL's: {worst} "
        f"(limit {LOSS_TOLERANCE:.0e}).",
        *table(TABLE, (line for case in TINY for line in rows_of(cases, case, ceilings))),
        "",
        "## CUDA against the CPU",
        "",
        "`tests/numerics/test_cuda.py`: the tiny model's first loss in fp32, and twenty steps in bf16.",
        "",
        *(f"- {line}" for line in (found["cuda_tests"] or {"lines": [NOT_MEASURED]})["lines"]),
        "",
        "## Where the time goes",
        *where_the_time_goes(cases, ceilings),
        "",
        "## What was tried",
        "",
        *tried(cases),
        "",
        "## How it was measured",
        "",
        f"- {some['convention']}.",
        *METHOD,
    ]


if __name__ == "__main__":
    sys.exit(main())
