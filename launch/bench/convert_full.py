"""Seconds and memory of `megavl convert` at full size, against a plain copy of the same bytes in the same run.

Makes a random model of full size in bf16 as a Hugging Face folder of the native format. Converts it to a MegaVL
checkpoint and back to both formats, and compares every tensor byte for byte. Then does the same with the original
format. Writes `launch/bench/results/convert_<preset>_<processor>_<YYYYMM>.md`.

    python -m launch.bench.convert_full [--preset 7b] [--scratch DIR]

Needs twice the model's size on the scratch disk (31 GB for 7b), never more. Without `--preset` the 1b model is taken
where there is less, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from launch.bench.programs import ROOT, environment
from launch.bench.report import machine, report_path, table, table_row, versions, write_report
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.convert.hf_write import write_hf
from megavl.convert.table import Format, key_shapes, unused_parameters, weight_rows
from megavl.weights.canonical_names import Shape
from megavl.weights.lazy import LazyTensor

TOKENS = {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001, "<image_placeholder>": 100015}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    pace: float
    """Seconds per gigabyte."""
    cells: tuple[str, ...]
    """Gigabytes, seconds, CPU seconds, peak MiB, and the peak on the disk as a fraction of source and target."""


def random_tensor(name: str, shape: Shape) -> LazyTensor:
    """Finite bf16 numbers that depend on the name alone, each below 2 in magnitude."""

    def load() -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
        # Without the highest bit of the exponent a number is finite.
        return (bits & ~0x4000).view(torch.bfloat16)

    return LazyTensor(shape=shape, dtype=torch.bfloat16, load=load)


def main() -> int:
    """Measure both formats and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("1b", "7b"), help="default: 7b if it fits, else 1b")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs"), help="folder on the disk to measure; default: runs"
    )
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran on the machine")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    preset, remarks = arguments.preset or "7b", [arguments.note] if arguments.note else []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        free, needed = shutil.disk_usage(scratch).free, 2.1 * model_bytes(load_model_config(preset))
        if arguments.preset and free < needed:
            raise SystemExit(
                f"error: --preset: {preset} needs {needed / 1e9:.1f} GB free on the disk of {arguments.scratch}, which "
                f"has {free / 1e9:.1f} GB; name another folder with --scratch"
            )
        if free < needed:
            preset = "1b"
            remarks.append(f"The scratch disk had {free / 1e9:.0f} GB free, too little for 7b.")
        rows = [row for fmt in ("native", "original") for row in round_trip(scratch, preset, fmt)]
    write_report(report_path(f"convert_{preset}"), report(rows, preset=preset, remarks=remarks))
    return 0


def round_trip(scratch: Path, preset: str, fmt: Format) -> Iterator[Row]:
    """Convert a folder of one format to a checkpoint, to the other format and back; compare the tensors."""
    other = "original" if fmt == "native" else "native"
    source, megavl, out = scratch / "source", scratch / "megavl", scratch / "out"
    apart(make_folder, source, preset, fmt)
    before = apart(digests, source)
    yield copy(source, scratch / "copy", what=f"copy of the {fmt} folder")
    yield convert("from-hf", source, megavl, what=f"{fmt} to MegaVL")
    shutil.rmtree(source)
    for target in (other, fmt):
        yield convert("to-hf", megavl, out, "--format", target, what=f"MegaVL to {target}")
        if target == fmt and apart(digests, out) != before:
            raise SystemExit("error: tensors came back differently")
        shutil.rmtree(out)
    print(f"{len(before)} tensors came back byte for byte", flush=True)
    shutil.rmtree(megavl)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: what the system calls a child's peak includes the parent's memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make_folder(folder: Path, preset: str, fmt: Format) -> None:
    """Write random weights, and a tokenizer whose special tokens have the released ids."""
    config = load_model_config(preset)
    tokenizer = folder.with_name("tokenizer")
    tokenizer.mkdir(exist_ok=True)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": token, **plain, "special": True} for token, number in TOKENS.items()]
    vocabulary = {f"t{number}": number for number in range(max(TOKENS.values())) if number not in TOKENS.values()}
    model = {"type": "BPE", "vocab": {**vocabulary, **TOKENS}, "merges": []}
    (tokenizer / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    bos, eos, _ = TOKENS
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    tensors = {row.name: random_tensor(row.name, row.shape) for row in weight_rows(config, fmt)}
    unused = {row.key: random_tensor(row.key, row.shape) for row in unused_parameters(config)}
    write_hf(folder, config=config, tensors=tensors, fmt=fmt, tokenizer_dir=tokenizer, unused=unused)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a folder."""
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                found[name] = hashlib.sha256(file.get_tensor(name).view(torch.int16).numpy()).hexdigest()
    return found


def convert(action: str, source: Path, out: Path, *options: str, what: str) -> Row:
    """One run of `megavl convert`."""
    return measure(["-m", "megavl", "convert", action, str(source), str(out), *options], source, out, what=what)


def copy(source: Path, target: Path, *, what: str) -> Row:
    """Plain copy of a folder, on disk (fsync) at the end; the copy is removed."""
    code = (
        "import os, shutil, sys; shutil.copytree(*sys.argv[1:])\n"
        "for entry in os.scandir(sys.argv[2]): os.fsync(os.open(entry.path, os.O_RDONLY))"
    )
    row = measure(["-c", code, str(source), str(target)], source, target, what=what)
    shutil.rmtree(target)
    return row


def measure(words: list[str], source: Path, target: Path, *, what: str) -> Row:
    """Run Python in a process of its own; returns what it used."""
    gigabytes, disk = folder_size(source) / 1e9, 0
    start = time.perf_counter()
    variables = environment(gpu=True) | {"CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.Popen([sys.executable, *words], env=variables, stdout=subprocess.DEVNULL)
    while True:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        if pid:
            break
        disk = max(disk, folder_size(source.parent))
        time.sleep(0.2)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"error: {' '.join(words)} ended with {child.returncode}")
    cells = (f"{gigabytes:.2f}", f"{seconds:.1f}", f"{usage.ru_utime + usage.ru_stime:.1f}")
    cells += (f"{usage.ru_maxrss / 1024:,.0f}", f"{disk / (folder_size(source) + folder_size(target)):.2f}")
    print(what, *cells, flush=True)
    return Row(what, seconds / gigabytes, cells)


def model_bytes(config: ModelConfig) -> int:
    """Size of the weights in bf16."""
    return 2 * sum(map(math.prod, key_shapes(config, "native").values()))


def folder_size(folder: Path) -> int:
    """Bytes of all files, while others come and go."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def report(rows: list[Row], *, preset: str, remarks: list[str]) -> list[str]:
    """Markdown with the command and versions."""
    lines, copied = [], 1.0
    for what, pace, cells in rows:
        copied = pace if what.startswith("copy") else copied
        lines.append(table_row(what, f"{1 / pace:.2f}", f"{pace / copied:.2f}", *cells))
    return [
        f"# Conversion of the {preset} model at full size",
        "",
        f"`python -m launch.bench.convert_full --preset {preset}`; {versions('torch', 'safetensors', 'numpy')}; "
        f"{machine()}.",
        "Random bf16 weights. Times hold the start of the process, reading, writing, hashing and fsync; a copy is "
        "written with fsync too. Peak memory is resident memory, pages of mapped files included. Disk is the peak of "
        "all files, as a fraction of source and target.",
        "Every tensor came back byte for byte from both formats, the unused ones of the original format included.",
        *remarks,
        *table("| | GB/s | time against the copy | GB | seconds | CPU seconds | peak MiB | disk |", lines),
    ]


if __name__ == "__main__":
    sys.exit(main())
