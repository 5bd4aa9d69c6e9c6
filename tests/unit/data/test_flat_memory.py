"""The index of a dataset takes no memory: a hundred times the packs cost nothing, and finding one stays as quick."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megavl.config.presets import IMAGE_PRESETS
from megavl.config.version import VERSION
from megavl.data.index_file import index_bytes
from megavl.data.manifest import (
    PACK_ROW,
    SAMPLE_ROW,
    SPAN_ROW,
    DatasetManifest,
    FileEntry,
    PackSettings,
    ShardEntry,
    ShardManifest,
    SourceEntry,
    TokenizerEntry,
    fingerprint,
    geometry_entry,
    to_json,
)
from megavl.data.shard import file_sha256

ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = TokenizerEntry(sha256="0", vocab_size=400, bos_id=0, eos_id=1, pad_id=2, image_id=3)
GEOMETRY = geometry_entry(IMAGE_PRESETS["tiny-hybrid"])
LIMIT_MB = 6.0
"""A table held whole would take 29 MB per million packs, the index 20, samples 41."""

MEASURE = """
import json, random, sys, time
from megavl.config.presets import IMAGE_PRESETS
from megavl.config.data import ModalityWeights
from megavl.data.dataset import Dataset, Source
from megavl.data.table import ReadHandles

handles = ReadHandles()
began = time.process_time()
source = Source(sys.argv[1], handles=handles)
opened = time.process_time()
source.check(share=(0, 1))
checked = time.process_time()
weights = [ModalityWeights(text=1.0)]
dataset = Dataset([source], weights=weights, pad_id=2, geometry=IMAGE_PRESETS["tiny-hybrid"], handles=handles)
draw = random.Random(1)
numbers = [draw.randrange(source.counts["text"]) for _ in range(2000)]
for number in numbers:
    assert int(dataset.read(source=0, modality="text", index=number).tokens[0]) == number % 251 + 4
read = time.process_time()
# Not ru_maxrss, which a process inherits from the one that started it.
status = open("/proc/self/status").read()
mb = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps([mb, opened - began, checked - opened, (read - checked) / 2000]))
"""


def make_dataset(folder: Path, packs: int) -> Path:
    """A text dataset of one shard with `packs` samples of one token, each a sequence of its own."""
    folder.mkdir()
    name = "text-00000"
    numbers = np.arange(packs)
    tokens = (numbers % 251 + 4).astype("<i4")
    tokens.tofile(folder / f"{name}.tokens.bin")
    (folder / f"{name}.tokens.idx").write_bytes(index_bytes(np.ones(packs, np.int32), dtype="int32"))
    samples = np.zeros(packs, SAMPLE_ROW)
    samples["place"] = numbers + 1
    samples["crc32"] = _crc32_of_each(tokens)
    np.save(folder / f"{name}.samples.npy", samples)
    np.save(folder / f"{name}.spans.npy", np.zeros(0, SPAN_ROW))
    del samples
    rows = np.zeros(packs, PACK_ROW)
    rows["pack"], rows["sample"], rows["tokens"] = numbers, numbers, 1
    np.save(folder / "packs.npy", rows)
    parts = ("tokens.bin", "tokens.idx", "samples.npy", "spans.npy")
    shard = ShardManifest(
        code_version=VERSION,
        config_sha256="0",
        name=name,
        modality="text",
        number=0,
        count=1,
        sources=(SourceEntry(name="text.jsonl", start=0, end=1, sha256="0", places="line"),),
        files=tuple(_entry(folder / f"{name}.{part}") for part in parts),
        samples=packs,
        images=0,
        tokens=packs,
        image_tokens=0,
        max_token=254,
        tokenizer=TOKENIZER,
        seq_length=8,
        geometry=GEOMETRY,
        template="plain",
    )
    (folder / f"{name}.json").write_bytes(to_json(shard))
    digest = hashlib.sha256(to_json(shard)).hexdigest()
    content = DatasetManifest(
        code_version=VERSION,
        config_sha256="0",
        pack=PackSettings(packed=True, seq_length=8, max_images=1),
        shards=(ShardEntry(name=name, sha256=digest, samples=packs, tokens=packs, images=0),),
        packs=_entry(folder / "packs.npy"),
        text_packs=packs,
        multimodal_packs=0,
        tokenizer=TOKENIZER,
        geometry=GEOMETRY,
        templates=("plain",),
        fingerprint="",
    )
    (folder / "manifest.json").write_bytes(to_json(replace(content, fingerprint=fingerprint(content))))
    return folder


def _crc32_of_each(tokens: np.ndarray) -> np.ndarray:
    """zlib.crc32 of every single token: there are only 251 of them."""
    known = np.array([zlib.crc32(np.int32(value).tobytes()) for value in range(256)], np.uint32)
    return known[tokens]


def _entry(path: Path) -> FileEntry:
    return FileEntry(name=path.name, size=path.stat().st_size, sha256=file_sha256(path))


def measure(folder: Path) -> list[float]:
    """Peak RSS in MB; processor seconds to open, to check, to read one sequence."""
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: list[float] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("packs", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_packs(packs: int, tmp_path: Path, report_table: Callable[..., Any]) -> None:
    small = measure(make_dataset(tmp_path / "small", 2 * 10**5))
    large = measure(make_dataset(tmp_path / "large", packs))
    report_table(
        ("packs", "peak RSS, MB", "open, CPU s", "check every file, CPU s", "read one sequence, CPU ms"),
        (f"{2 * 10**5:,}", *small[:3], 1e3 * small[3]),
        (f"{packs:,}", *large[:3], 1e3 * large[3]),
        f"growth {large[0] - small[0]:.1f} MB (limit {LIMIT_MB:g})",
    )
    assert large[0] - small[0] < LIMIT_MB
    assert large[1] < 1.0 and large[3] < 0.005
