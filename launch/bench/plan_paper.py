"""What the planner predicts for the published runs: days of training, and the gain of modality-grouped steps.

Asks `megavl plan` for DeepSeek-VL's stage 2 (arXiv 2403.05525) on 512 and 128 A100s, prints it beside the paper's 5 and
7 days and +20%, and writes `launch/bench/results/plan_paper_<YYYYMM>.md` with every assumption.

    python launch/bench/plan_paper.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECOMPUTE = ("--placements", "recompute")


@dataclass(frozen=True)
class Run:
    """A published run."""

    name: str
    recipe: str
    devices: int
    days: float
    """Published, if all of them are stage 2."""
    step_s: float
    """What that makes of a step."""
    cut: tuple[str, ...] = ()
    """The paper's rules: no pipeline for the 1B model."""


RUNS = (
    Run("7B", "launch/recipes/7b/stage2.yaml", 512, 5, 10.3),
    Run("1.3B", "launch/recipes/1b/stage2.yaml", 128, 7, 6.3, ("parallel.pipeline=1", "parallel.layout=auto")),
)
CLUSTERS = {
    "a100": "DGX A100: NVLink, 200 Gb/s a device",
    "a100-pcie": "PCIe A100, 200 Gb/s a node of eight",
}
SHARES = (0.3, 0.6)
IMAGES = (1, 3, 5, 7)
ASSUMPTIONS = (
    "The published days are all stage 2 (42,000 and 96,000 steps of Table 5); which stages they cover is not said.",
    "A multimodal sequence holds 5 images unless a row says otherwise; the paper does not say how many.",
    "Multimodal steps are 30% after a linear warm-up of 2,000 steps; the paper gives neither length nor shape.",
    "bf16, fp32 gradient accumulation, AdamW sharded over data-parallel ranks, selective recompute of the core "
    "attention, as in the recipes of this repository; the paper gives none of these.",
    "Attention is counted over whole sequences of 4,096 tokens; masked document borders would cost less.",
    "Our kernels: SAM's relative-position bias as extra channels of fused attention (0.42 TFLOP an image), no fused "
    "norm, activation or gradient accumulation. DeepSeek's HAI-LLM is not public.",
    "No stragglers, failures, checkpoints, evaluation or waiting for data; devices run at their sustained clocks.",
    "Which cluster the paper used is not said; both rows are plausible. 8 A100s a node is all that it states.",
)
MIXING_ASSUMPTIONS = (
    "Grouped: every step is wholly one kind. Mixed: every sequence is multimodal with the given probability, "
    "independently, on every replica. Both with the same layout: the recipe's sizes, layers balanced for the share.",
    "Replicas wait for each other at the end of a step (megatron-core's distributed optimizer), or after every "
    "micro-batch (sharded weights gathered for each of them); which of the two the paper's system did is not said.",
    "All multimodal sequences hold the same number of images. Without packing in two dimensions counts would vary, "
    "which makes mixed steps slower still; that is not simulated.",
    "8 mixed steps of all replicas are drawn.",
    "The paper's +20% (Figure 8) is one ablation at 60% multimodal; its model, cluster and layout are not given.",
)


def main() -> int:
    """Ask, print and write the report."""
    os.chdir(ROOT)
    days = list(days_table())
    mixing = list(mixing_table())
    path = ROOT / "launch/bench/results" / f"plan_paper_{time.strftime('%Y%m')}.md"
    path.write_text(report(days, mixing), encoding="utf-8")
    print(path)
    return 0


def days_table() -> Iterator[str]:
    """Per run and cluster: the recipe's layout, the best under the paper's placement, the best of all."""
    for run in RUNS:
        yield f"| {run.name}, {run.devices} A100: **published** | - | {run.step_s} | - | - | **{run.days:.0f}** |"
        for device in CLUSTERS:
            shared = plan(run, device, "--top", "6", *RECOMPUTE)
            yield row(run, device, "recipe's layout", shared["expected"], layout(shared), days=shared["days"])
            choices = {"best with encoders repeated (paper)": shared, "best of all": plan(run, device, "--top", "1")}
            for name, found in choices.items():
                best = found["ranking"]["best"]
                if run.cut and name != "best of all":
                    best = [item for item in best if item["choice"]["pipeline"] == 1] or best
                top = best[0]
                whole = shared["days"] * top["seconds"] / shared["expected"]["seconds"]
                yield row(run, device, name, top, describe(top), days=whole)


def row(run: Run, device: str, name: str, step: dict[str, Any], cut: str, *, days: float) -> str:
    """One line of the table, printed too."""
    rate, mfu = step["tokens_per_s"] / run.devices, step["mfu"]
    line = f"| {run.name}, {device}: {name} | {cut} | {step['seconds']:.2f} | {rate:,.0f} | {mfu:.1%} | {days:.1f} |"
    print(line, flush=True)
    return line


def layout(found: dict[str, Any]) -> str:
    """The recipe's cut."""
    held = [rank["layers"] for rank in found["ranks"]]
    layers = "+".join(str(part) for chunk in zip(*held) for part in chunk)
    return f"TP {found['tensor']} x PP {found['pipeline']}, layers {layers}, {found['vision']}"


def describe(item: dict[str, Any]) -> str:
    """A ranked cut."""
    choice = item["choice"]
    virtual = f" x virtual {choice['virtual']}" if choice["virtual"] > 1 else ""
    return (
        f"TP {choice['tensor']} x PP {choice['pipeline']}{virtual}, micro-batch {choice['micro_batch_size']}, layers "
        f"{'+'.join(map(str, item['layout']))}, {choice['vision']}"
    )


def mixing_table() -> Iterator[str]:
    """Grouped against mixed, by run, cluster, share and images."""
    for run in RUNS:
        for device in CLUSTERS:
            for share in SHARES:
                for images in IMAGES:
                    settings = [f"data.multimodal_fraction={share}", "data.modality_warmup_steps=0"]
                    found = plan(run, device, "--images", str(images), "--mixing", "--top", "0", settings=settings)
                    mixing = found["mixing"]
                    line = (
                        f"| {run.name}, {device} | {share:.0%} | {images} | {mixing['grouped_s']:.2f} | "
                        f"{mixing['mixed_s']:.2f} | {mixing['gain']:+.1%} | {mixing['lockstep_gain']:+.1%} |"
                    )
                    print(line, flush=True)
                    yield line


def plan(run: Run, device: str, *options: str, settings: list[str] | None = None) -> dict[str, Any]:
    """`megavl plan --json`."""
    command = [sys.executable, "-m", "megavl", "plan", run.recipe, *run.cut, *(settings or [])]
    command += ["--devices", str(run.devices), "--device", device, "--json", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(days: list[str], mixing: list[str]) -> str:
    """Markdown with both tables and every assumption."""
    lines = [
        "# Planner against the published runs",
        "",
        "`python launch/bench/plan_paper.py`; nothing here was measured, every number but the paper's is a prediction.",
        "",
        "## Days of stage 2",
        "",
        "| run | layout | s/step | tokens/s/device | MFU | days |",
        "|---|---|---|---|---|---|",
        *days,
        "",
        f"{plan(RUNS[0], next(iter(CLUSTERS)), '--top', '0')['mfu_convention']}.",
        "",
        "## Grouped against randomly mixed modality",
        "",
        "The paper reports +20% for grouped steps (Figure 8). Simulated with the recipe's layout:",
        "",
        "| run | multimodal | images a sequence | grouped s | mixed s | grouping does more "
        "| if replicas wait after every micro-batch |",
        "|---|---|---|---|---|---|---|",
        *mixing,
        "",
        "## Assumptions",
        "",
        *(f"- {line}" for line in ASSUMPTIONS),
        *(f"- {line}" for line in MIXING_ASSUMPTIONS),
        "",
    ]
    for device, name in CLUSTERS.items():
        lines += [f"Numbers of {device} ({name}):", ""]
        lines += [f"- {line}" for line in plan(RUNS[0], device, "--top", "0")["assumptions"]]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
