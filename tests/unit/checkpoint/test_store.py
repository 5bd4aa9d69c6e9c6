"""Saves on real ranks: round trips, crashes at every phase, full disks, recovery, retention."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from megavl.checkpoint.reader import open_model_tensors, resolve
from megavl.checkpoint.store import CheckpointStore, read_manifest
from megavl.config.errors import CheckpointError, StorageError, UsageError
from tests.unit.checkpoint import states
from tests.unit.checkpoint.ranks import results, run_ranks


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name.startswith("iter_"))


def test_ranks_that_wait_for_files_of_rank_zero_see_progress(tmp_path: Path) -> None:
    assert results(run_ranks(states.wait_for_rank_zero, 2, str(tmp_path / "none")))[1] >= 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 5 and 10, saved by two ranks."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    results(run_ranks(states.save_again, 2, str(directory), [5, 10]))
    return directory


@pytest.fixture()
def pair(saved: Path, tmp_path: Path) -> Path:
    """A copy of checkpoints 5 and 10 that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "pair"))


@pytest.mark.parametrize("world", [1, 2])
def test_round_trip_is_bitwise_and_keeps_newest_two(tmp_path: Path, world: int) -> None:
    directory = tmp_path / "checkpoints"
    found = results(run_ranks(states.save_and_load, world, str(directory), [1, 2, 3]))
    whole = (torch.arange(states.ROWS * 4, dtype=torch.float32).reshape(states.ROWS, 4) + 3).tolist()
    assert [row for part in found for row in part["weight"]] == whole
    for rank, part in enumerate(found):
        assert part["path"] == str(directory / "iter_0000003")
        assert part["bias"] == [3.0, 3.0, 3.0]
        assert part["table"] == [3.0 + number for number in range(4096)]
        assert part["rng"] == {"rank": rank, "value": 3}
        assert (part["iteration"], part["betas"]) == (3, [0.9, 0.95])
    assert names(directory) == ["iter_0000002", "iter_0000003"]
    assert (directory / "latest").read_text() == "iter_0000003\n"
    assert (directory / "iter_0000003" / "recipe.yaml").read_bytes() == b"seed: 1\n"
    manifest = read_manifest(directory / "iter_0000003")
    assert (manifest["iteration"], manifest["world_size"], manifest["content"]) == (3, world, {"consumed": 9})
    # Every rank writes, and reads, its share of what all of them hold.
    sizes = [manifest["files"][f"__{rank}_0.distcp"]["size"] for rank in range(world)]
    assert max(sizes) < 1.1 * sum(sizes) / world
    stored = 4096 * 4 + states.ROWS * 4 * 4 + 3 * 2
    read = [part["read"] for part in found]
    assert sum(read) == stored and max(read) < 1.1 * stored / world


def test_another_number_of_ranks_loads_it(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "pair"))
    (one,) = results(run_ranks(states.load_only, 1, str(directory), False, False))
    assert one["weight"] == (torch.arange(states.ROWS * 4.0).reshape(states.ROWS, 4) + 10).tolist()
    (end,) = run_ranks(states.load_only, 1, str(directory), False, True)
    assert end.error is not None and "rng/shard_0_2" in end.error[1]


def test_equal_states_give_equal_bytes(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    results(run_ranks(states.save_again, 2, str(other), [10]))
    assert read_manifest(other / "iter_0000010")["files"] == read_manifest(saved / "iter_0000010")["files"]


def test_save_in_background_equals_one_that_waits(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    fault = "mid_shard:1:15:enospc,after_manifest:0:20:eio"
    found = results(run_ranks(states.save_in_background, 2, str(other), [5, 10, 15, 20], fault=fault))
    for first, second, third, fourth in found:
        assert (first, second) == ("iter_0000005", "iter_0000010")
        assert "rank 1 writing its shard: No space left on device" in third and "Input/output error" in fourth
    assert names(other) == ["iter_0000005", "iter_0000010"]
    for name in names(other):
        assert read_manifest(other / name)["files"] == read_manifest(saved / name)["files"]


def test_a_part_that_nobody_wrote_is_never_committed(tmp_path: Path) -> None:
    for error in results(run_ranks(states.save_less, 2, str(tmp_path))):
        assert "elements are in the files" in error
    assert names(tmp_path) == []


SITES = ["before_mkdir", "mid_shard", "after_shard", "after_manifest", "after_rename", "mid_retention"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_kill_during_a_save_keeps_a_checkpoint(pair: Path, site: str, rank: int) -> None:
    # Each part of a save is in the background in one case.
    begins = rank == SITES.index(site) % 2
    save = states.save_in_background if begins else states.save_again
    ended = run_ranks(save, 2, str(pair), [15], fault=f"{site}:{rank}:15:sigkill")
    assert ended[rank].exit_code == -9
    store = CheckpointStore(pair)
    newest = store.newest()
    committed = site in ("after_rename", "mid_retention")
    assert newest == pair / ("iter_0000015" if committed else "iter_0000010")
    assert open_model_tensors(newest)["vision.bias"].load().tolist() == [15.0 if committed else 10.0] * 3
    assert not [entry for entry in pair.iterdir() if ".tmp-" in entry.name]
    assert len(names(pair)) >= 2


def test_save_succeeds_over_leftovers(pair: Path) -> None:
    (pair / "iter_0000015.tmp-abc").mkdir()
    (pair / "iter_0000015").mkdir()
    (pair / "iter_0000015" / "common.pt").write_bytes(b"half")
    assert results(run_ranks(states.save_again, 2, str(pair), [15])) == [["iter_0000015"]] * 2
    assert resolve(pair) == pair / "iter_0000015"
    (aside,) = pair.glob("iter_0000015.bad-*")
    assert (aside / "common.pt").read_bytes() == b"half"


def test_a_valid_checkpoint_is_never_replaced(pair: Path) -> None:
    before = read_manifest(pair / "iter_0000010")
    for end in run_ranks(states.save_again, 2, str(pair), [10]):
        assert end.error is not None and end.error[0] == "CheckpointError" and "iter_0000010" in end.error[1]
    assert read_manifest(pair / "iter_0000010") == before
    assert results(run_ranks(states.save_again, 2, str(pair), [15, 15])) == [["iter_0000015"] * 2] * 2


@pytest.mark.parametrize(
    "damage", ["bit", "truncated", "empty", "shard missing", "manifest missing", "manifest garbage", "manifest edited"]
)
def test_damage_falls_back_and_is_named(pair: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = pair / "iter_0000010"
    shard, manifest = newest / "__1_0.distcp", newest / "manifest.json"
    blamed = manifest if damage.startswith("manifest") else shard
    raw = bytearray(shard.read_bytes())
    if damage == "bit":
        raw[len(raw) // 2] ^= 4
        shard.write_bytes(raw)
    elif damage == "truncated":
        shard.write_bytes(raw[: len(raw) // 2])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage.endswith("missing"):
        blamed.unlink()
    elif damage == "manifest garbage":
        manifest.write_bytes(b"\x00garbage")
    else:
        manifest.write_text(manifest.read_text().replace('"iteration": 10', '"iteration": 11'))
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(pair).newest() == pair / "iter_0000005"
    assert str(blamed) in caplog.text
    with pytest.raises(CheckpointError) as named:
        resolve(newest)
    assert str(blamed) in str(named.value) and len(str(named.value).splitlines()) <= 3
    if damage == "bit":
        assert str(named.value).count("sha256") == 1 and "expected" in str(named.value)


def test_skip_hash_compares_sizes_only(pair: Path) -> None:
    shard = pair / "iter_0000010" / "__0_0.distcp"
    raw = bytearray(shard.read_bytes())
    # Nothing in the file refers to this number.
    raw[re.search(rb"serialization_id\D*\d+", raw).end() - 1] ^= 1
    shard.write_bytes(raw)
    assert CheckpointStore(pair, skip_hash=True).newest() == pair / "iter_0000010"
    shard.write_bytes(raw[:-1])
    assert CheckpointStore(pair, skip_hash=True).newest() == pair / "iter_0000005"


@pytest.mark.parametrize("tracker", ["", "abc", "iter_0000099", None])
def test_tracker_is_only_a_hint(pair: Path, tracker: str | None, caplog: pytest.LogCaptureFixture) -> None:
    (pair / "latest").unlink()
    if tracker is None:
        (pair / "latest").mkdir()
    else:
        (pair / "latest").write_text(tracker)
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(pair).newest() == pair / "iter_0000010"
    assert str(pair / "latest") in caplog.text
    if tracker is None:
        results(run_ranks(states.save_again, 1, str(pair), [15]))
        assert (pair / "latest").read_text() == "iter_0000015\n"


def test_nothing_valid_is_an_error_and_deletes_nothing(pair: Path) -> None:
    for path in pair.glob("iter_*/__0_0.distcp"):
        path.write_bytes(b"")
    before = sorted(pair.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no valid checkpoint in .* \(checked 2\)") as error:
        CheckpointStore(pair).newest()
    assert "iter_0000005" in str(error.value) and "iter_0000010" in str(error.value)
    assert CheckpointStore(pair).newest(allow_fresh=True) is None
    assert sorted(pair.rglob("*")) == before


def test_first_start_differs_from_lost_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "new")
    assert store.newest() is None
    (tmp_path / "new" / "latest").write_text("iter_0000005\n")
    with pytest.raises(CheckpointError, match=r"\(checked 0\)"):
        store.newest()
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(tmp_path / "nowhere")


def test_full_disk_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for end in run_ranks(states.save_limited, 2, str(directory)):
        assert end.error is not None and end.error[0] == "StorageError", end
        assert "rank 0" in end.error[1] and "iter_0000010" in end.error[1]
    assert names(directory) == ["iter_0000005"]
    assert resolve(directory) == directory / "iter_0000005"


@pytest.mark.parametrize("fault", ["mid_shard:1:15:enospc", "after_shard:1:15:eio", "after_manifest:0:15:eio"])
def test_storage_errors_reach_every_rank(pair: Path, fault: str) -> None:
    for end in run_ranks(states.save_again, 2, str(pair), [15], fault=fault):
        assert end.error is not None and end.error[0] == "StorageError", end
    assert names(pair) == ["iter_0000005", "iter_0000010"]


def test_unusable_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file"):
        CheckpointStore(tmp_path / "file")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(StorageError, match="locked"):
            CheckpointStore(tmp_path / "locked")
    with pytest.raises(UsageError, match="keep"):
        CheckpointStore(tmp_path / "few", keep=1)


def test_retention_counts_valid_checkpoints_only(pair: Path) -> None:
    (pair / "iter_0000010" / "common.pt").write_bytes(b"")
    results(run_ranks(states.save_again, 2, str(pair), [15]))
    assert names(pair) == ["iter_0000005", "iter_0000010", "iter_0000015"]
    results(run_ranks(states.save_again, 2, str(pair), [20]))
    assert names(pair) == ["iter_0000015", "iter_0000020"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("dtype", "model.vision.weight is stored as torch.float32, the model expects torch.bfloat16"),
        ("shape", "model.vision.weight has shape (8, 4), the model expects (16, 4)"),
        ("unexpected", "model.vision.more is asked for but not in the checkpoint"),
        ("missing", "in the checkpoint but not asked for: model.vision.bias"),
        ("uncovered", "model.vision.weight"),
    ],
)
def test_mismatch_names_the_key_on_every_rank(saved: Path, change: str, key: str) -> None:
    for end in run_ranks(states.load_changed, 2, str(saved / "iter_0000010"), change):
        assert end.error is not None and end.error[0] == "CheckpointError", end
        assert key in end.error[1]


def test_types_are_converted_on_request(tmp_path: Path) -> None:
    results(run_ranks(states.save_again, 1, str(tmp_path / "one"), [5]))
    (found,) = results(run_ranks(states.converted, 1, str(tmp_path / "one" / "iter_0000005")))
    assert found == (torch.arange(states.ROWS * 4.0).reshape(states.ROWS, 4) + 5).bfloat16().tolist()
