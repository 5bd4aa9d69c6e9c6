"""Adaptors in the two formats: there and back bitwise where a format holds them, one message where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.reader import load_model_config as config_of_checkpoint
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.adaptor import ADAPTORS
from megavl.config.errors import CheckpointError, UsageError
from megavl.config.identity import with_own_preset
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.convert.adaptors import ORIGINAL
from megavl.convert.hf_read import read_config
from megavl.convert.open_weights import open_weights
from megavl.convert.original_format import side_files
from megavl.convert.table import FORMATS, key_shapes, weight_rows
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.convert.verify import compare
from megavl.main.cli import main

IDS = TokenizerIds(bos=0, eos=1, pad=1, image=3)
EVEN = {"siglip": {"image_size": 96}, "sam": {"image_size": 256}}
CASES = [(kind, depth) for kind, row in ADAPTORS.items() for depth in ((1,) if row.one_layer else (1, 2, 3))]


def config_of(kind: str, depth: int) -> ModelConfig:
    adaptor = {"kind": kind, "depth": depth}
    return with_own_preset(
        load_model_config("tiny-hybrid", **EVEN, adaptor=adaptor)
        if ADAPTORS[kind].both_towers
        else load_model_config("tiny-siglip", adaptor=adaptor)
    )


def holds(fmt: str, kind: str, depth: int) -> bool:
    """SPEC: the original format holds the released kinds at any depth, native the two released models' alone."""
    if fmt == "original":
        return kind in ("linear", "mlp_gelu", "low_high_hybrid_split_mlp_gelu", "shared_linear", "shared_mlp")
    return (kind, depth) in (("mlp_gelu", 2), ("low_high_hybrid_split_mlp_gelu", 2))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Any:
    def write(config: ModelConfig) -> Path:
        files = {f"tokenizer/{path.name}": path for path in tokenizer_dir.iterdir()}
        out = tmp_path_factory.mktemp("checkpoint")
        return write_model_checkpoint(out, config=config, tensors=random_weights(config), files=files)

    return write


@pytest.mark.parametrize(("kind", "depth"), [case for case in CASES if case[0] in ORIGINAL])
def test_checkpoint_to_original_and_back_is_bitwise(kind: str, depth: int, checkpoint: Any, tmp_path: Path) -> None:
    config = config_of(kind, depth)
    source, folder, back = checkpoint(config), tmp_path / "original", tmp_path / "back"
    assert main(["convert", "to-hf", str(source), str(folder), "--format", "original"]) == 0
    assert read_config(folder) == (config, "original")
    assert main(["convert", "from-hf", str(folder), str(back)]) == 0
    assert config_of_checkpoint(back / "iter_0000000") == config
    verdict = compare(open_weights(source), open_weights(back))
    assert verdict.identical and verdict.max_abs == 0.0


def test_the_original_configuration_of_a_shared_mlp() -> None:
    raw = side_files(load_model_config("7b", adaptor={"kind": "shared_mlp"}), ids=IDS, dtype="float16")["config.json"]
    assert raw["vision_config"]["params"]["concat_type"] == "feature"
    assert raw["aligner_config"]["params"] == {
        "projector_type": "mlp_gelu",
        "depth": 2,
        "input_dim": 2048,
        "n_embed": 4096,
    }
    shapes = key_shapes(load_model_config("7b", adaptor={"kind": "shared_mlp"}), "original")
    assert {key: shape for key, shape in shapes.items() if key.startswith("aligner.")} == {
        "aligner.layers.0.weight": (4096, 2048),
        "aligner.layers.0.bias": (4096,),
        "aligner.layers.2.weight": (4096, 4096),
        "aligner.layers.2.bias": (4096,),
    }


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("kind", "depth"), CASES)
def test_every_kind_is_held_or_refused(fmt: Any, kind: str, depth: int) -> None:
    config = config_of(kind, depth)
    if holds(fmt, kind, depth):
        assert weight_rows(config, fmt)
        return
    with pytest.raises(UsageError) as caught:
        weight_rows(config, fmt)
    message = str(caught.value)
    assert f"model.adaptor: the {fmt} format has no place for kind {kind} of depth {depth}" in message
    remedy = "use the original format" if holds("original", kind, depth) else "keep the MegaVL checkpoint"
    assert message.endswith(remedy) or f"{remedy}," in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "fmt", "words"),
    [
        ("shared_mlp", "native", "the native format has no place for kind shared_mlp of depth 2"),
        ("separate_mlp", "native", "the native format has no place for kind separate_mlp of depth 2"),
        ("separate_mlp", "original", "the original format has no place for kind separate_mlp of depth 2"),
        ("token_pooling_width", "original", "the original format has no place for kind token_pooling_width of depth 2"),
        ("token_pooling_height", "native", "the native format has no place for kind token_pooling_height of depth 2"),
    ],
)
def test_refused_export_writes_nothing(
    kind: str, fmt: str, words: str, checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-hf", str(checkpoint(config_of(kind, 2))), str(tmp_path / "out"), "--format", fmt]) == 2
    message = capsys.readouterr().err.strip()
    assert words in message and message.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("concat_type", ["tuple", None])
def test_absent_fields_get_the_defaults_of_the_release(
    concat_type: str | None, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Towers are joined as a tuple, a projector has one layer, and a linear one has one whatever its depth says."""
    raw = side_files(load_model_config("7b"), ids=IDS, dtype="float16")["config.json"]
    raw["vision_config"]["params"]["concat_type"] = concat_type
    del raw["aligner_config"]["params"]["depth"]
    assert _read(raw, tokenizer_dir, tmp_path).adaptor.kind == "low_high_hybrid_split_mlp_gelu"
    assert _read(raw, tokenizer_dir, tmp_path).adaptor.depth == 1
    raw = side_files(load_model_config("1b"), ids=IDS, dtype="float16")["config.json"]
    raw["aligner_config"]["params"].update(projector_type="linear", depth=2)
    adaptor = _read(raw, tokenizer_dir, tmp_path).adaptor
    assert (adaptor.kind, adaptor.depth) == ("linear", 1)


@pytest.mark.parametrize(
    ("preset", "changes", "place", "words"),
    [
        (
            "7b",
            {"concat_type": "sequence"},
            "vision_config.params.concat_type",
            "'tuple' or 'feature', found 'sequence'",
        ),
        ("7b", {"concat_type": "add"}, "vision_config.params.concat_type", "found 'add'"),
        ("7b", {"concat_type": ["tuple"]}, "vision_config.params.concat_type", "found ['tuple']"),
        ("7b", {"concat_type": "feature"}, "aligner_config.params.projector_type", "concat_type 'feature'"),
        ("7b", {"projector_type": "mlp_gelu"}, "aligner_config.params.projector_type", "concat_type 'tuple'"),
        ("7b", {"projector_type": "identity"}, "aligner_config.params.projector_type", "found 'identity'"),
        ("7b", {"projector_type": None}, "aligner_config.params.projector_type", "found None"),
        (
            "1b",
            {"projector_type": "mlp"},
            "aligner_config.params.projector_type",
            "linear or mlp_gelu behind one tower",
        ),
        ("1b", {"projector_type": {}}, "aligner_config.params.projector_type", "found {}"),
        ("1b", {"depth": 0}, "aligner_config.params.depth", "a whole number from 1"),
        (
            "7b",
            {"concat_type": "feature", "projector_type": "mlp_gelu"},
            "aligner_config.params.input_dim",
            "MegaVL has 2048 only, found 1024",
        ),
    ],
)
def test_unknown_adaptor_names_file_and_field(
    preset: str, changes: dict[str, Any], place: str, words: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    raw = side_files(load_model_config(preset), ids=IDS, dtype="float16")["config.json"]
    for name, value in changes.items():
        raw["vision_config" if name == "concat_type" else "aligner_config"]["params"][name] = value
    with pytest.raises(CheckpointError) as caught:
        _read(raw, tokenizer_dir, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.json: {place}: ") and words in message, message
    assert "\n" not in message


def _read(raw: dict[str, Any], tokenizer_dir: Path, folder: Path) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    return read_config(folder)[0]
