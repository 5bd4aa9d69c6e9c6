"""Seconds and memory of `megavl convert` at full size, against a plain copy of the same bytes in the same run.

Writes a random model of full size in bf16 as a Hugging Face folder, converts it to a MegaVL checkpoint and back to both
formats, and compares every tensor byte for byte, for the native and then for the original format. Writes
`launch/bench/results/convert_<preset>_<processor>_<YYYYMM>.md`.

    python launch/bench/convert_full.py [--preset 7b] [--scratch DIR]

Needs twice the model's size on the scratch disk (31 GB for 7b), never more; with less, the 1b model is taken, and the
report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
TABLES = ROOT / "tests/unit/convert/released_tensors"
SHARD_BYTES = 5_000_000_000
BLOCK = 16 << 20
TOKENS = {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001, "<image_placeholder>": 100015}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report."""

    what: str
    seconds: float
    cpu_seconds: float
    """Of the process, user and system."""
    gigabytes: float
    peak_mib: float
    """Peak resident memory of the process, pages of mapped files included."""
    disk: float
    """Peak of what source and target took on the disk, as a fraction of the two at the end."""


def main() -> int:
    """Measure both legs, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("1b", "7b"), default="7b")
    parser.add_argument(
        "--scratch", type=Path, default=Path("runs"), help="folder on the disk to measure; default: runs"
    )
    parser.add_argument("--note", default="", help="a sentence for the report, such as what else ran on the machine")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    preset, remarks = arguments.preset, [arguments.note] if arguments.note else []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        free = shutil.disk_usage(scratch).free
        if preset == "7b" and free < 2.1 * size_of(shapes_of(preset, "native")):
            preset = "1b"
            remarks.append(f"The scratch disk had {free / 1e9:.0f} GB free, too little for 7b.")
        rows = [row for fmt in ("native", "original") for row in leg(scratch, preset, fmt)]
    path = report_path(preset)
    path.parent.mkdir(exist_ok=True)
    path.write_text(report(rows, preset=preset, remarks=remarks), encoding="utf-8")
    print(path)
    return 0


def leg(scratch: Path, preset: str, fmt: str) -> Iterator[Row]:
    """Folder of one format to a checkpoint, to the other format, and back to the first, compared with the start."""
    other = "original" if fmt == "native" else "native"
    source, megavl, out = scratch / "source", scratch / "megavl", scratch / "out"
    config, shapes = load_model_config(preset), shapes_of(preset, fmt)
    digests = make_folder(source, shapes, config=config, fmt=fmt)
    yield show(copy(source, scratch / "copy", what=f"copy of the {fmt} folder"))
    yield show(convert("from-hf", source, megavl, what=f"{fmt} to MegaVL"))
    shutil.rmtree(source)
    for target in (other, fmt):
        row = convert("to-hf", megavl, out, "--format", target, what=f"MegaVL to {target}")
        yield show(row)
        if target == fmt:
            compare(digests, out)
        shutil.rmtree(out)
    shutil.rmtree(megavl)


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
    """Run Python in a process of its own and look at what it used."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    gigabytes, disk = folder_size(source) / 1e9, 0
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
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
    return Row(
        what=what,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        gigabytes=gigabytes,
        peak_mib=usage.ru_maxrss / 1024,
        disk=disk / (folder_size(source) + folder_size(target)),
    )


def make_folder(folder: Path, shapes: Shapes, *, config: ModelConfig, fmt: str) -> dict[str, str]:
    """Write random bf16 weights and what else the converter reads; returns the sha256 of every tensor."""
    folder.mkdir()
    digests: dict[str, str] = {}
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and size_of(shards[-1]) + size_of({name: shape}) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, digests)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(configuration(config, fmt)))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": number, "content": token, **plain, "special": True} for token, number in TOKENS.items()]
    vocabulary = {f"t{number}": number for number in range(min(TOKENS.values()))}
    vocabulary |= {f"s{number}": number for number in range(100002, 100015)}
    model = {"type": "BPE", "vocab": {**vocabulary, **TOKENS}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    bos, eos, _ = TOKENS
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos}))
    return digests


def write_shard(path: Path, shapes: Shapes, digests: dict[str, str]) -> None:
    """One safetensors file (eight bytes of header length, JSON header, data) of random finite numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            digest = hashlib.sha256()
            for block in random_bf16(name, 2 * math.prod(shape)):
                handle.write(block)
                digest.update(block)
            digests[name] = digest.hexdigest()
        handle.flush()
        os.fsync(handle.fileno())


def random_bf16(name: str, size: int) -> Iterator[memoryview]:
    """Bytes of bf16 numbers below 2 in magnitude, another sequence for every name."""
    generator = np.random.Generator(np.random.SFC64(list(name.encode())))
    while size:
        count = min(size, BLOCK)
        words = generator.integers(0, 1 << 64, -(-count // 8), dtype=np.uint64)
        # Without the highest bit of the exponent a number is finite.
        words &= np.uint64(0xBFFF_BFFF_BFFF_BFFF)
        yield memoryview(words).cast("B")[:count]
        size -= count


def compare(digests: dict[str, str], folder: Path) -> None:
    """Every tensor of a folder against the digests."""
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                handle.seek(8 + length + first)
                digest = hashlib.sha256()
                while first < last:
                    block = handle.read(min(BLOCK, last - first))
                    digest.update(block)
                    first += len(block)
                found[name] = digest.hexdigest()
    different = [name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name)]
    if different:
        raise SystemExit(f"error: {len(different)} tensors came back differently, {different[0]} among them")
    print(f"{len(found)} tensors came back byte for byte", flush=True)


def configuration(config: ModelConfig, fmt: str) -> dict[str, object]:
    """`config.json` with the fields that state sizes."""
    llm, siglip, sam = config.llm, config.siglip, config.sam
    text = {
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "vocab_size": llm.vocab_size,
        "max_position_embeddings": llm.max_position_embeddings,
    }
    if fmt == "original":
        low = {"model_name": "siglip_large_patch16_384", "image_size": siglip.image_size, "select_layer": -1}
        high = {"model_name": "sam_b_downsample", "image_size": 1024, "select_layer": -1}
        both = {"concat_type": "tuple", "low_res_cfg": low, "high_res_cfg": high}
        aligner = {
            "projector_type": config.adaptor.kind,
            "depth": config.adaptor.depth,
            "input_dim": siglip.width,
            "n_embed": llm.hidden_size,
        }
        return {
            "model_type": "multi_modality",
            "language_config": text,
            "aligner_config": {"cls": "MlpProjector", "params": aligner},
            "vision_config": {
                "cls": "HybridVisionTower" if sam else "CLIPVisionTower",
                "params": both if sam else low,
            },
        }
    vision = {
        "hidden_size": siglip.width,
        "intermediate_size": siglip.mlp_dim,
        "num_hidden_layers": siglip.depth,
        "num_attention_heads": siglip.heads,
        "image_size": siglip.image_size,
        "patch_size": siglip.patch_size,
        "hidden_act": "gelu",
    }
    return {
        "model_type": "deepseek_vl_hybrid" if sam else "deepseek_vl",
        "image_token_id": config.image_token_id,
        "text_config": text,
        "vision_config": vision,
    }


def shapes_of(preset: str, fmt: str) -> Shapes:
    """Names and shapes of a format, from the tables of the released models."""
    shapes: Shapes = {}
    for line in (TABLES / f"{preset}.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("["):
            continue
        shape, original, native, *other = line.split()
        name, size = (original, shape) if fmt == "original" else (native, other[0] if other else shape)
        if name != "-":
            shapes |= dict.fromkeys(expand(name), tuple(json.loads(size)))
    return shapes


def expand(pattern: str) -> list[str]:
    """Names of a pattern: {0..3} counts, {q,k,v} lists."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if not match:
        return [pattern]
    first, dots, last = match[1].partition("..")
    values = map(str, range(int(first), int(last) + 1)) if dots else match[1].split(",")
    return [name for value in values for name in expand(pattern.replace(match[0], value, 1))]


def size_of(shapes: Shapes) -> int:
    """Bytes in bf16."""
    return 2 * sum(map(math.prod, shapes.values()))


def folder_size(folder: Path) -> int:
    """Bytes of all files, while others come and go."""
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size if path.is_file() else 0
    return size


def show(row: Row) -> Row:
    """Print a line as soon as it is known."""
    print(
        f"{row.what}: {row.seconds:.1f} s, {row.gigabytes / row.seconds:.2f} GB/s, {row.cpu_seconds:.1f} CPU s, "
        f"peak {row.peak_mib:,.0f} MiB, disk {row.disk:.2f} of source and target",
        flush=True,
    )
    return row


def report_path(preset: str) -> Path:
    """Named by theme, hardware and month."""
    hardware = f"{platform.machine()}-{os.cpu_count()}cores"
    return ROOT / "launch/bench/results" / f"convert_{preset}_{hardware}_{time.strftime('%Y%m')}.md"


def report(rows: list[Row], *, preset: str, remarks: list[str]) -> str:
    """Markdown with the command and versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "numpy"))
    lines = [
        f"# Conversion of the {preset} model at full size",
        "",
        f"`python launch/bench/convert_full.py --preset {preset}`; Python {platform.python_version()}, {versions}; "
        f"{os.cpu_count()} cores ({platform.machine()}).",
        "Random bf16 weights. Times hold the start of the process, reading, writing, hashing and fsync; a copy is "
        "written with fsync too. Peak memory is resident memory, pages of mapped files included; disk is the peak of "
        "all that lay on it, as a fraction of source and target.",
        "Every tensor came back byte for byte in both legs, the unused ones of the original format included.",
        *remarks,
        "",
        "| | GB | seconds | GB/s | time against the copy | CPU seconds | peak MiB | disk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = 1.0
    for row in rows:
        pace = row.seconds / row.gigabytes
        base = pace if row.what.startswith("copy") else base
        lines.append(
            f"| {row.what} | {row.gigabytes:.2f} | {row.seconds:.1f} | {1 / pace:.2f} | {pace / base:.2f} | "
            f"{row.cpu_seconds:.1f} | {row.peak_mib:,.0f} | {row.disk:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
