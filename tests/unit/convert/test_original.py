"""Original format: key-complete, bitwise back, unused parameters kept, and the release's partial configuration read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.config.errors import CheckpointError
from megavl.config.load import load_model_config
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config, read_unused
from megavl.convert.hf_write import write_hf
from megavl.convert.open_weights import open_weights
from megavl.convert.original_format import side_files
from megavl.convert.table import key_shapes, unused_parameters
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.convert.verify import compare
from megavl.weights.lazy import LazyTensor
from tests.unit.convert.saved_tensors import saved_tensors

PRESETS = ("tiny-hybrid", "tiny-siglip")
IDS = TokenizerIds(bos=100000, eos=100001, pad=100001, image=100015)


def opened(folder):
    config, fmt = read_config(folder)
    return config, canonical_tensors(open_hf_tensors(folder), config=config, fmt=fmt)


@pytest.fixture(scope="module")
def exports(sources, tokenizer_dir, tmp_path_factory):
    root, folders = tmp_path_factory.mktemp("original"), {}
    for name in PRESETS:
        config, tensors = opened(sources[name])
        folders[name] = write_hf(
            root / name, config=config, tensors=tensors, fmt="original", tokenizer_dir=tokenizer_dir
        )
    return folders


@pytest.mark.parametrize("preset", PRESETS)
def test_export_is_key_complete(exports, preset):
    shapes = {name: tuple(value.shape) for name, value in load_file(exports[preset] / "model.safetensors").items()}
    assert shapes == key_shapes(load_model_config(preset), "original")


@pytest.mark.parametrize("preset", PRESETS)
def test_export_is_read_back_bitwise(sources, exports, preset):
    assert read_config(exports[preset]) == (load_model_config(preset), "original")
    verdict = compare(open_weights(sources[preset]), open_weights(exports[preset]))
    assert verdict.identical and verdict.max_abs == 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_original_and_back_gives_the_native_file(sources, exports, tokenizer_dir, tmp_path, preset):
    config, tensors = opened(exports[preset])
    out = write_hf(tmp_path / "out", config=config, tensors=tensors, fmt="native", tokenizer_dir=exports[preset])
    first, last = saved_tensors(sources[preset]), load_file(out / "model.safetensors")
    assert first.keys() == last.keys() and all(torch.equal(first[key], last[key]) for key in first)
    assert (exports[preset] / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_unused_parameters_come_back_or_are_synthesised(sources, tokenizer_dir, tmp_path):
    config, tensors = opened(sources["tiny-hybrid"])
    unused = unused_parameters(config)
    kept = {row.key: torch.randn(row.shape) for row in unused[:-2]}
    options = {"config": config, "tensors": tensors, "fmt": "original", "tokenizer_dir": tokenizer_dir}
    kept_tensors = {key: LazyTensor.of(tensor) for key, tensor in kept.items()}
    out = write_hf(tmp_path / "a", **options, unused=kept_tensors)
    again = read_unused(open_hf_tensors(out), config=config, fmt="original")
    assert again.keys() == {row.key for row in unused}
    assert all(torch.equal(again[key].load(), tensor) for key, tensor in kept.items())
    assert all(torch.equal(again[row.key].load(), row.synthesise(torch.float32)) for row in unused[-2:])
    second = write_hf(tmp_path / "b", **options, unused=again)
    assert (out / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_import_needs_no_unused_parameters(exports, tmp_path):
    config, _ = read_config(exports["tiny-hybrid"])
    unused = {row.key for row in unused_parameters(config)}
    alive = {k: v for k, v in load_file(exports["tiny-hybrid"] / "model.safetensors").items() if k not in unused}
    save_file(alive, tmp_path / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((exports["tiny-hybrid"] / name).read_bytes())
    assert compare(open_weights(exports["tiny-hybrid"]), open_weights(tmp_path)).identical
    assert read_unused(open_hf_tensors(tmp_path), config=config, fmt="original") == {}


def test_unused_parameter_of_another_shape_is_refused(sources, tokenizer_dir, tmp_path):
    config, tensors = opened(sources["tiny-hybrid"])
    wrong = {"vision_model.high_layer_norm.bias": LazyTensor.of(torch.zeros(3))}
    with pytest.raises(
        CheckpointError, match=r"passthrough: tensor 'vision_model.high_layer_norm.bias' has shape \[3\]"
    ):
        write_hf(
            tmp_path / "o", config=config, tensors=tensors, fmt="original", tokenizer_dir=tokenizer_dir, unused=wrong
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_released_towers_keep_their_names(preset):
    files = side_files(load_model_config(preset), ids=IDS, dtype="float16")
    params = files["config.json"]["vision_config"]["params"]
    low = params if preset == "1b" else params["low_res_cfg"]
    assert (low["model_name"], low["select_layer"], low["image_size"]) == ("siglip_large_patch16_384", -1, 384)
    assert "width" not in low
    processor = files["preprocessor_config.json"]
    if preset == "7b":
        assert params["high_res_cfg"]["model_name"] == "sam_b_downsample" and "width" not in params["high_res_cfg"]
        assert (processor["do_normalize"], processor["background_color"]) == (False, [122, 116, 104])
        assert processor["image_size"] == 1024
    else:
        assert (processor["do_normalize"], processor["background_color"]) == (True, [127, 127, 127])
    assert files["processor_config.json"]["num_image_tokens"] == 576


def test_small_towers_get_a_name_of_their_own(exports):
    params = json.loads((exports["tiny-hybrid"] / "config.json").read_text())["vision_config"]["params"]
    config = load_model_config("tiny-hybrid")
    sam, siglip = config.sam, config.siglip
    assert params["high_res_cfg"]["model_name"] == f"sam_w{sam.width}_d{sam.depth}_downsample"
    name = f"siglip_w{siglip.width}_d{siglip.depth}_patch{siglip.patch_size}_{siglip.image_size}"
    assert params["low_res_cfg"]["model_name"] == name


@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_published_partial_language_fields_mean_llama_defaults(preset, tokenizer_dir, tmp_path):
    config = load_model_config(preset)
    raw = side_files(config, ids=IDS, dtype="float16")["config.json"]
    keep = ["model_type", "num_hidden_layers", "vocab_size", "max_position_embeddings", "torch_dtype"]
    if preset == "1b":
        keep += ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
    raw["language_config"] = {key: raw["language_config"][key] for key in keep}
    raw["auto_map"] = {"AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"content": "<image_placeholder>", "id": 100015}]})
    )
    assert read_config(tmp_path) == (config, "original")


@pytest.mark.parametrize(("select_layer", "depth"), [(-1, 24), (-2, 23), (0, 24), (5, 5), (99, 24), (None, 23)])
def test_select_layer_gives_the_depth(tokenizer_dir, tmp_path, select_layer, depth):
    raw = side_files(load_model_config("1b"), ids=IDS, dtype="float16")["config.json"]
    raw["vision_config"]["params"]["select_layer"] = select_layer
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    config, _ = read_config(tmp_path)
    assert (config.siglip.depth, config.image_token_id) == (depth, 3)
    written = side_files(config, ids=IDS, dtype="float16")["config.json"]["vision_config"]["params"]
    assert written["select_layer"] == depth - 25


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config.cls", "OtherTower"),
        ("vision_config.params.concat_type", "sequence"),
        ("vision_config.params.low_res_cfg.model_name", "siglip_so400m_patch14_384"),
        ("aligner_config.params.projector_type", "identity"),
        ("aligner_config.params.input_dim", 2048),
        ("language_config.num_key_value_heads", 8),
        ("language_config.hidden_act", "gelu"),
        ("language_config.rope_scaling", {"type": "linear", "factor": 4.0}),
        ("language_config.hidden_size", "wide"),
        ("language_config", [1]),
    ],
)
def test_unsupported_configuration_is_named(tokenizer_dir, tmp_path, path, value):
    raw = side_files(load_model_config("7b"), ids=IDS, dtype="float16")["config.json"]
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node[part]
    node[last] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match=rf"config\.json: {path}") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)
