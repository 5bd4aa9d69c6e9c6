"""The same training steps on several releases of megatron-core, compared bit by bit.

Installs each release beside this environment, runs every layout of a table on it, and writes
`launch/bench/results/releases_<processor>_<YYYYMM>.md`. A run takes four steps of two modalities and saves
in its middle. One more run goes on from the checkpoint that the first release saved there. The same command goes on
where an earlier one ended.

    python -m launch.bench.releases --work DIR [0.16.1 0.17.1 0.18.2 0.19.2]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.bench.kills import make_data
from launch.bench.programs import environment, launcher
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

RECIPE = "launch/recipes/tiny/stage2.yaml"
RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")
STEPS, MIDDLE = 4, 2
COLUMNS = ("step", "modality", "loss", "grad_norm", "lr", "loss_tokens", "images", "consumed_samples")
ALONE = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence_parallel=false")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Ranks and settings.
    "one rank": (1, ALONE),
    "one rank, bf16": (1, (*ALONE, "training.precision=bf16")),
    "tensor 2 x pipeline 2": (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true")),
    "tensor 2 x pipeline 2, bf16": (
        4,
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence_parallel=true", "training.precision=bf16"),
    ),
    "pipeline 2 x virtual 2": (2, (*ALONE, "parallel.pipeline=2", "parallel.virtual_pipeline=2")),
    "pipeline 2 x virtual 2, bf16": (
        2,
        (*ALONE, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "training.precision=bf16"),
    ),
    "data 2, overlapped": (2, ALONE),
}


def main() -> int:
    """Run what is missing and write the report; 1 if some release differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for releases, data and runs")
    parser.add_argument("releases", nargs="*", default=RELEASES, help="the first is what the others are compared with")
    arguments = parser.parse_args()
    work, releases = arguments.work.resolve(), tuple(arguments.releases)
    data = work / "data"
    if not (data / "shards/manifest.json").exists():
        make_data(data)
    for release in releases:
        install(release, work / "releases" / release)
    rows = []
    for layout in LAYOUTS:
        first = train(layout, releases[0], work=work)
        cells = [layout]
        for release in releases[1:]:
            cells.append(difference(train(layout, release, work=work), first))
            cells.append(difference(train(layout, release, work=work, goes_on=releases[0]), first[MIDDLE:]))
        rows.append(cells)
        print(table_row(*cells), flush=True)
    write_report(report_path("releases"), report(rows, releases=releases, steps=first))
    return int(any(cell != "equal" for cells in rows for cell in cells[1:]))


def install(release: str, folder: Path) -> None:
    """Put one release into a folder of its own. Wheels from 0.17 on state Python 3.12, but run on 3.11."""
    if not folder.exists():
        words = ["--quiet", "--no-deps", "--ignore-requires-python", "--target", str(folder.with_suffix(".part"))]
        subprocess.run([sys.executable, "-m", "pip", "install", *words, f"megatron-core=={release}"], check=True)
        folder.with_suffix(".part").rename(folder)


def train(layout: str, release: str, *, work: Path, goes_on: str | None = None) -> list[dict[str, Any]]:
    """Rows of a run; with `goes_on`, of one that begins at the middle checkpoint of that release's run."""
    ranks, settings = LAYOUTS[layout]
    name = layout.replace(" ", "-").replace(",", "")
    run = work / "runs" / f"{name}-{release}{f'-from-{goes_on}' if goes_on else ''}"
    if not finished(run):
        shutil.rmtree(run, ignore_errors=True)
        if goes_on:
            middle = f"iter_{MIDDLE:07d}"
            shutil.copytree(work / "runs" / f"{name}-{goes_on}" / "checkpoints" / middle, run / "checkpoints" / middle)
        variables = environment()
        variables["PYTHONPATH"] = os.pathsep.join([str(work / "releases" / release), variables["PYTHONPATH"]])
        words = ["train", RECIPE, *settings, *common(work / "data", run)]
        subprocess.run([*launcher("megavl", processes=ranks), *words], env=variables, check=True, capture_output=True)
    return rows_of(run)


def common(data: Path, run: Path) -> list[str]:
    """Settings of every run."""
    return [
        *(f"data.sources=[{{path: {data}/shards}}]", f"data.tokenizer={data}/corpus/tokenizer", "data.seq_length=256"),
        *(f"run.dir={run}", "run.tensorboard=false", "checkpoint.init=null", "checkpoint.allow_random_init=true"),
        *(f"training.steps={STEPS}", "training.global_batch_size=4", "training.micro_batch_size=1"),
        *("optimizer.warmup_steps=2", f"checkpoint.interval={MIDDLE}", "parallel.layout=auto"),
        *("data.multimodal_fraction=0.5", "data.modality_warmup_steps=0", "evaluation.interval=0"),
    ]


def finished(run: Path) -> bool:
    """Whether a run has ended well."""
    try:
        return bool(json.loads((run / "exit_status.json").read_text())["code"] == 0)
    except OSError:
        return False


def rows_of(run: Path) -> list[dict[str, Any]]:
    """What does not depend on the time, of every step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: row[name] for name in COLUMNS} for row in rows]


def difference(found: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """`equal`, or the first number that differs."""
    for mine, other in zip(found, first, strict=True):
        for name in COLUMNS:
            if mine[name] != other[name]:
                return f"step {mine['step']}: {name} {mine[name]!r}, not {other[name]!r}"
    return "equal"


def report(rows: list[list[str]], *, releases: tuple[str, ...], steps: list[dict[str, Any]]) -> list[str]:
    """The lines of the report."""
    head = [
        "layout",
        *(text for name in releases[1:] for text in (name, f"{name}, from a checkpoint of {releases[0]}")),
    ]
    return [
        "# Releases of megatron-core, bit by bit",
        "",
        f"Losses, gradient norms and counts of {STEPS} training steps, compared with megatron-core {releases[0]}. "
        f"`{RECIPE}` over gloo, steps of 4 sequences, {sum(row['modality'] == 'text' for row in steps)} of them "
        "text-only, fp32 unless bf16 is named. Where a run goes on from another release's checkpoint, "
        f"steps {MIDDLE + 1} to {STEPS} are compared.",
        "",
        f"    python -m launch.bench.releases --work DIR {' '.join(releases)}",
        "",
        f"{machine()}, {versions('torch')}; wheels for Python 3.12 installed with `--ignore-requires-python`.",
        *table(f"| {' | '.join(head)} |", [table_row(*cells) for cells in rows]),
    ]


if __name__ == "__main__":
    sys.exit(main())
