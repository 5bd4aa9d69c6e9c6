"""Preprocessing against its primitives on the same machine: text, images, packing, two workers, memory.

Runs `engines/measure_preprocess.py` for each measurement, and writes
`launch/bench/results/preprocess_<processor>_<YYYYMM>.md` and the numbers beside it as `.json`.

    python -m launch.bench.preprocess [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any

from launch.bench.programs import ask
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

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
            options = ("--scratch", scratch, "--repeats", arguments.repeats)
            (found[name],) = ask("launch.bench.engines.measure_preprocess", name, *options)
            found[name]["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    path = report_path("preprocess")
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_report(path, report(found, repeats=arguments.repeats))
    return 0


def report(found: dict[str, Any], *, repeats: int) -> list[str]:
    """Markdown with the command, versions, ratios and goals."""
    text, images, workers, memory = (found[name] for name in ("text", "images", "workers", "memory"))
    loads = [f"{name} {' and '.join(map(str, found[name]['load']))}" for name in MEASUREMENTS]
    draft = "1024 x 768 JPEG, scaled verification"
    ratios = [
        ("text: tokenise, pack, write", "bare `encode_batch`", text["ratio"], ">= 0.78", text["ratio"] >= 0.78),
        (draft, "bare draft decode", images["ratio"], ">= 0.75", images["ratio"] >= 0.75),
        ("two workers, wall time", "one worker", workers["ratio"], ">= 1.8", workers["ratio"] >= 1.8),
        ("memory, ten times the input", "the input once", memory["ratio"], "<= 1.2", memory["ratio"] <= 1.2),
    ]
    return [
        "# Preprocessing against its primitives",
        "",
        f"`python -m launch.bench.preprocess --repeats {repeats}`; {versions('tokenizers', 'pillow', 'numpy')}; "
        f"{machine()}, shared with other programs: load before and after {', '.join(loads)}.",
        "Both sides of a ratio run in turn; the best of the repeats counts, in CPU time where one core does the work.",
        *table(
            "| what | primitive | ratio | goal | |",
            (
                table_row(what, bare, f"{ratio:.2f}", goal, "met" if met else "**missed**")
                for what, bare, ratio, goal, met in ratios
            ),
        ),
        "",
        f"- Text: {text['tokens_per_s']:,.0f} tokens/s of {text['bare_tokens_per_s']:,.0f} ({text['documents']:,} "
        f"documents, {text['tokens']:,} tokens, byte-level BPE of 32,000 entries with DeepSeek-like splits).",
        f"- Images: {images['images_per_s']:,.0f}/s of {images['bare_images_per_s']:,.0f}, and with `--verify header` "
        f"{images['header_images_per_s']:,.0f}/s ({images['images']} files of {images['mean_bytes'] / 1000:.0f} KB).",
        f"- Workers: {workers['seconds_1']:.1f} s with one, {workers['seconds_2']:.1f} s with two, start-up included; "
        f"all times {', '.join(f'{one:.1f}/{two:.1f}' for one, two in zip(*workers['all']))}. Other programs change "
        f"CPU time less: {workers['cpu_1']:.1f} s and {workers['cpu_2']:.1f} s, so two free cores would give at most "
        f"{2 * workers['cpu_1'] / workers['cpu_2']:.2f}. Two bare tokenizing processes, which share nothing, are "
        f"{workers['bare_ratio']:.2f} times as fast as one on this machine.",
        f"- Memory: {memory['mib_1']:.0f} MiB, then {memory['mib_10']:.0f} MiB on "
        f"{memory['input_bytes'] / 1e6:.0f} MB.",
        *table(
            "| packing at 4096 tokens and 5 images | samples/s (goal 300,000) | fill (goal 99.9%) "
            "| images per sequence |",
            map(packing_line, found["packing"]["cases"]),
        ),
        "",
        "Captions alone cannot fill their sequences: five of them leave a gap that only text fits into.",
    ]


def packing_line(case: dict[str, Any]) -> str:
    """One line of the table on packing."""
    held = f"{case['images_per_sequence']:.2f} +- {case['images_deviation']:.2f}" if case["captions"] else "-"
    what = f"{case['captions']:,} captions, {case['texts']:,} texts"
    return table_row(what, f"{case['samples_per_s']:,.0f}", f"{100 * case['fill']:.3f}%", held)


if __name__ == "__main__":
    sys.exit(main())
