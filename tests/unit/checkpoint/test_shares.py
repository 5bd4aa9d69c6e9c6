"""Boxes of flattened ranges, equal shares of replicated tensors, and reads of parts of stored tensors."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megavl.checkpoint import background, shard_reads
from megavl.checkpoint.background import HostBuffer
from megavl.checkpoint.boxes import boxes_of_range, shards_of_range
from megavl.checkpoint.safe_unpickle import METADATA, read_metadata
from megavl.checkpoint.shard_reads import ShardReader
from megavl.checkpoint.shards import Block, metadata_of, write_blocks
from megavl.checkpoint.shares import divide, row_axis
from megavl.config.errors import CheckpointError


def window(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))


@pytest.mark.parametrize("shape", [(), (7,), (1, 5), (4, 6), (3, 1, 4), (2, 3, 2, 5)])
def test_boxes_hold_exactly_the_range(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).reshape(shape)
    for start in range(prod(shape) + 1):
        for stop in range(start, prod(shape) + 1):
            boxes = boxes_of_range(shape, start, stop)
            found = [whole[window(*box)].flatten() for box in boxes]
            assert torch.equal(torch.cat(found) if found else torch.arange(0), torch.arange(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


def swiglu(key: str, data: torch.Tensor, replica: object, flattened: object) -> list[ShardedTensor]:
    """The second of two tensor-parallel ranks of a gate and a value projection, in layer 1 of 3."""
    return [
        ShardedTensor.from_rank_offsets(key, part, (0, 1, 3), (1, number, 4), replica_id=replica, prepend_axis_num=1)
        for part, number in zip(data.chunk(2), (1, 3))
    ]


def test_range_of_a_factory_gets_its_offsets() -> None:
    data = torch.arange(24.0).reshape(6, 4)
    factory = ShardedTensorFactory("fc1", data, swiglu, torch.cat, (0, 1, 5))  # type: ignore[arg-type]
    stored = torch.full((3, 12, 4), -1.0)
    for start, stop in ((0, 5), (5, 14), (14, 24)):
        for shard in shards_of_range(factory, data.flatten()[start:stop], start=start, key="exp_avg.fc1"):
            assert (shard.key, shard.replica_id, shard.has_regular_grid) == ("exp_avg.fc1", (0, 1, 0), False)
            sizes = (1, *shard.local_shape)
            assert stored[window(shard.global_offset, sizes)].eq(-1).all()
            stored[window(shard.global_offset, sizes)] = shard.data.reshape(sizes)
    assert torch.equal(stored[1, 3:6], data[:3]) and torch.equal(stored[1, 9:], data[3:])
    assert stored.eq(-1).sum() == stored.numel() - 24


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 13])
def test_replicas_are_divided_evenly(ranks: int) -> None:
    draw = random.Random(ranks)
    shapes = [(4000, 64), (1, 3000, 64), (64,), (1,), (), (2, 0)] + [(draw.randint(1, 900), 48) for _ in range(20)]
    shards = [
        ShardedTensor.from_rank_offsets(f"w{number}", torch.empty(shape, device="meta")).without_data()
        for number, shape in enumerate(shapes)
    ]
    alone = replace(shards[0], key="alone")
    parts = divide([[*shards, alone] if rank == 0 else shards for rank in range(ranks)])
    sizes = [0] * ranks
    for name, found in parts.items():
        rows = name[2][row_axis(name[2])] if name[2] else 1
        ends = [(part.start, part.stop) for part in found]
        assert [0, *(stop for _, stop in ends)] == [*(start for start, _ in ends), rows]
        if name[0] == "alone":
            assert {part.rank for part in found} == {0}
            continue
        for part in found:
            sizes[part.rank] += (part.stop - part.start) * prod(name[2]) * 4 // max(1, rows)
    assert max(sizes) < 1.1 * sum(sizes) / ranks


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint's shard files: one tensor in uneven blocks, one whole, one scalar, one that is stored transposed."""
    tensors = {
        "blocks": torch.randn(2, 9, 6),
        "whole": torch.randn(40, 8).bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "transposed": torch.randn(8, 5),
    }
    cuts = [((0, 0, 0), (1, 4, 6)), ((0, 4, 0), (1, 5, 6)), ((1, 0, 0), (1, 9, 2)), ((1, 0, 2), (1, 9, 4))]
    blocks = [
        Block(key="blocks", data=tensors["blocks"][window(*cut)], shape=(2, 9, 6), offsets=cut[0]) for cut in cuts
    ]
    blocks += [
        Block(key=key, data=tensors[key], shape=tuple(tensors[key].shape), offsets=(0,) * tensors[key].dim())
        for key in ("whole", "scalar", "transposed")
    ]
    written, _ = write_blocks(blocks, tmp_path, rank=0, step=1)
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata_of([written])))
    return tmp_path, tensors


def read(
    reader: ShardReader, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], kind: torch.dtype
) -> torch.Tensor:
    target = torch.full(sizes, -1, dtype=kind)
    reader.fill(target, key=key, offsets=offsets)
    return target


@pytest.mark.parametrize("block_bytes", [1, 64 << 20])
def test_any_window_is_read(
    stored: tuple[Path, dict[str, torch.Tensor]], block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reads, "BLOCK_BYTES", block_bytes)
    path, tensors = stored
    draw = random.Random(1)
    with ShardReader(path, read_metadata(path)) as reader:
        for key, tensor in tensors.items():
            for _ in range(20):
                low = [draw.randrange(size) for size in tensor.shape]
                sizes = tuple(draw.randint(1, size - start) for size, start in zip(tensor.shape, low))
                wanted = tensor[window(tuple(low), sizes)]
                assert torch.equal(read(reader, key, tuple(low), sizes, tensor.dtype), wanted), (key, low, sizes)
                assert torch.equal(read(reader, key, tuple(low), sizes, torch.float64), wanted.double())


def test_only_the_rows_of_a_window_are_read(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = stored
    with ShardReader(path, read_metadata(path)) as reader:
        read(reader, "whole", (30, 0), (5, 8), torch.bfloat16)
        assert reader.read_bytes == 5 * 8 * 2


def test_tensors_in_other_forms_are_read_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    monkeypatch.setattr("megavl.checkpoint.shard_files._alone", lambda value: value.t().contiguous().t())
    written, _ = write_blocks([Block(key="w", data=tensor, shape=(3, 4), offsets=(0, 0))], tmp_path, rank=0, step=1)
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata_of([written])))
    with ShardReader(tmp_path, read_metadata(tmp_path)) as reader:
        assert torch.equal(read(reader, "w", (1, 1), (2, 2), torch.float32), tensor[1:, 1:3])


def test_a_truncated_shard_names_file_and_key(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = stored
    metadata = read_metadata(path)
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-2000])
    with ShardReader(path, metadata) as reader, pytest.raises(CheckpointError, match="__0_0.distcp: transposed"):
        read(reader, "transposed", (0, 0), (8, 5), torch.float32)


def test_metadata_lists_blocks_of_all_ranks(stored: tuple[Path, dict[str, torch.Tensor]]) -> None:
    entry = read_metadata(stored[0]).state_dict_metadata["blocks"]
    assert isinstance(entry, TensorStorageMetadata) and len(entry.chunks) == 4


def test_copies_share_memory_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, odd, large = HostBuffer(), torch.arange(3.0).bfloat16(), torch.randn(1, 5, 4)[:, 1:4]
    blocks = [
        Block(key="odd", data=odd, shape=(3,)),
        Block(key="object", data=[1], shape=None),
        Block(key="large", data=large, shape=(1, 5, 4)),
    ]
    assert buffer.reserve(blocks, ranks=1)
    copies = buffer.copy(blocks)
    kept = {number: copies[number].data.clone() for number in (0, 2)}
    odd.zero_(), large.zero_(), blocks[1].data.append(2)  # type: ignore[func-returns-value]
    assert copies[1].data == [1] and all(torch.equal(copies[number].data, kept[number]) for number in kept)
    again = buffer.copy(blocks)
    assert [block.data.data_ptr() for block in again[::2]] == [block.data.data_ptr() for block in copies[::2]]
    monkeypatch.setattr(background, "_available", lambda: 1000)
    assert buffer.reserve(blocks, ranks=8)
    more = [*blocks, Block(key="more", data=torch.zeros(200), shape=(200,))]
    assert not buffer.reserve(more, ranks=2)

    def fails(*_size: int, **_options: object) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(background.torch, "empty", lambda size, **more: fails() if size else torch.zeros(0))
        assert not buffer.reserve(more, ranks=1)
    assert buffer.reserve(more, ranks=1)


def test_memory_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = background._free_on_host()
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/slurm/job_1\n")
    monkeypatch.setattr(background, "_CGROUP", tmp_path / "own")
    monkeypatch.setattr(background, "_CGROUPS", tmp_path)
    # The step has no limit, the job has one.
    for folder, most in ((job, "max"), (job.parent, "7000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("5000\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert background._available() == 2500
    (job.parent / "memory.max").write_text("max\n")
    assert background._available() == pytest.approx(free, rel=0.5)
    monkeypatch.setattr(background, "_CGROUP", tmp_path / "missing")
    assert background._available() == pytest.approx(free, rel=0.5)
