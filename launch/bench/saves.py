"""Saves and loads of four data-parallel ranks: who writes and reads how much, and how long training stands still.

An earlier version of MegaVL and this one save the same model in turn. Writes
`launch/bench/results/saves_<processor>_<YYYYMM>.md`.

    python -m launch.bench.saves --work DIR [--before COMMIT] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from launch.bench.programs import CPU, ROOT, json_lines, python
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

RANKS = 4
TURNS = 2
"""How often both versions start."""
BEFORE = "9dbb4bc"
"""The last commit with one writer for each model-parallel position."""
ENGINE = ROOT / "launch/bench/engines/save_speed.py"


def main() -> int:
    """Measure both versions and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints of about 1 GB each")
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="saves of each start and kind")
    arguments = parser.parse_args()
    earlier = arguments.work / "before"
    if not earlier.exists():
        check_out(arguments.before, earlier)
    sides: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    for _ in range(TURNS):
        for side, tree in (("before", earlier), ("now", ROOT)):
            sides[side] += measure(tree, arguments.work / "checkpoints", rounds=arguments.rounds)
    write_report(report_path("saves"), report(sides, before=arguments.before, rounds=arguments.rounds))
    return 0


def check_out(commit: str, folder: Path) -> None:
    """The tree of a commit, in a folder."""
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)


def measure(tree: Path, folder: Path, *, rounds: int) -> list[dict[str, Any]]:
    """Rows of one start of the version in a tree."""
    shutil.rmtree(folder, ignore_errors=True)
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS))
    command = [python(), "-W", "ignore", *ranks, str(ENGINE), str(folder), "--rounds", str(rounds)]
    variables = {**os.environ, **CPU, "PYTHONPATH": str(tree), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=tree, env=variables, capture_output=True, text=True, check=False)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        named = [line for line in done.stderr.splitlines() if line.startswith("[rank") and "Error" in line]
        raise SystemExit(f"error: {tree}: {(named or [done.stderr[-2000:]])[0]}")
    return json_lines(done.stdout)


def report(sides: dict[str, list[dict[str, Any]]], *, before: str, rounds: int) -> list[str]:
    """The lines of the report."""

    def values(side: str, kind: str, name: str) -> list[Any]:
        return [row[name] for row in sides[side] if row["kind"] == kind]

    old, new = (values(side, "waiting", "standstill_s") for side in ("before", "now"))
    background = values("now", "background", "standstill_s")
    parameters = values("now", "files", "parameters")[0]
    megabytes = sum(values("now", "files", "written")[0]) / 1e6
    lines = [
        "# Saves and loads of four data-parallel ranks",
        "",
        f"    python -m launch.bench.saves --work DIR --before {before} --rounds {rounds}",
        "",
        f"{machine()}, {versions('torch', 'megatron-core')}. A model of {parameters / 1e6:.0f} M parameters in fp32, "
        f"with the distributed optimizer, makes checkpoints of {megabytes:.0f} MB, over gloo, on one disk. Commit "
        f"{before} and this version start in turn, {TURNS} times each, and save {rounds} times a start. Every "
        "time is a median, with the shortest and longest.",
        "",
        f"An asynchronous save lets training stand still for {median(background) / median(old):.2f} of the time that a "
        f"save took before, and a save that waits takes {median(new) / median(old):.2f} of it.",
    ]
    lines += table(
        "| training stands still for | s |",
        [
            table_row(f"a save before ({before})", spread(old)),
            table_row("a save now", spread(new)),
            table_row("an asynchronous save", spread(background)),
            table_row("its copy to host memory, and the division", spread(values("now", "background", "copy_s"))),
            table_row("its commit", spread(values("now", "background", "commit_s"))),
        ],
    )
    lines += table(
        "| bytes of each rank | before: largest / mean | now: largest / mean |",
        [
            table_row("written to shards", *(balance(values(side, "files", "written")) for side in sides)),
            table_row("read to verify and load", *(balance(values(side, "load", "read")) for side in sides)),
            table_row("seconds to verify and load", *(spread(values(side, "load", "seconds")) for side in sides)),
        ],
    )
    slowdown, writing = (values("now", "background", name) for name in ("slowdown", "writing_s"))
    lines += [
        "",
        f"While it is written, for {spread(writing)} s, {RANKS} ranks that compute and {RANKS} threads that write "
        f"share {os.cpu_count()} cores: a piece of work takes {spread(slowdown)} times as long as alone. On a GPU "
        "the work does not need these cores; that was not measured.",
    ]
    return lines


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def balance(rows: list[list[int]]) -> str:
    """Largest over mean, and megabytes of each rank."""
    ranks = rows[-1]
    return f"{max(ranks) / (sum(ranks) / len(ranks)):.2f} ({', '.join(f'{size / 1e6:.0f}' for size in ranks)} MB)"


if __name__ == "__main__":
    sys.exit(main())
