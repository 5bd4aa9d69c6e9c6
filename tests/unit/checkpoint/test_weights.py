"""Weights: written by one process, loaded by real sharded models, read back tensor by tensor."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megavl.checkpoint.manifest import file_record
from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve
from megavl.checkpoint.store import read_manifest
from megavl.checkpoint.stored_keys import canonical_names, is_stacked, stored_key
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.errors import CheckpointError, StorageError
from megavl.config.load import load_model_config as preset
from megavl.weights.canonical_names import canonical_shapes
from tests.unit.checkpoint import states
from tests.unit.checkpoint.ranks import results, run_ranks

CONFIG = preset("tiny-hybrid")
LLM = CONFIG.llm
LANGUAGE = {name: shape for name, shape in canonical_shapes(CONFIG).items() if name.startswith("language_model.")}
VISION = {"vision.siglip.weight": (4, 3), "vision.siglip.bias": (4,), "vision.siglip.pos_embed": (1, 2, 3)}


def weights() -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    for name, shape in {**LANGUAGE, **VISION}.items():
        yield name, torch.randn(shape, generator=generator)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights") / "model"
    files = {"tokenizer/tokenizer.json": b"{}", "passthrough.safetensors": b"x"}
    return write_model_checkpoint(directory, config=CONFIG, tensors=weights(), files=files)


def test_writer_and_reader_agree(written: Path) -> None:
    assert written.name == "iter_0000000" and resolve(written.parent) == written
    assert read_manifest(written)["content"] == {"weights_only": True}
    assert load_model_config(written) == CONFIG
    assert (written / "tokenizer" / "tokenizer.json").read_bytes() == b"{}"
    found = open_model_tensors(written.parent)
    expected = dict(weights())
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(found[name].load(), tensor), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_real_model_loads_strictly_and_is_read_back(written: Path, tmp_path: Path, tp: int, pp: int) -> None:
    directory = tmp_path / "model"
    write_model_checkpoint(directory, config=CONFIG, tensors=weights(), files={})
    expected = dict(weights())
    gate, up = expected["language_model.decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
    for part in results(run_ranks(states.reshard_real_model, tp * pp, str(directory), tp, pp)):
        rank, stage = part["ranks"]
        first_of_stage = f"language_model.decoder.layers.{stage * LLM.num_layers // pp}.mlp.linear_fc1.weight"
        gate, up = (half.chunk(tp)[rank] for half in expected[first_of_stage].chunk(2))
        assert torch.equal(torch.tensor(part["fc1"][0]), torch.cat([gate, up]))
    found = open_model_tensors(directory)
    assert resolve(directory).name == "iter_0000007" and set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].load(), tensor), name
    fc1 = "language_model.decoder.layers.2.mlp.linear_fc1.weight"
    assert torch.equal(found[fc1].load_slice(100, 500), expected[fc1][100:500])
    # Columns that begin on one tensor-parallel rank's part and end on the other's.
    fc2 = fc1.replace("fc1", "fc2")
    assert torch.equal(found[fc2].load_slice(100, 300, axis=1), expected[fc2][:, 100:300])


def test_one_layer_is_read_without_the_others(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megavl.checkpoint import reader

    lengths: list[int] = []
    load_shard_item = reader.load_shard_item

    def counted(stream: object, info: object, *, source: str) -> object:
        lengths.append(info.length)  # type: ignore[attr-defined]
        return load_shard_item(stream, info, source=source)  # type: ignore[arg-type]

    monkeypatch.setattr(reader, "load_shard_item", counted)
    tensor = open_model_tensors(written)["language_model.decoder.layers.3.mlp.linear_fc2.weight"].load()
    assert tensor.nbytes <= sum(lengths) < 1.1 * tensor.nbytes


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    large = torch.randn(1000, 1000)
    tensors = [*weights(), ("vision.view", large[:2]), ("vision.scalar", torch.tensor(3.0)), ("vision.none", large[:0])]
    path = write_model_checkpoint(tmp_path, config=CONFIG, tensors=tensors, files={})
    found = open_model_tensors(path)
    assert torch.equal(found["vision.view"].load(), large[:2])
    assert found["vision.scalar"].load() == 3 and found["vision.none"].load().shape == (0, 1000)
    assert sum(file.stat().st_size for file in path.glob("*.distcp")) < sum(t.nbytes for _, t in weights()) + 200_000


def test_weights_fill_several_shard_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavl.checkpoint.shard_files.SHARD_BYTES", 1 << 20)
    path = write_model_checkpoint(tmp_path, config=CONFIG, tensors=weights(), files={})
    assert len(list(path.glob("*.distcp"))) > 1
    found = open_model_tensors(path)
    assert all(torch.equal(found[name].load(), tensor) for name, tensor in weights())


def test_incomplete_or_wrong_weights_leave_nothing(tmp_path: Path) -> None:
    everything = dict(weights())
    name = "language_model.decoder.layers.1.mlp.linear_fc1.weight"
    beyond = name.replace("layers.1.", "layers.4.")
    cases = {
        "1 tensors of the language model are missing: " + name: {k: v for k, v in everything.items() if k != name},
        "4 layers": {**everything, beyond: everything[name]},
        "other layers have": {**everything, name: everything[name].bfloat16()},
    }
    for message, tensors in cases.items():
        with pytest.raises(CheckpointError, match=message):
            write_model_checkpoint(tmp_path / "out", config=CONFIG, tensors=tensors.items(), files={})
        assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(CheckpointError, match="given twice"):
        write_model_checkpoint(tmp_path / "out", config=CONFIG, tensors=[*weights(), *weights()], files={})
    for bad in ("../x", "/x", "manifest.json", "__0_0.distcp"):
        with pytest.raises(CheckpointError, match="no name for an extra file"):
            write_model_checkpoint(tmp_path / "out", config=CONFIG, tensors=weights(), files={bad: b""})


def test_valid_weights_are_not_replaced(written: Path) -> None:
    with pytest.raises(CheckpointError, match="valid checkpoint of this iteration"):
        write_model_checkpoint(written.parent, config=CONFIG, tensors=weights(), files={})


def test_stored_keys_have_an_exact_inverse() -> None:
    for name in canonical_shapes(preset("7b")):
        stored = stored_key(name)
        assert is_stacked(stored.key) == (stored.layer is not None)
        assert canonical_names(stored.key, layers=30)[stored.layer or 0] == name
    assert stored_key("language_model.decoder.layers.11.input_layernorm.weight").key == (
        "model.language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    )


def test_recorded_hashes_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavl.checkpoint.shard_files.SHARD_BYTES", 1 << 20)
    tensors = [*weights(), ("vision.large", torch.randn(1 << 20)), ("vision.odd", torch.randn(700_001).half())]
    path = write_model_checkpoint(tmp_path, config=CONFIG, tensors=tensors, files={})
    records = read_manifest(path)["files"]
    assert len(records) > 5 and records == {name: file_record(path / name) for name in records}


@pytest.fixture
def little_storage() -> Iterator[None]:
    """A limit of 1 MB a file, which stands for a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_nothing(tmp_path: Path, little_storage: None) -> None:
    tensors = [("vision.large", torch.randn(1 << 20)), *weights()]
    with pytest.raises(StorageError, match="writing weights: (File too large|incomplete write)"):
        write_model_checkpoint(tmp_path, config=CONFIG, tensors=tensors, files={})
    assert list(tmp_path.iterdir()) == []


def test_failed_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(stream: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("megavl.files.file_series._sync_and_close", failing)
    with pytest.raises(StorageError, match="writing weights: Input/output error"):
        write_model_checkpoint(tmp_path, config=CONFIG, tensors=weights(), files={})
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path: Path) -> None:
    for name in ("iter_0000000.tmp-1", "iter_0000005.tmp-2"):
        (tmp_path / name).mkdir()
    write_model_checkpoint(tmp_path, config=CONFIG, tensors=weights(), files={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000000", "iter_0000005.tmp-2", "latest"]
