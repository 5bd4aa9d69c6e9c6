"""Seconds and memory of the full-size vision towers, against transformers' modules in the same run.

Times SAM-B and SigLIP-L on the same images and weights, round by round in one process, then each implementation alone
for its peak memory. Writes `launch/bench/results/vision_<forward|train>_<processor>_<YYYYMM>.md`. Needs the extras
`test` and `hf`.

    python launch/bench/vision.py [--repeats 5] [--threads 2] [--train]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"megavl": "MegaVL", "eager": "transformers, eager", "sdpa": "transformers, SDPA"}
TOWERS = {"sam": "SAM-B at 1024", "siglip": "SigLIP-L at 384"}


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train", action="store_true", help="forward and backward, not forward alone")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    load, rows = os.getloadavg()[0], []
    mode = "train" if arguments.train else "forward"
    for tower in TOWERS:
        words = (tower, "--threads", arguments.threads, *(("--train",) if arguments.train else ()))
        together = measure(*words, "--repeats", arguments.repeats)
        alone = {name: measure(*words, "--only", name) for name in NAMES}
        rows += lines(TOWERS[tower], together, alone)
        print("\n".join(rows[-len(NAMES) :]), flush=True)
    path = ROOT / "launch/bench/results" / f"vision_{mode}_{hardware()}_{time.strftime('%Y%m')}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(report(rows, arguments, load=load), encoding="utf-8")
    print(path)
    return 0


def measure(*words: object) -> dict[str, Any]:
    """What launch/bench/engines/vision_speed.py printed, run as a process of its own."""
    command = [sys.executable, "-m", "launch.bench.engines.vision_speed", *map(str, words)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[1:])} ended with {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def lines(what: str, together: dict[str, Any], alone: dict[str, dict[str, Any]]) -> list[str]:
    """One line of the table for each implementation."""
    return [
        f"| {what} | {title} | {together['seconds'][name]:.2f} | "
        f"{together['seconds'][name] / together['seconds']['megavl']:.2f} | "
        f"{alone[name]['peak_mib'] - alone[name]['rest_mib']:,.0f} | "
        + (f"{together['error'][name]:.1e} |" if name in together["error"] else "- |")
        for name, title in NAMES.items()
    ]


def hardware() -> str:
    """Architecture and cores."""
    return f"{platform.machine()}-{os.cpu_count()}cores"


def report(rows: list[str], arguments: argparse.Namespace, *, load: float) -> str:
    """Markdown with the command and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return "\n".join(
        [
            "# Vision towers against transformers",
            "",
            f"`python launch/bench/vision.py --repeats {arguments.repeats} --threads {arguments.threads}"
            f"{' --train' * arguments.train}`; "
            f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores ({platform.machine()}), "
            f"load average {load:.1f} at the start.",
            f"{'Forward and backward' if arguments.train else 'Forward'} of one image, fp32, random weights of the "
            "released sizes; the best of alternating rounds. The ratio is the time against MegaVL's: above 1, MegaVL "
            "is faster. Memory is what a process with one implementation reached beyond its weights; the error is the "
            "largest difference from MegaVL's output, relative.",
            "",
            "| tower | implementation | seconds | time against MegaVL | memory MiB | error |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
