"""Hostile, damaged and mismatching input: one message that names file and tensor, and nothing half-written."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megavl.config.errors import CheckpointError, DataError, StorageError, UsageError
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.convert import native_format, original_format
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config
from megavl.convert.hf_write import write_hf
from megavl.convert.open_weights import open_weights
from megavl.convert.table import FORMATS
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.convert.verify import compare
from megavl.weights.lazy import LazyTensor
from tests import fork_server
from tests.tiny_run import environment

LM_HEAD = "lm_head.weight"
DOWN_PROJ = "model.language_model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def folder(sources, tmp_path):
    """A private copy of the tiny model without SAM."""
    return Path(shutil.copytree(sources["tiny-siglip"], tmp_path / "model"))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    # Some tests remove the only reason for a tensor to be contiguous.
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")


def _archive(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def refusal(folder):
    with pytest.raises(CheckpointError) as error:
        open_weights(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.pop(LM_HEAD))
    assert f"{folder}/model.safetensors: no tensor 'lm_head.weight'" in refusal(folder)


def test_unexpected_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"lora.a": torch.zeros(2)}))
    assert f"{folder}/model.safetensors: unexpected tensor 'lora.a'" in refusal(folder)


def test_misshapen_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({DOWN_PROJ: tensors[DOWN_PROJ].T}))
    message = refusal(folder)
    assert (
        f"{folder}/model.safetensors: tensor '{DOWN_PROJ}' has shape [352, 128]" in message and "[128, 352]" in message
    )


def test_parts_of_two_types_are_refused(folder):
    up = "model.language_model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({up: tensors[up].half()}))
    assert up in refusal(folder)


def test_integer_weights_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({LM_HEAD: tensors[LM_HEAD].to(torch.int8)}))
    assert "'lm_head.weight' is of type I8" in refusal(folder)


def test_both_siglip_layouts_at_once_are_refused(folder):
    flat = "model.vision_model.post_layernorm.bias"
    # One of the two is there, whichever the installed release of transformers writes.
    both = (flat, flat.replace("vision_model", "vision_model.vision_model"))
    rewrite(folder, lambda tensors: tensors.update({key: torch.ones(64) for key in both if key not in tensors}))
    assert flat in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file_is_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path}: not a readable safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        {"x": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"x": {"dtype": "Z9", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4096]}},
    ],
    ids=["overlap", "overflow", "dtype", "beyond the file"],
)
def test_hostile_header_is_refused(folder, header):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert f"{folder}/model.safetensors: not a readable" in refusal(folder)


def test_header_longer_than_the_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert f"{folder}/model.safetensors: not a readable" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "..", "C:\\x", "..\\x", ""])
def test_index_that_leaves_the_folder_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {LM_HEAD: name}}))
    message = refusal(folder)
    assert "model.safetensors.index.json" in message and "outside the folder" in message


def test_index_must_agree_with_the_files(folder):
    shard, index = "model-00001-of-00001.safetensors", folder / "model.safetensors.index.json"
    (folder / "model.safetensors").rename(folder / shard)
    names = list(load_file(folder / shard))
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "more"], shard)}))
    assert f"{shard}: no tensor 'more'" in refusal(folder)
    listed = [name for name in names if name != LM_HEAD]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed, shard)}))
    assert f"does not list what {shard} holds): no tensor 'lm_head.weight'" in refusal(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed, shard) | {LM_HEAD: "gone.safetensors"}}))
    assert "gone.safetensors: no such file" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": 1}}', "{}"])
def test_damaged_index_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json: " in refusal(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_torch_archives_are_read_without_safetensors(folder, sources, sharded):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    shards = {"a.bin": names[:40], "b.bin": names[40:]} if sharded else {"pytorch_model.bin": names}
    for name, part in shards.items():
        torch.save({key: tensors[key] for key in part}, folder / name)
    if sharded:
        weight_map = {key: name for name, part in shards.items() for key in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert compare(open_weights(sources["tiny-siglip"]), open_weights(folder)).identical


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [pickle.dumps, _archive], ids=["pickle", "archive of torch.save"])
def test_hostile_pickle_is_refused_and_does_not_run(folder, tmp_path, write):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(write({LM_HEAD: Hostile(str(tmp_path / "ran"))}))
    message = refusal(folder)
    assert f"{folder}/pytorch_model.bin" in message and "refused" in message
    assert not (tmp_path / "ran").exists()


def test_archive_of_old_torch_is_refused_with_remedy(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "torch 1.6 or newer" in refusal(folder) and "save its tensors as safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_values_outlive_the_file(folder, name):
    """A tensor in a map of the file would change with it, and would count as memory for as long as the file is open."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / name)
    loaded = open_hf_tensors(folder)[LM_HEAD].load()
    with (folder / name).open("r+b") as file:
        file.write(bytes((folder / name).stat().st_size))
    assert torch.equal(loaded, tensors[LM_HEAD])


def test_file_that_shrinks_after_opening_is_named(folder):
    tensors = open_hf_tensors(folder)
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="cannot read tensor .*the file has become shorter"):
        [tensor.load() for tensor in tensors.values()]


def test_folder_without_weights_or_configuration_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert "none of model.safetensors, model.safetensors.index.json, pytorch_model.bin" in refusal(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not a DeepSeek-VL model"),
        ({"vision_config": {}}, "vision_config.hidden_act: MegaVL runs SigLIP with the exact 'gelu'"),
        ({"text_config": {"num_key_value_heads": 2}}, "text_config.num_key_value_heads"),
        ({"image_token_id": 10**6}, "model.image_token_id"),
        ({"text_config": 3}, "text_config: a JSON object is expected"),
    ],
)
def test_unsupported_configuration_is_refused(folder, change, message):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(CheckpointError) as error:
        read_config(folder)
    assert f"{folder}/config.json: " in str(error.value) and message in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_field_value_gives_a_model_or_message(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    config, fmt = load_model_config("tiny-hybrid"), data.draw(st.sampled_from(FORMATS))
    module = native_format if fmt == "native" else original_format
    raw = module.side_files(config, ids=TokenizerIds(bos=0, eos=1, pad=1, image=3), dtype="float32")["config.json"]
    node = raw
    while True:
        key = data.draw(st.sampled_from(sorted(node)))
        if not isinstance(node[key], dict) or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"<image_placeholder>": 3}}}')
    try:
        assert isinstance(read_config(folder)[0], ModelConfig)
    except CheckpointError as error:
        assert "config.json" in str(error)


def options(folder, tokenizer_dir):
    config, fmt = read_config(folder)
    tensors = canonical_tensors(open_hf_tensors(folder), config=config, fmt=fmt)
    return {"config": config, "tensors": tensors, "fmt": "native", "tokenizer_dir": tokenizer_dir}


def test_output_in_use_is_left_alone(folder, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists and is not empty"):
        write_hf(out, **options(folder, tokenizer_dir))
    with pytest.raises(UsageError, match="is not a folder"):
        write_hf(out / "mine", **options(folder, tokenizer_dir))
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    assert (write_hf(out, **options(folder, tokenizer_dir)) / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fmt": "gguf"}, UsageError, "format: 'gguf' is unknown"),
        ({"dtype": "int4"}, UsageError, "dtype: 'int4' is unknown"),
        ({"max_shard_bytes": 0}, UsageError, "max_shard_bytes: 0"),
        ({"tokenizer_dir": "/nowhere"}, DataError, "/nowhere/tokenizer.json: no such file"),
    ],
)
def test_wrong_arguments_write_nothing(folder, tokenizer_dir, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        write_hf(tmp_path / "out", **{**options(folder, tokenizer_dir), **change})
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_tensors_that_do_not_fit_write_nothing(folder, tokenizer_dir, tmp_path):
    arguments = options(folder, tokenizer_dir)
    name = "language_model.output_layer.weight"
    for tensors in (
        {key: value for key, value in arguments["tensors"].items() if key != name},
        {**arguments["tensors"], "optimizer.step": LazyTensor.of(torch.zeros(1))},
        {**arguments["tensors"], name: LazyTensor.of(torch.zeros(2, 2))},
    ):
        with pytest.raises(CheckpointError, match=r"runs/ckpt: .*(output_layer|optimizer\.step)"):
            write_hf(tmp_path / "out", **{**arguments, "tensors": tensors}, source="runs/ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_failing_storage_leaves_nothing(folder, tokenizer_dir, tmp_path):
    arguments = options(folder, tokenizer_dir)
    name = "language_model.output_layer.weight"

    def load():
        raise OSError(28, "No space left on device")

    arguments["tensors"][name] = dataclasses.replace(arguments["tensors"][name], load=load)
    with pytest.raises(StorageError, match="No space left on device"):
        write_hf(tmp_path / "out", **arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_value_beyond_float16_is_named(folder, tokenizer_dir, tmp_path):
    arguments = options(folder, tokenizer_dir)
    arguments["tensors"]["vision.siglip.norm.bias"] = LazyTensor.of(torch.full((64,), 1e6))
    with pytest.raises(CheckpointError, match=r"'vision.siglip.norm.bias' reaches 1e\+06.*bfloat16"):
        write_hf(tmp_path / "out", **arguments, dtype="float16")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_killed_export_leaves_no_model(folder, tokenizer_dir, tmp_path):
    script = """
import dataclasses, os, signal, sys
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config
from megavl.convert.hf_write import write_hf
config, fmt = read_config(sys.argv[1])
tensors = canonical_tensors(open_hf_tensors(sys.argv[1]), config=config, fmt=fmt)
last = list(tensors)[-1]
tensors[last] = dataclasses.replace(tensors[last], load=lambda: os.kill(os.getpid(), signal.SIGKILL))
write_hf(sys.argv[2], config=config, tensors=tensors, fmt="native", tokenizer_dir=sys.argv[3], max_shard_bytes=300_000)
"""
    out, variables = tmp_path / "out", environment()
    command = [fork_server.python(variables), "-c", script, folder, out, tokenizer_dir]
    run = subprocess.run(command, env=variables, timeout=1800)
    assert run.returncode == -9
    assert not out.exists()
    (partial,) = tmp_path.glob(".out*")
    assert any(partial.iterdir()) and not (partial / "config.json").exists()
    write_hf(out, **options(folder, tokenizer_dir))
    assert (out / "config.json").is_file() and not partial.exists()
