"""Preprocessing beside Megatron-LM's program for text, beside webdataset with Pillow for images, and beside primitives.

Runs `engines/peer_preprocess.py` and two measurements of `engines/measure_preprocess.py`, and writes
`launch/bench/results/preprocess_peers_<processor>_<YYYYMM>.md`.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM
    pip install six einops triton webdataset        # what their programs import
    python -m launch.bench.preprocess_peers --megatron Megatron-LM [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.bench.engines.measure_preprocess import BARE_BATCH
from launch.bench.programs import ask
from launch.bench.report import machine, report_path, table, table_row, versions, write_report

GOALS = {"1": 1.8, "2": 2.1}
"""How many times as fast as Megatron-LM's program, by workers."""
GAIN = 0.95
"""What two workers gain over one, as a share of what two processes gain that only tokenize."""
PRIMITIVES = {"text": ("bare `encode_batch`", 0.78), "images": ("bare draft decode", 0.75)}
"""What preprocessing in one process is compared with, and its least share of that speed."""


def main() -> int:
    """Compare, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, metavar="DIR", help="checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        options: tuple[object, ...] = ("--scratch", scratch, "--repeats", arguments.repeats)
        for name in ("text", "gain", "images"):
            print(f"{name} ...", flush=True)
            before = os.getloadavg()[0]
            peer = ("--megatron", arguments.megatron.resolve())
            (found[name],) = ask("launch.bench.engines.peer_preprocess", name, *options, *peer)
            found[name]["load"] = [round(before, 1), round(os.getloadavg()[0], 1)]
        # Seconds long, so that more repeats cost little.
        options = ("--scratch", scratch, "--repeats", max(5, arguments.repeats))
        for name in PRIMITIVES:
            print(f"{name} beside its primitive ...", flush=True)
            (found[name]["primitive"],) = ask("launch.bench.engines.measure_preprocess", name, *options)
    write_report(report_path("preprocess_peers"), report(found, repeats=arguments.repeats))
    return 0


def report(found: dict[str, Any], *, repeats: int) -> list[str]:
    """Markdown with the commands, times, memory and goals."""
    text, gain, images = found["text"], found["gain"], found["images"]
    rows = []
    for count, goal in GOALS.items():
        ours, peer = text[count]["ours"], text[count]["peer"]
        ratio = peer["seconds"] / ours["seconds"]
        what = f"text, {count} worker{'s' * (count != '1')}"
        rows.append(_row(what, ours, peer, f"{ratio:.2f}", f">= {goal} {_met(ratio >= goal)}"))
    ours, peer = images["ours"], images["peer"]
    rows.append(_row("images, 1 worker", ours, peer, f"{peer['seconds'] / ours['seconds']:.2f}", "none"))
    small = {f"ours_{count}": text[count]["ours"]["seconds"] for count in ("1", "2")}
    small |= {f"bare_{count}": text["bare"][count] for count in ("1", "2")}
    large_ours, large_bare = _gains(gain)
    return [
        "# Preprocessing beside other projects",
        "",
        f"`python -m launch.bench.preprocess_peers --megatron Megatron-LM --repeats {repeats}`; "
        f"{versions('tokenizers', 'transformers', 'pillow', 'webdataset')}; {machine()}; load before and after "
        f"{', '.join(f'{name} {before} and {after}' for name in found for before, after in [found[name]['load']])}.",
        "Whole commands in turn, start-up included; the best wall time counts. Memory is what all processes of a "
        "command hold together.",
        *table(
            "| what | ours | peer | times as fast | by CPU time | goal | memory, ours | memory, peer | all times |",
            rows,
        ),
        "",
        f"- Text: {text['documents']:,} documents of {text['input_bytes'] / 1e6:.1f} MB, byte-level BPE of 32,000 "
        f"entries. They are the machine's {text['source_bytes'] / 1e6:.1f} MB of documentation, which starts over at "
        f"its end. The peer is `tools/preprocess_data.py` of Megatron-LM {text['megatron']} with `--append-eod`. Ours "
        "also records samples, loss spans and hashes, and packs.",
        "- Images: captions with JPEG files. The peer decodes each file at 1/8 of its size with Pillow, as ours does, "
        "and stores it with `webdataset.ShardWriter`. Ours also tokenizes, packs and hashes.",
        "",
        "What two workers gain over one, and what two processes gain that only tokenize, each its half of the text. "
        f"A bare process tokenizes {BARE_BATCH:,} documents at a time and drops their ids before the next, as any "
        "program does that writes shards:",
        *table(
            "| text | workers: one, two | gain | bare: one, two | gain | ratio of gains |",
            [
                _gain_row(gain),
                _gain_row(small | {"input_bytes": text["input_bytes"]}),
                _gain_row(gain | {f"bare_{count}": gain[f"held_{count}"] for count in (1, 2)}, note=", text held"),
            ],
        ),
        "",
        f"- Goal, on the larger text: >= {GAIN} {_met(large_ours >= GAIN * large_bare)}. It has "
        f"{gain['documents']:,} documents, the same documentation between Python sources of installed packages, of "
        f"which no part occurs twice. All times: {json.dumps(gain['all'])}.",
        "- In the last row, each bare process holds all its text, as in earlier reports; it is measured once.",
        "- On the smaller text, the start of a command weighs more: it is not divided among workers. It weighs most in "
        "ours, because the bare process takes longer to tokenize: it does not remember words.",
        *table(
            "| in one process, by CPU time without the start | primitive | share of its speed | goal |",
            [_primitive_row(name, found[name]["primitive"]["ratio"]) for name in PRIMITIVES],
        ),
    ]


def _gains(seconds: dict[str, Any]) -> tuple[float, float]:
    """How many times as fast two are as one: workers, and bare processes."""
    return seconds["ours_1"] / seconds["ours_2"], seconds["bare_1"] / seconds["bare_2"]


def _gain_row(seconds: dict[str, Any], *, note: str = "") -> str:
    ours, bare = _gains(seconds)
    return table_row(
        f"{seconds['input_bytes'] / 1e6:.1f} MB{note}",
        f"{seconds['ours_1']:.1f} s, {seconds['ours_2']:.1f} s",
        f"{ours:.2f}",
        f"{seconds['bare_1']:.1f} s, {seconds['bare_2']:.1f} s",
        f"{bare:.2f}",
        f"{ours / bare:.2f}",
    )


def _primitive_row(name: str, ratio: float) -> str:
    bare, goal = PRIMITIVES[name]
    return table_row(name, bare, f"{ratio:.2f}", f">= {goal} {_met(ratio >= goal)}")


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


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
