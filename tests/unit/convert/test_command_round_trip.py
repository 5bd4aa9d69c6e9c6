"""`megavl convert` from each format to a checkpoint and back: the same bytes; refused tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.config.load import load_model_config
from megavl.convert.table import FORMATS, key_shapes, unused_parameters
from megavl.main.cli import main
from tests.unit.convert.saved_tensors import saved_tensors

PRESETS = ("tiny-hybrid", "tiny-siglip")
IMAGE = "<image_placeholder>"


@pytest.fixture
def native(sources, tokenizer_dir, tmp_path):
    """A private copy of the tiny model without SAM, with its tokenizer."""
    return with_tokenizer(sources["tiny-siglip"], tokenizer_dir, tmp_path / "native")


def with_tokenizer(source, tokenizer_dir, out):
    folder = Path(shutil.copytree(source, out))
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    return folder


def convert(*words):
    return main(["convert", *map(str, words)])


def stored(folder):
    """Type, shape and bytes of every tensor in the files of a folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            found[key] = (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_tensor_comes_back_byte_for_byte(fmt, preset, dtype, sources, tokenizer_dir, tmp_path):
    config = load_model_config(preset)
    start = with_tokenizer(sources[preset], tokenizer_dir, tmp_path / "start")
    if fmt == "original":
        assert convert("from-hf", start, tmp_path / "first") == 0
        start = tmp_path / "original"
        assert convert("to-hf", tmp_path / "first", start, "--format", fmt) == 0
    tensors = {key: value.to(dtype) for key, value in saved_tensors(start).items()}
    if fmt == "original":  # what the released models never run has values of its own there
        tensors |= {row.key: torch.randn(row.shape).to(dtype) for row in unused_parameters(config)}
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    assert convert("from-hf", start, tmp_path / "megavl") == 0
    assert convert("to-hf", tmp_path / "megavl", tmp_path / "back", "--format", fmt) == 0
    before, after = stored(start), stored(tmp_path / "back")
    assert before == after
    assert {key: tuple(shape) for key, (_, shape, _) in after.items()} == key_shapes(config, fmt)


def without_image_token(text):
    vocabulary = json.loads(text)
    vocabulary["model"]["vocab"].pop(IMAGE, None)
    vocabulary["added_tokens"] = [entry for entry in vocabulary["added_tokens"] if entry["content"] != IMAGE]
    return json.dumps(vocabulary)


DAMAGE = {
    "no image token": (without_image_token, f"token '{IMAGE}' is not in it"),
    "cut": (lambda text: text[: len(text) // 2], "tokenizer.json"),
    "no tokenizer": (None, "tokenizer.json: no such file"),
    # The original format has the id nowhere else.
    "another id": (lambda text: text.replace('"id": 3,', '"id": 7,', 1), f"{IMAGE} has id 7"),
}


@pytest.mark.parametrize(
    ("fmt", "damage"), [(fmt, name) for fmt in FORMATS for name in DAMAGE if (fmt, name) != ("original", "another id")]
)
def test_a_tokenizer_that_does_not_fit_is_refused(fmt, damage, native, tmp_path, capsys):
    folder, (change, message) = native, DAMAGE[damage]
    if fmt == "original":
        folder = tmp_path / "original"
        assert convert("from-hf", native, tmp_path / "first") == 0
        assert convert("to-hf", tmp_path / "first", folder, "--format", fmt) == 0
    path = folder / "tokenizer.json"
    text = path.read_text()
    path.unlink()
    if change is not None:
        path.write_text(change(text))
    capsys.readouterr()
    assert convert("from-hf", folder, tmp_path / "out") == 4
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert str(folder) in shown and message in shown
    assert not (tmp_path / "out").exists()
