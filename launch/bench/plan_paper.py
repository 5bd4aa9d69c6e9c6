"""What the planner predicts for the published runs: days of training, and the gain of modality-grouped steps.

Asks `megavl plan` for DeepSeek-VL's stage 2 (arXiv 2403.05525) on 512 and 128 A100s, beside the paper's 5 and 7 days
and +20%, and on as many H100s. Writes `launch/bench/results/plan_paper_<YYYYMM>.md` with every assumption.

    python -m launch.bench.plan_paper
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.bench import report
from launch.bench.programs import ask_plan

RECOMPUTE = ("--placements", "recompute")


@dataclass(frozen=True)
class Run:
    """A published run."""

    name: str
    recipe: str
    devices: int
    days: float
    """As published, taken as stage 2 alone."""
    step_s: float
    """Seconds of a step that follow from the days."""
    rules: tuple[str, ...] = ()
    """Overrides by the paper's rules: no pipeline for the 1B model."""
    paper: str | None = None
    """Recipe with the paper's layout."""


RUNS = (
    Run("7B", "launch/recipes/7b/stage2.yaml", 512, 5, 10.3, paper="launch/recipes/7b/stage2_paper.yaml"),
    Run("1.3B", "launch/recipes/1b/stage2.yaml", 128, 7, 6.3, ("parallel.pipeline=1", "parallel.layout=auto")),
)
CLUSTERS = {
    "a100": "DGX A100: NVLink, 200 Gb/s a device",
    "a100-pcie": "PCIe A100, 200 Gb/s a node of eight",
    "h100": "DGX H100: NVLink, 400 Gb/s a device",
}
PAPERS_CLUSTERS = ("a100", "a100-pcie")
"""Those that the paper may have used."""
SHARES = (0.3, 0.6)
IMAGES = (1, 3, 5, 7)
ASSUMPTIONS = (
    "The published days are all stage 2 (42,000 and 96,000 steps of Table 5). The paper does not say which stages they "
    "cover.",
    "A multimodal sequence holds 5 images unless a row says otherwise. The paper does not say how many.",
    "Multimodal steps are 30% after a linear warm-up of 2,000 steps. The paper gives neither length nor shape.",
    "As in the recipes of this repository: bf16, fp32 gradient accumulation, AdamW sharded over data-parallel ranks, "
    "no recompute. `stage2_paper.yaml` recomputes the core attention. The paper gives none of these.",
    "Attention is counted over whole sequences of 4,096 tokens; masked document borders would cost less.",
    "Our kernels: SAM's relative-position bias as extra channels of fused attention (0.42 TFLOP an image), no fused "
    "norm, activation or gradient accumulation. DeepSeek's HAI-LLM is not public.",
    "No stragglers, failures, checkpoints, evaluation or waiting for data; devices run at their sustained clocks.",
    "The paper states 8 A100s a node and no more of its cluster; both rows are plausible.",
)
MIXING_ASSUMPTIONS = (
    "Grouped: every step is wholly one kind. Mixed: every sequence is multimodal with the given probability, "
    "independently, on every replica. Both with the same layout: the recipe's sizes, layers balanced for the share.",
    "Replicas wait for each other at the end of a step, as with megatron-core's distributed optimizer. Or they wait "
    "after every micro-batch, as with sharded weights that are gathered each time. The paper does not say which.",
    "All multimodal sequences hold the same number of images. Without packing in two dimensions counts would vary, "
    "which makes mixed steps slower still; that is not simulated.",
    "8 mixed steps of all replicas are drawn.",
    "The paper's +20% (Figure 8) is one ablation at 60% multimodal; its model, cluster and layout are not given.",
)


def main() -> int:
    """Ask, print and write the report."""
    lines = report_lines(list(days_table()), list(mixing_table()))
    report.write_report(report.report_path("plan_paper", where=""), lines)
    return 0


def days_table() -> Iterator[str]:
    """Per run and cluster: the recipe's layout, the paper's, the best under its placement, the best of all."""
    for run in RUNS:
        name = f"{run.name}, {run.devices} A100: **published**"
        yield report.table_row(name, "-", run.step_s, "-", "-", f"**{run.days:.0f}**")
        for device in CLUSTERS:
            shared = plan(run, device, "--top", "6", *RECOMPUTE)
            yield row(run, device, "recipe's layout", shared["expected"], layout(shared), days=shared["days"])
            if run.paper:
                paper = plan(replace(run, recipe=run.paper), device, "--top", "0")
                yield row(run, device, "paper's layout", paper["expected"], layout(paper), days=paper["days"])
            choices = {"best with encoders repeated (paper)": shared, "best of all": plan(run, device, "--top", "1")}
            for name, found in choices.items():
                best = found["ranking"]["best"]
                if run.rules and name != "best of all":
                    best = [item for item in best if item["choice"]["pipeline"] == 1] or best
                top = best[0]
                whole = shared["days"] * top["seconds"] / shared["expected"]["seconds"]
                yield row(run, device, name, top, describe(top), days=whole)


def row(run: Run, device: str, name: str, step: dict[str, Any], layout: str, *, days: float) -> str:
    """One line of the table, printed too."""
    rate, seconds = step["tokens_per_s"] / run.devices, f"{step['seconds']:.2f}"
    cells = (f"{run.name}, {device}: {name}", layout, seconds, f"{rate:,.0f}", f"{step['mfu']:.1%}", f"{days:.1f}")
    print(report.table_row(*cells), flush=True)
    return report.table_row(*cells)


def layout(found: dict[str, Any]) -> str:
    """The recipe's layout."""
    held = [rank["layers"] for rank in found["ranks"]]
    layers = "+".join(str(part) for chunk in zip(*held) for part in chunk)
    return f"TP {found['tensor']} x PP {found['pipeline']}, layers {layers}, {found['vision']}"


def describe(item: dict[str, Any]) -> str:
    """A layout of the search."""
    choice = item["choice"]
    virtual = f" x virtual {choice['virtual']}" if choice["virtual"] > 1 else ""
    return (
        f"TP {choice['tensor']} x PP {choice['pipeline']}{virtual}, micro-batch {choice['micro_batch_size']}, layers "
        f"{'+'.join(map(str, item['layout']))}, {choice['vision']}"
    )


def mixing_table() -> Iterator[str]:
    """Grouped against mixed, by run, cluster, share and images."""
    for run in RUNS:
        for device in PAPERS_CLUSTERS:
            for share in SHARES:
                for images in IMAGES:
                    settings = [f"data.multimodal_fraction={share}", "data.modality_warmup_steps=0"]
                    asked = replace(run, recipe=run.paper or run.recipe)
                    found = plan(asked, device, "--images", str(images), "--mixing", "--top", "0", settings=settings)
                    mixing = found["mixing"]
                    cells = (f"{run.name}, {device}", f"{share:.0%}", images, f"{mixing['grouped_s']:.2f}")
                    cells += (f"{mixing['mixed_s']:.2f}", f"{mixing['gain']:+.1%}", f"{mixing['lockstep_gain']:+.1%}")
                    print(report.table_row(*cells), flush=True)
                    yield report.table_row(*cells)


def plan(run: Run, device: str, *options: str, settings: list[str] | None = None) -> dict[str, Any]:
    """What `megavl plan` says of a run on a kind of device."""
    where = ("--devices", run.devices, "--device", device)
    return ask_plan(run.recipe, *run.rules, *(settings or []), *where, *options)


def report_lines(days: list[str], mixing: list[str]) -> list[str]:
    """Markdown with both tables and every assumption."""
    lines = [
        "# Planner against the published runs",
        "",
        "`python -m launch.bench.plan_paper`; nothing here was measured. Every number but the paper's is a prediction.",
        "",
        "## Days of stage 2",
        *report.table("| run | layout | s/step | tokens/s/device | MFU | days |", days),
        "",
        f"{plan(RUNS[0], next(iter(CLUSTERS)), '--top', '0')['mfu_convention']}.",
        "",
        "## Grouped against randomly mixed modality",
        "",
        "The paper reports +20% for grouped steps (Figure 8). Simulated for the paper's layout of the 7B and the "
        "recipe's of the 1.3B:",
        *report.table(
            "| run | multimodal | images a sequence | grouped s | mixed s | grouping does more "
            "| if replicas wait after every micro-batch |",
            mixing,
        ),
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
    return lines


if __name__ == "__main__":
    sys.exit(main())
