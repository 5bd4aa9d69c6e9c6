"""The table of packs: the same for any block and range size, in bounded memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.pipeline import pack_table
from data_tools.pipeline.finish import finish
from data_tools.pipeline.job import Input, Job, Task
from data_tools.pipeline.output import Output, TaskSummary
from data_tools.pipeline.pack_table import Block, PackTable
from data_tools.readers.splits import Split
from megavl.config.errors import StorageError
from megavl.config.presets import IMAGE_PRESETS
from megavl.config.version import VERSION
from megavl.data.index_file import index_bytes
from megavl.data.manifest import (
    IMAGE_ROW,
    MODALITIES,
    SAMPLE_ROW,
    SPAN_ROW,
    FileEntry,
    ShardEntry,
    ShardManifest,
    SourceEntry,
    geometry_entry,
    to_json,
)
from megavl.data.shard import file_sha256
from megavl.data.tokenizer import open_tokenizer
from megavl.files.new_file import NewFile
from tests.unit.data.corpus_files import make_tokenizer
from tests.unit.data.whole_packing import pack

ROOT = Path(__file__).parents[4]
S, K = 4096, 5
SHARD = 20_000
LIMIT = 1.2


def _samples(count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images as in joint training: a third of the samples have images."""
    draw = np.random.default_rng(seed)
    images = np.where(draw.random(count) < 0.33, np.minimum(K, draw.geometric(0.8, count)), 0).astype(np.int32)
    lengths = np.minimum(S, images * 576 + draw.lognormal(5.5, 1.1, count).astype(np.int32) + 1)
    return lengths.astype(np.int32), images


def _blocks(lengths: np.ndarray, images: np.ndarray, *, shard: int, block: int) -> Iterator[Block]:
    for first in range(0, len(lengths), shard):
        for start in range(first, min(first + shard, len(lengths)), block):
            end = min(start + block, first + shard, len(lengths))
            yield Block(shard=first // shard, first=start - first, lengths=lengths[start:end], images=images[start:end])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [0, 1, 5000])
@pytest.mark.parametrize(("rows", "bins"), [(1 << 16, 1 << 17), (300, 1 << 17), (1, 7)])
def test_table_equals_the_packs_of_all_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, count: int, rows: int, bins: int
) -> None:
    monkeypatch.setattr(pack_table, "_SORTED_ROWS", rows)
    monkeypatch.setattr(pack_table, "_BINS", bins)
    lengths, images = _samples(count)
    table = PackTable(lambda: _blocks(lengths, images, shard=700, block=256), seq_length=S, max_images=K, packed=packed)
    with NewFile(tmp_path / "packs.npy") as file:
        table.write(file)
        file.commit()
    found = np.load(tmp_path / "packs.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["packs.npy"]
    parts = pack(lengths, images=images, seq_length=S, max_images=K, packed=packed)
    samples = np.concatenate([part.samples for part in parts])
    packs = np.concatenate([parts[0].packs, parts[1].packs + parts[0].count])
    assert np.array_equal(found["pack"], packs)
    assert np.array_equal(found["shard"], samples // 700) and np.array_equal(found["sample"], samples % 700)
    assert np.array_equal(found["tokens"], lengths[samples]) and np.array_equal(found["images"], images[samples])
    assert np.array_equal(found["modality"], np.repeat([0, 1], [len(part.samples) for part in parts]))
    counted = PackTable(
        lambda: _blocks(lengths, images, shard=700, block=256), seq_length=S, max_images=K, packed=packed
    )
    counted.count()
    assert counted.tallies == table.tallies
    for number, modality in enumerate(MODALITIES):
        tally, members = table.tallies[modality], parts[number].samples
        assert (tally.count, tally.tokens) == (parts[number].count, lengths[members].sum())
        assert tally.images == images[members].sum() and sum(tally.totals.values()) == tally.count
        assert tally.filler_tokens == (lengths[members][images[members] == 0].sum() if number and packed else 0)


def test_full_storage_gives_one_message_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, images = _samples(500)
    table = PackTable(lambda: _blocks(lengths, images, shard=99, block=99), seq_length=S, max_images=K, packed=True)

    monkeypatch.setattr(pack_table.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b"))  # noqa: SIM115
    with (
        pytest.raises(StorageError, match=r"packs.npy: cannot write \(No space left"),
        NewFile(tmp_path / "packs.npy") as file,
    ):
        table.write(file)
    assert list(tmp_path.iterdir()) == []


def _run(root: Path, count: int) -> tuple[Job, list[Task]]:
    """The job of a simulated run, and its tasks."""
    tokenizer = open_tokenizer(root / "tokenizer")
    source = Input(
        path="in.jsonl", container="json", format="text", only=None, content="text", template="plain",
        template_given=False, size=1, ends_sha256="0",
    )  # fmt: skip
    job = Job(
        inputs=(source,), tokenizer=str(tokenizer.path), tokenizer_sha256=tokenizer.sha256, seq_length=S, packed=True,
        max_images=K, image_preset="hybrid-1024", columns=(), ignore=(), max_side=0, image_root=None,
        follow_links=False, image_map=None, image_map_sha256=None, verify="header", max_aspect=1.0,
        system_prompt="", over_long="drop", limit=None, output=str(root / "out"), fail_on_error=False,
        files_left_out=(), dry_run=False,
    )  # fmt: skip
    split = Split(path="in.jsonl", position_kind="line", start=0, end=1, first_position=1, records=SHARD)
    return job, [Task(number=number, input=0, split=split) for number in range(-(-count // SHARD))]


def make_run(root: Path, count: int) -> None:
    """Write the shards of a simulated run and commit its tasks; the token and image files are sparse."""
    tokenizer = open_tokenizer(make_tokenizer(root / "tokenizer"))
    (job, tasks), out = _run(root, count), root / "out"
    (out / "units").mkdir(parents=True)
    geometry = geometry_entry(IMAGE_PRESETS["hybrid-1024"])
    for number in range(len(tasks)):
        size = min(SHARD, count - number * SHARD)
        lengths, images = _samples(size, seed=number)
        name = f"multimodal-{number:05d}"
        rows = np.zeros(size, SAMPLE_ROW)
        rows["images"] = images
        tables = {"samples": rows, "spans": np.zeros(0, SPAN_ROW), "images": np.zeros(1, IMAGE_ROW)}
        for part, table in tables.items():
            np.save(out / f"{name}.{part}.npy", table)
        (out / f"{name}.tokens.idx").write_bytes(index_bytes(lengths, dtype="int32"))
        (out / f"{name}.images.idx").write_bytes(index_bytes(np.ones(1, np.int32), dtype="uint8"))
        for part, length in (("tokens", 4 * int(lengths.sum(dtype=np.int64))), ("images", 1)):
            with open(out / f"{name}.{part}.bin", "wb") as stream:
                stream.truncate(length)
        files = tuple(
            FileEntry(name=path.name, size=path.stat().st_size, sha256="0") for path in sorted(out.glob(f"{name}.*"))
        )
        tokens = int(lengths.sum(dtype=np.int64))
        manifest = ShardManifest(
            code_version=VERSION, config_sha256=job.config_sha256, name=name, modality="multimodal", number=number,
            count=1, sources=(SourceEntry(name="in.jsonl", start=0, end=1, sha256="0", places="line"),), files=files,
            samples=size, images=1, tokens=tokens, image_tokens=0, max_token=9, tokenizer=tokenizer.entry,
            seq_length=S, geometry=geometry, template="plain",
        )  # fmt: skip
        (out / f"{name}.json").write_bytes(to_json(manifest))
        digest = file_sha256(out / f"{name}.json")
        shard = ShardEntry(name=name, sha256=digest, samples=size, tokens=tokens, images=int(images.sum()))
        summary = TaskSummary(
            number=number, config_sha256=job.config_sha256, records=size, cut=0, shortened=0,
            images_without_file=0, untagged=0, image_empty=0, balance={"images/found": int(images.sum())},
            templates=("plain",), rejected={}, shards=(shard,),
        )  # fmt: skip
        Output(job.output).commit_task(summary, rejects=[])


def peak(root: str, count: str) -> None:
    """Run the last step in this process and print its time, and the peak before and after."""
    job, tasks = _run(Path(root), int(count))
    before, start = _high_water(), time.perf_counter()
    report = finish(job, tasks, max_bad_frac=0.0)
    assert report["samples"] == int(count)
    print(time.perf_counter() - start, before, _high_water())


def _high_water() -> int:
    """Peak memory in KiB, read by the process itself, because the value for children includes the parent."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param((100_000, 400_000), id="400k"),
        pytest.param((100_000, 1_000_000), marks=pytest.mark.slow, id="1M"),
        pytest.param((100_000, 10_000_000), marks=pytest.mark.slow, id="10M"),
    ],
)
def test_memory_does_not_grow_with_samples(tmp_path: Path, counts: tuple[int, int], report_table: Any) -> None:
    lines, peaks = ["samples     peak RSS, MB  time, s"], []
    code = "import sys; from tests.unit.data_tools.pipeline.test_pack_table import peak; peak(*sys.argv[1:])"
    for count in counts:
        make_run(tmp_path / str(count), count)
        command = [sys.executable, "-c", code, str(tmp_path / str(count)), str(count)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seconds, before, after = map(float, done.stdout.split())
        peaks.append(after)
        lines.append(f"{count:<11,} {after / 1024:<13.1f} {seconds:.2f}  (before: {before / 1024:.1f} MB)")
    growth = peaks[1] / peaks[0]
    report_table("\n".join([*lines, f"ratio {growth:.3f} (limit {LIMIT})"]))
    assert growth <= LIMIT
