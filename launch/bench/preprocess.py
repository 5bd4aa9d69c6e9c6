"""Preprocessing against its primitives on the same machine: text, images, packing, two workers, memory.

Calls `launch/bench/engines/measure_preprocess.py` for each measurement, and writes
`launch/bench/results/preprocess_<processor>_<YYYYMM>.md` and the numbers beside it as `.json`.

    python launch/bench/preprocess.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ("text", "images", "packing", "memory", "workers")


def main() -> int:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in MEASUREMENTS:
            print(f"{name} ...", flush=True)
            before = os.getloadavg()[0]
            found[name] = measure(name, scratch=scratch, repeats=arguments.repeats)
            found[name]["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    content = report(found, repeats=arguments.repeats)
    path = report_path()
    path.write_text(content, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{content}\n{path}")
    return 0


def measure(name: str, *, scratch: str, repeats: int) -> Any:
    """What one measurement prints."""
    command = [sys.executable, "launch/bench/engines/measure_preprocess.py", name, "--scratch", scratch]
    command += ["--repeats", str(repeats)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def report_path() -> Path:
    """Named by theme, hardware and month."""
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    return ROOT / "launch/bench/results" / f"preprocess_{hardware}_{time.strftime('%Y%m')}.md"


def report(found: dict[str, Any], *, repeats: int) -> str:
    """Markdown with the command, versions, ratios and goals."""
    text, images, workers, memory = (found[name] for name in ("text", "images", "workers", "memory"))
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "pillow", "numpy"))
    loads = [f"{name} {' and '.join(map(str, found[name]['load']))}" for name in MEASUREMENTS]
    rows = [
        ("text: tokenise, pack, write", "bare `encode_batch`", text["ratio"], ">= 0.78", text["ratio"] >= 0.78),
        (
            "1024 x 768 JPEG, scaled verification",
            "bare draft decode",
            images["ratio"],
            ">= 0.75",
            images["ratio"] >= 0.75,
        ),
        ("two workers, wall time", "one worker", workers["ratio"], ">= 1.8", workers["ratio"] >= 1.8),
        ("memory, ten times the input", "the input once", memory["ratio"], "<= 1.2", memory["ratio"] <= 1.2),
    ]
    lines = [
        "# Preprocessing against its primitives",
        "",
        f"`python launch/bench/preprocess.py --repeats {repeats}`; Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} cores ({platform.machine()}), shared with other programs: load before and after "
        f"{', '.join(loads)}.",
        "Both sides of a ratio run in turn; the best of the repeats counts, in CPU time where one core does the work.",
        "",
        "| what | primitive | ratio | goal | |",
        "|---|---|---|---|---|",
        *(
            f"| {what} | {bare} | {ratio:.2f} | {goal} | {'met' if met else '**missed**'} |"
            for what, bare, ratio, goal, met in rows
        ),
        "",
        f"- Text: {text['tokens_per_s']:,.0f} tokens/s of {text['bare_tokens_per_s']:,.0f} ({text['documents']:,} "
        f"documents, {text['tokens']:,} tokens, byte-level BPE of 32,000 entries with DeepSeek-like splits).",
        f"- Images: {images['images_per_s']:,.0f}/s of {images['bare_images_per_s']:,.0f}, and with `--verify header` "
        f"{images['header_images_per_s']:,.0f}/s ({images['images']} files of {images['mean_bytes'] / 1000:.0f} KB).",
        f"- Workers: {workers['seconds_1']:.1f} s with one, {workers['seconds_2']:.1f} s with two, start-up included; "
        f"all times {', '.join(f'{one:.1f}/{two:.1f}' for one, two in zip(*workers['all']))}. CPU time, which other "
        f"programs change less: {workers['cpu_1']:.1f} s and {workers['cpu_2']:.1f} s, so two free cores would give "
        f"{2 * workers['cpu_1'] / workers['cpu_2']:.2f} at most. Two bare tokenizing processes, which share "
        f"nothing, are {workers['bare_ratio']:.2f} times as fast as one on this machine.",
        f"- Memory: {memory['mib_1']:.0f} MiB, then {memory['mib_10']:.0f} MiB on "
        f"{memory['input_bytes'] / 1e6:.0f} MB.",
        "",
        "| packing at 4096 tokens and 5 images | samples/s (goal 300,000) | fill (goal 99.9%) | images per sequence |",
        "|---|---|---|---|",
    ]
    for case in found["packing"]["cases"]:
        held = f"{case['images_per_sequence']:.2f} +- {case['images_deviation']:.2f}" if case["captions"] else "-"
        lines.append(
            f"| {case['captions']:,} captions, {case['texts']:,} texts | {case['samples_per_s']:,.0f} | "
            f"{100 * case['fill']:.3f}% | {held} |"
        )
    lines += ["", "Captions alone cannot fill their sequences: five of them leave a gap that only text fits into."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
