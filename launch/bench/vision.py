"""Seconds and memory of the full-size vision towers, against transformers' modules in the same run.

Times SAM-B and SigLIP-L on the same images and weights, round by round in one process. Then each implementation runs
alone, for its peak memory. Writes `launch/bench/results/vision_<forward|train>_<processor>_<YYYYMM>.md`. Needs the
extra `hf`.

    python -m launch.bench.vision [--repeats 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from launch.bench.programs import ask
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

ENGINE = "launch.bench.engines.vision_speed"
NAMES = {"megavl": "MegaVL", "eager": "transformers, eager", "sdpa": "transformers, SDPA"}
TOWERS = {"sam": "SAM-B at 1024", "siglip": "SigLIP-L at 384"}


def main() -> int:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    for tower, title in TOWERS.items():
        words = (tower, "--threads", arguments.threads)
        (together,) = ask(ENGINE, *words, "--repeats", arguments.repeats)
        alone = {name: ask(ENGINE, *words, "--only", name)[0] for name in NAMES}
        rows += lines(title, together, alone)
        print("\n".join(rows[-len(NAMES) :]), flush=True)
    write_report(report_path("vision_forward"), report(rows, arguments, load=load))
    return 0


def lines(tower: str, together: dict[str, Any], alone: dict[str, dict[str, Any]]) -> list[str]:
    """One line of the table for each implementation."""
    seconds, errors = together["seconds"], together["error"]
    return [
        table_row(
            *(tower, title, f"{seconds[name]:.2f}", f"{seconds[name] / seconds['megavl']:.2f}"),
            f"{alone[name]['peak_mib'] - alone[name]['rest_mib']:,.0f}",
            f"{errors[name]:.1e}" if name in errors else "-",
        )
        for name, title in NAMES.items()
    ]


def report(rows: list[str], arguments: argparse.Namespace, *, load: float) -> list[str]:
    """Markdown with the command and versions."""
    return [
        "# Vision towers against transformers",
        "",
        f"`python -m launch.bench.vision --repeats {arguments.repeats} --threads {arguments.threads}`; "
        f"{versions('torch', 'transformers')}; {machine()}, load average {load:.1f} at the start.",
        "Forward of one image, fp32, random weights of the "
        "released sizes; the best of alternating rounds. The ratio is the time against MegaVL's: above 1, MegaVL "
        "is faster. Memory is what a process with one implementation reached beyond its weights. The error is the "
        "largest difference from MegaVL's output, relative.",
        *table("| tower | implementation | seconds | time against MegaVL | memory MiB | error |", rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
