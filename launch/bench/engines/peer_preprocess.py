"""Whole preprocessing commands beside those of other projects; `launch/bench/preprocess_peers.py` writes the report.

    python -m launch.bench.engines.peer_preprocess {text,gain,images} --scratch DIR [--megatron DIR] [--repeats N]

Prints one JSON object. The programs run in turn, each in processes of its own, start-up included; the best wall time
counts. `text` needs a checkout of Megatron-LM, and the packages that its arguments import; `images` needs webdataset.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from launch.bench.engines.measure_preprocess import (
    bare_processes,
    command_line,
    documents,
    documents_and_sources,
    photos,
)
from launch.bench.programs import ROOT

WORKERS = (1, 2)
DOCUMENTS = 4200
"""15 MB of text."""
GAIN_DOCUMENTS = 22_000
"""80 MB of text: on 15 MB, the start of a command takes a seventh of its time, and no number of workers divides it."""
WEBDATASET = """
import io, json, sys
import webdataset
from PIL import Image
with webdataset.ShardWriter(sys.argv[2] + "/%05d.tar", verbose=0) as writer:
    for number, line in enumerate(open(sys.argv[1], encoding="utf-8")):
        record = json.loads(line)
        data = open(sys.argv[3] + "/" + record["image"], "rb").read()
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (image.width // 8, image.height // 8))
        image.load()
        writer.write({"__key__": f"{number:08d}", "jpg": data, "txt": record["text"]})
"""
"""What people write: each image checked by a scaled decode, as ours, and stored with its caption."""


def text(scratch: Path, *, repeats: int, megatron: Path) -> dict[str, Any]:
    """Text to `.bin` and `.idx`: Megatron-LM's `tools/preprocess_data.py`, and ours with samples, packs and hashes."""
    documents(scratch, copies=1, count=DOCUMENTS)
    peer = [
        *(sys.executable, "-W", "ignore", "tools/preprocess_data.py", "--input", str(scratch / "text.jsonl")),
        *("--output-prefix", str(scratch / "megatron"), "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(scratch / "tokenizer")),
    ]
    found: dict[str, Any] = {
        "documents": DOCUMENTS,
        "input_bytes": (scratch / "text.jsonl").stat().st_size,
        "source_bytes": (scratch / "source/text.jsonl").stat().st_size,
        "megatron": _version(megatron),
    }
    runs: dict[tuple[int, str], list[dict[str, float]]] = {}
    bare: dict[int, list[float]] = {count: [] for count in WORKERS}
    for _ in range(repeats):
        for count in WORKERS:
            ours = command_line(scratch, "text.jsonl", workers=count)
            runs.setdefault((count, "ours"), []).append(_timed(ours, folder=ROOT))
            runs.setdefault((count, "peer"), []).append(_timed([*peer, "--workers", str(count)], folder=megatron))
            bare[count].append(bare_processes(scratch, count=count, total=DOCUMENTS))
    for count in WORKERS:
        found[str(count)] = {name: _best(runs[count, name]) for name in ("ours", "peer")}
    return {**found, "bare": {str(count): min(seconds) for count, seconds in bare.items()}}


def gain(scratch: Path, *, repeats: int, megatron: Path) -> dict[str, Any]:
    """Two workers beside one, and two processes that only tokenize beside one.

    What reports before version 0.3 called bare is measured once more: processes that hold all their text.
    """
    folder = documents_and_sources(scratch, count=GAIN_DOCUMENTS)
    seconds: dict[str, list[float]] = {f"{name}_{count}": [] for name in ("ours", "bare") for count in WORKERS}
    seconds |= {f"held_{count}": [] for count in WORKERS}
    for number in range(repeats):
        for count in WORKERS:
            ours = command_line(folder, "text.jsonl", workers=count)
            seconds[f"ours_{count}"].append(_timed(ours, folder=ROOT)["seconds"])
            seconds[f"bare_{count}"].append(bare_processes(folder, count=count, total=GAIN_DOCUMENTS))
            if number == 0:
                seconds[f"held_{count}"].append(bare_processes(folder, count=count, total=GAIN_DOCUMENTS, held=True))
    return {
        "documents": GAIN_DOCUMENTS,
        "input_bytes": (folder / "text.jsonl").stat().st_size,
        **{name: min(values) for name, values in seconds.items()},
        "all": {name: [round(value, 1) for value in values] for name, values in seconds.items()},
    }


def images(scratch: Path, *, repeats: int, megatron: Path) -> dict[str, Any]:
    """Images with captions to shards: webdataset's ShardWriter with Pillow, and ours with verification and hashes."""
    documents(scratch, copies=1)
    photos(scratch)
    folder = scratch / "tars"
    folder.mkdir(exist_ok=True)
    peer = [sys.executable, "-c", WEBDATASET, str(scratch / "captions.jsonl"), str(folder), str(scratch)]
    sides: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        sides["ours"].append(_timed(command_line(scratch, "captions.jsonl", workers=1), folder=ROOT))
        sides["peer"].append(_timed(peer, folder=ROOT))
    return {name: _best(runs) for name, runs in sides.items()}


def _timed(command: Sequence[str], *, folder: Path) -> dict[str, float]:
    """Wall and CPU seconds of a command, and the most memory (MiB) that its processes held together."""
    environment: Mapping[str, str] = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    started, before, peak = time.perf_counter(), os.times(), 0
    # A pipe that nobody reads would fill up and stop the program.
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT) as run,
    ):
        tree = psutil.Process(run.pid)
        while run.poll() is None:
            try:
                held = sum(one.memory_info().rss for one in (tree, *tree.children(recursive=True)))
            except psutil.NoSuchProcess:
                held = 0
            peak = max(peak, held)
            time.sleep(0.05)
        seconds, after = time.perf_counter() - started, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        printed.seek(0)
        if run.returncode:
            said = printed.read().decode(errors="replace")[-3000:]
            raise SystemExit(f"error: {' '.join(command[:4])} ended with {run.returncode}\n{said}")
    return {"seconds": seconds, "cpu": cpu, "mib": peak / 2**20}


def _best(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {
        "seconds": min(run["seconds"] for run in runs),
        "cpu": min(run["cpu"] for run in runs),
        "mib": max(run["mib"] for run in runs),
        "all": [round(run["seconds"], 2) for run in runs],
    }


def _version(megatron: Path) -> str:
    content = (megatron / "megatron/core/package_info.py").read_text(encoding="utf-8")
    numbers: dict[str, Any] = {}
    for line in content.splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name in ("MAJOR", "MINOR", "PATCH"):
            numbers[name] = value.split("#")[0].strip()
    return ".".join(numbers[name] for name in ("MAJOR", "MINOR", "PATCH"))


def main() -> int:
    """Run one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=("text", "gain", "images"))
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR", help="folder for inputs and outputs")
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="checkout of Megatron-LM")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    compare = {"text": text, "gain": gain, "images": images}[options.comparison]
    print(json.dumps(compare(options.scratch, repeats=options.repeats, megatron=options.megatron)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
