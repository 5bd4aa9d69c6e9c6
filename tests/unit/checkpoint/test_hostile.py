"""Checkpoints made by an attacker, who forges the manifest too: no code runs, nothing outside is read or allocated."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from megavl.checkpoint import commit
from megavl.checkpoint.reader import open_model_tensors
from megavl.checkpoint.safe_unpickle import read_common, read_metadata
from megavl.config.errors import CheckpointError
from tests.unit.checkpoint import states
from tests.unit.checkpoint.ranks import results, run_ranks


class Bomb:
    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self._sentinel}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    results(run_ranks(states.save_again, 1, str(directory), [5]))
    return directory


@pytest.fixture()
def target(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may turn into an attack."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints")) / "iter_0000005"


def forge(path: Path) -> None:
    """Make the manifest fit the files."""
    (path / "manifest.json").unlink()
    written = [file for file in path.rglob("*") if file.is_file()]
    records = commit.file_records(path, written)
    commit.write_manifest(path, iteration=5, world_size=1, content={}, records=records)


def change_metadata(path: Path, change: Callable[[Metadata], None]) -> None:
    metadata = read_metadata(path)
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    forge(path)


def load_error(path: Path) -> str:
    (end,) = run_ranks(states.load_only, 1, str(path.parent), True, True)
    assert end.error is not None and end.error[0] == "CheckpointError", end
    return end.error[1]


def test_code_in_metadata_is_refused(target: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    (target / ".metadata").write_bytes(pickle.dumps(Bomb(sentinel)))
    forge(target)
    expected = f"refused global posix.system in {target / '.metadata'}"
    with pytest.raises(CheckpointError, match=expected):
        open_model_tensors(target)
    assert expected in load_error(target)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["builtins eval", "torch.serialization load", "torch Size.__class__", "torch load"])
def test_only_listed_names_pass(target: Path, name: str) -> None:
    module, attribute = name.split()
    text = (
        b"\x80\x04" + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)) + b"\x93."
    )
    (target / ".metadata").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"refused global {module}.{attribute} in"):
        read_metadata(target)


class ByName(pickle.Pickler):
    """Writes members of enums as Python 3.11.0 to 3.11.3 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_members_of_enums_are_read_by_name(target: Path) -> None:
    expected = read_metadata(target)
    written = io.BytesIO()
    ByName(written, protocol=4).dump(expected)
    assert b"getattr" in written.getvalue()
    (target / ".metadata").write_bytes(written.getvalue())
    assert read_metadata(target) == expected


class Got:
    """What a pickle gets by `getattr`, changed after it by a state if there is one."""

    def __init__(self, *arguments: object, state: object = None) -> None:
        self._arguments, self._state = arguments, state

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self._arguments, *([self._state] if self._state else [])


@pytest.mark.parametrize(
    "value",
    [
        Got(Metadata, "__init__"),
        Got(torch.Size, "mro"),
        Got(_MEM_FORMAT_ENCODING, "mro"),
        Got(_MEM_FORMAT_ENCODING, "__class__"),
        Got(_MEM_FORMAT_ENCODING, "name", 1),
        Got("text", "join"),
        Got(Got(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"), "value"),
        Got(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT", state={"_value_": 7}),
    ],
)
def test_nothing_else_is_got_by_name(target: Path, value: Got) -> None:
    (target / ".metadata").write_bytes(pickle.dumps(value, protocol=4))
    with pytest.raises(CheckpointError, match="refused|not readable"):
        read_metadata(target)
    assert _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT.value == 2


def test_code_in_a_byte_object_is_refused(target: Path, tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    with (target / "__9_0.distcp").open("wb") as stream:
        torch.save([Bomb(sentinel)], stream)
        size = stream.tell()

    def redirect(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("rng/shard_0_1")] = _StorageInfo("__9_0.distcp", 0, size)

    change_metadata(target, redirect)
    message = load_error(target)
    assert "refused global posix.system" in message and "__9_0.distcp" in message and "rng/shard_0_1" in message
    assert not sentinel.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_the_common_state_is_refused(target: Path, tmp_path: Path, legacy: bool) -> None:
    sentinel = tmp_path / "ran"
    torch.save({"x": Bomb(sentinel)}, target / "common.pt", _use_new_zipfile_serialization=not legacy)
    forge(target)
    with pytest.raises(CheckpointError, match="refused global posix.system in .*common.pt"):
        read_common(target)
    assert "refused global posix.system" in load_error(target)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["../iter_0000005/__0_0.distcp", "/etc/passwd", "x/y.distcp", "common.pt"])
def test_shards_outside_the_checkpoint_are_refused(target: Path, name: str) -> None:
    def redirect(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    change_metadata(target, redirect)
    with pytest.raises(CheckpointError, match="refused file name"):
        open_model_tensors(target)


def test_impossible_sizes_are_refused(target: Path) -> None:
    def enlarge(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.vision.weight"].size = torch.Size([1 << 40, 1 << 20])

    change_metadata(target, enlarge)
    with pytest.raises(CheckpointError, match="model.vision.weight: 32 of .* elements"):
        open_model_tensors(target)


def test_offset_past_the_end_is_refused(target: Path) -> None:
    def shift(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.offset += 1 << 20

    change_metadata(target, shift)
    with pytest.raises(CheckpointError, match="__0_0.distcp: .* bytes, .* needs"):
        open_model_tensors(target)


def test_item_that_contradicts_the_metadata_is_refused(target: Path) -> None:
    def swap(metadata: Metadata) -> None:
        for index in metadata.storage_data:
            if index.fqn == "model.vision.bias":
                metadata.storage_data[index] = metadata.storage_data[MetadataIndex("model.vision.weight", (0, 0))]

    change_metadata(target, swap)
    with pytest.raises(CheckpointError, match="model.vision.bias: does not hold"):
        open_model_tensors(target)
    assert "model.vision.bias" in load_error(target)


def test_forged_checkpoint_gives_up_its_name(target: Path) -> None:
    """The run resumes from an older one and comes to the same iteration."""
    shard = next(target.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    forge(target)
    commit.free_name(target.parent, 5, skip_hash=False)
    assert not target.exists() and len([*target.parent.glob("iter_0000005.bad-*")]) == 1


def test_manifest_that_leaves_the_directory_is_refused(target: Path) -> None:
    text = commit.encode_manifest(iteration=5, world_size=1, content={}, files={"../../x": {"size": 1, "sha256": "0"}})
    (target / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="refused file name"):
        open_model_tensors(target)
