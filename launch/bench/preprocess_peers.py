"""Preprocessing beside Megatron-LM's program for text, and beside webdataset with Pillow for images.

Runs `engines/peer_preprocess.py`, and writes `launch/bench/results/preprocess_peers_<processor>_<YYYYMM>.md`.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
    pip install six einops triton webdataset        # what their programs import
    python -m launch.bench.preprocess_peers --megatron Megatron-LM [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.bench.programs import ask
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

GOALS = {"1": 1.8, "2": 2.1}
"""How many times as fast as Megatron-LM's program, by workers."""
GAIN = 0.95
"""What two workers gain over one, as a share of what two processes gain that only tokenize."""


def main() -> int:
    """Compare, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("text", "images"):
            print(f"{name} ...", flush=True)
            before = os.getloadavg()[0]
            options = ("--scratch", scratch, "--megatron", arguments.megatron.resolve(), "--repeats", arguments.repeats)
            (found[name],) = ask("launch.bench.engines.peer_preprocess", name, *options)
            found[name]["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
    write_report(report_path("preprocess_peers"), report(found, repeats=arguments.repeats))
    return 0


def report(found: dict[str, Any], *, repeats: int) -> list[str]:
    """Markdown with the commands, times, memory and goals."""
    text, images = found["text"], found["images"]
    rows = []
    for count, goal in GOALS.items():
        ours, peer = text[count]["ours"], text[count]["peer"]
        ratio = peer["seconds"] / ours["seconds"]
        met = "met" if ratio >= goal else "**missed**"
        rows.append(_row(f"text, {count} worker{'s' * (count != '1')}", ours, peer, f"{ratio:.2f}", f">= {goal} {met}"))
    gain = text["1"]["ours"]["seconds"] / text["2"]["ours"]["seconds"]
    bare = text["bare"]["1"] / text["bare"]["2"]
    ours, peer = images["ours"], images["peer"]
    rows.append(_row("images, 1 worker", ours, peer, f"{peer['seconds'] / ours['seconds']:.2f}", "none"))
    return [
        "# Preprocessing beside other projects",
        "",
        f"`python -m launch.bench.preprocess_peers --megatron Megatron-LM --repeats {repeats}`; "
        f"{versions('tokenizers', 'transformers', 'pillow', 'webdataset')}; {machine()}; load before and after text "
        f"{' and '.join(map(str, text['load']))}, images {' and '.join(map(str, images['load']))}.",
        "Whole commands in turn, start-up included; the best wall time counts. Memory is what all processes of a "
        "command hold together.",
        *table(
            "| what | ours | peer | times as fast | by CPU time | goal | memory, ours | memory, peer | all times |",
            rows,
        ),
        "",
        f"- Two workers are {gain:.2f} times as fast as one; two processes that only tokenize the same documents are "
        f"{bare:.2f} times as fast as one. The ratio is {gain / bare:.2f} (goal >= {GAIN} "
        f"{'met' if gain >= GAIN * bare else '**missed**'}).",
        f"- Text: {text['documents']:,} documents of {text['input_bytes'] / 1e6:.1f} MB, byte-level BPE of 32,000 "
        f"entries. The peer is `tools/preprocess_data.py` of Megatron-LM {text['megatron']} with `--append-eod`. Ours "
        "also records samples, loss spans and hashes, and packs.",
        "- Images: captions with JPEG files. The peer decodes each file at 1/8 of its size with Pillow, as ours does, "
        "and stores it with `webdataset.ShardWriter`. Ours also tokenizes, packs and hashes.",
    ]


def _row(what: str, ours: dict[str, Any], peer: dict[str, Any], ratio: str, goal: str) -> str:
    times = " ".join(f"{one:.1f}/{two:.1f}" for one, two in zip(ours["all"], peer["all"]))
    return table_row(
        what,
        f"{ours['seconds']:.1f} s",
        f"{peer['seconds']:.1f} s",
        ratio,
        f"{peer['cpu'] / ours['cpu']:.2f}",
        goal,
        f"{ours['mib']:.0f} MiB",
        f"{peer['mib']:.0f} MiB",
        times,
    )


if __name__ == "__main__":
    sys.exit(main())
