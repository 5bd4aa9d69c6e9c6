"""Native format: what transformers saved is read, and what is written runs in transformers bit for bit alike."""

import dataclasses
import json
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridForConditionalGeneration,
)

from megavl.config.load import load_model_config
from megavl.config.presets import IMAGE_PRESETS
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config
from megavl.convert.hf_write import write_hf
from megavl.convert.open_weights import open_weights
from megavl.convert.table import NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED
from megavl.convert.verify import compare
from megavl.weights.canonical_names import canonical_shapes
from megavl.weights.lazy import LazyTensor
from tests.unit.convert.saved_tensors import saved_tensors

PRESETS = ("tiny-hybrid", "tiny-siglip")
CLASSES = {"tiny-hybrid": DeepseekVLHybridForConditionalGeneration, "tiny-siglip": DeepseekVLForConditionalGeneration}
PREFIXES = (NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED)


def view(folder):
    config, fmt = read_config(folder)
    return config, canonical_tensors(open_hf_tensors(folder), config=config, fmt=fmt)


def export(source, out, tokenizer_dir, **options):
    config, tensors = view(source)
    return write_hf(out, config=config, tensors=tensors, fmt="native", tokenizer_dir=tokenizer_dir, **options)


def load(folder, cls):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def logits(model, preset):
    config, generator = load_model_config(preset), torch.Generator().manual_seed(1)
    low, high = config.siglip.image_size, config.canvas_size
    ids = torch.randint(4, config.llm.vocab_size, (2, config.image_tokens + 24), generator=generator)
    ids[:, 5 : 5 + config.image_tokens] = config.image_token_id
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, low, low, generator=generator)}
    if preset == "tiny-hybrid":
        inputs["high_res_pixel_values"] = torch.randn(2, 3, high, high, generator=generator)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def exports(sources, tokenizer_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {name: export(sources[name], root / name, tokenizer_dir) for name in PRESETS}


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_are_those_of_the_preset(sources, preset):
    assert read_config(sources[preset]) == (load_model_config(preset), "native")


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_have_the_announced_shapes(sources, preset):
    config, fmt = read_config(sources[preset])
    tensors = canonical_tensors(open_hf_tensors(sources[preset]), config=config, fmt=fmt)
    assert {name: tuple(tensor.load().shape) for name, tensor in tensors.items()} == canonical_shapes(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_export_gives_bit_equal_logits(sources, exports, preset):
    before, after = (logits(load(folder, CLASSES[preset]), preset) for folder in (sources[preset], exports[preset]))
    assert before.std() > 0.1
    assert torch.equal(before, after)


@pytest.mark.parametrize("preset", PRESETS)
def test_export_is_read_back_bitwise(sources, exports, preset):
    assert read_config(exports[preset]) == read_config(sources[preset])
    verdict = compare(open_weights(sources[preset]), open_weights(exports[preset]))
    assert verdict.identical and verdict.compared == len(canonical_shapes(load_model_config(preset)))
    written, saved = load_file(exports[preset] / "model.safetensors"), saved_tensors(sources[preset])
    assert written.keys() == saved.keys() and all(torch.equal(written[key], saved[key]) for key in saved)


@pytest.mark.parametrize("preset", PRESETS)
def test_auto_classes_load_the_export_and_answer(exports, tokenizer_dir, preset):
    model = load(exports[preset], AutoModelForImageTextToText)
    assert type(model) is CLASSES[preset]
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)
    assert model.generation_config.pad_token_id == 2
    processor = AutoProcessor.from_pretrained(exports[preset])
    # No token may be added on loading: it would get an id of its own.
    assert len(processor.tokenizer) == Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    assert processor.tokenizer.image_token_id == 3
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("natural language.\n\nUser: <image_placeholder>Which colour?\n\nAssistant:")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    inputs = processor(text=prompt, images=[picture], return_tensors="pt")
    geometry = IMAGE_PRESETS[preset]
    assert inputs["input_ids"][0, 0] == 0 and int((inputs["input_ids"] == 3).sum()) == geometry.tokens
    assert inputs["pixel_values"].shape == (1, 3, geometry.low_size, geometry.low_size)
    if preset == "tiny-hybrid":
        assert inputs["high_res_pixel_values"].shape == (1, 3, geometry.canvas_size, geometry.canvas_size)
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_tokenizer_puts_bos_first_by_itself(sources, exports, tokenizer_dir, tmp_path):
    """transformers 5 looks for BOS in tokenizer.json alone; nothing else of the file changes."""
    given, written = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tokenizer_dir, exports[PRESETS[0]])
    )
    assert given["post_processor"] is None and {**written, "post_processor": None} == given
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (tokenizer_dir, exports[PRESETS[0]]))
    text = "which colour?"
    assert after.encode(text).ids == [0, *before.encode(text).ids]
    assert after.encode(text, text).tokens == ["<｜begin▁of▁sentence｜>", *before.encode(text).tokens] * 2
    # The same template that transformers 4 makes.
    loaded = AutoTokenizer.from_pretrained(exports[PRESETS[0]]).backend_tokenizer
    assert json.loads(loaded.to_str())["post_processor"] == written["post_processor"]
    # A tokenizer that does so already is copied byte for byte, and so is one that is to put nothing first.
    again = export(sources[PRESETS[0]], tmp_path / "again", exports[PRESETS[0]])
    assert (again / "tokenizer.json").read_bytes() == (exports[PRESETS[0]] / "tokenizer.json").read_bytes()
    plain = tmp_path / "plain"
    plain.mkdir()
    config = {**json.loads((tokenizer_dir / "tokenizer_config.json").read_text()), "add_bos_token": False}
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    (plain / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    out = export(sources[PRESETS[0]], tmp_path / "out", plain)
    assert (out / "tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_configuration_states_what_loaders_guess_wrongly(exports):
    config = json.loads((exports["tiny-hybrid"] / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["tie_word_embeddings"] is False and text["tie_word_embeddings"] is False
    assert text["rope_theta"] == 10000.0 and "rope_parameters" not in text
    assert (vision["hidden_act"], vision["vision_use_head"], vision["layer_norm_eps"]) == ("gelu", False, 1e-6)
    processor = json.loads((exports["tiny-hybrid"] / "preprocessor_config.json").read_text())
    assert (processor["resample"], processor["high_res_resample"]) == (2, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_option(sources, tokenizer_dir, tmp_path, dtype):
    out = export(sources["tiny-siglip"], tmp_path / "out", tokenizer_dir, dtype=dtype)
    expected = saved_tensors(sources["tiny-siglip"])
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[key], value.to(getattr(torch, dtype))) for key, value in expected.items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == dtype


def test_sharded_export_loads_in_transformers(sources, tokenizer_dir, tmp_path):
    out = export(sources["tiny-hybrid"], tmp_path / "out", tokenizer_dir, max_shard_bytes=700_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3 and sorted(set(index["weight_map"].values())) == shards
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert all((out / shard).stat().st_size < 750_000 for shard in shards)
    tensors = load_file(sources["tiny-hybrid"] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert compare(open_weights(sources["tiny-hybrid"]), open_weights(out)).identical
    load(out, AutoModelForImageTextToText)


def test_one_parameter_is_in_memory_at_a_time(sources, tokenizer_dir, tmp_path):
    config, tensors = view(sources["tiny-siglip"])
    living = weakref.WeakSet()

    def load(inner):
        assert not living
        tensor = inner.load().clone()
        living.add(tensor)
        return tensor

    watched = {name: dataclasses.replace(t, load=partial(load, t)) for name, t in tensors.items()}
    for fmt in ("native", "original"):
        out = write_hf(tmp_path / fmt, config=config, tensors=watched, fmt=fmt, tokenizer_dir=tokenizer_dir)
        assert compare(tensors, open_weights(out)).identical


def test_mixed_types_are_kept_and_aligned(sources, tokenizer_dir, tmp_path):
    config, tensors = view(sources["tiny-hybrid"])
    alpha = "vision.sam.hd_alpha_downsamples"
    mixed = {
        name: LazyTensor.of(tensor.load().to(torch.float32 if "sam" in name else torch.bfloat16))
        for name, tensor in tensors.items()
    }
    mixed[alpha] = LazyTensor.of(mixed[alpha].load().half())
    out = write_hf(tmp_path / "out", config=config, tensors=mixed, fmt="native", tokenizer_dir=tokenizer_dir)
    again = open_weights(out)
    assert compare(mixed, again).identical
    assert {name: tensor.dtype for name, tensor in again.items()} == {n: t.dtype for n, t in mixed.items()}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("prefix", PREFIXES)
def test_siglip_names_are_read_nested_or_not(sources, tmp_path, prefix):
    renamed = saved_tensors(sources["tiny-hybrid"], prefix)
    assert {f"{prefix}embeddings.patch_embedding.bias", f"{prefix}post_layernorm.bias"} <= renamed.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources["tiny-hybrid"] / "config.json").read_bytes())
    assert compare(open_weights(sources["tiny-hybrid"]), open_weights(tmp_path)).identical


@pytest.mark.parametrize("prefix", PREFIXES)
def test_attention_pool_and_derived_buffers_are_ignored(sources, tmp_path, prefix):
    tensors = saved_tensors(sources["tiny-siglip"], prefix)
    tensors[f"{prefix}head.probe"] = torch.zeros(1, 1, 64)
    tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((sources["tiny-siglip"] / "config.json").read_bytes())
    assert compare(open_weights(sources["tiny-siglip"]), open_weights(tmp_path)).identical


def test_newer_rotary_field_is_read(sources, tmp_path):
    config = json.loads((sources["tiny-siglip"] / "config.json").read_text())
    config["text_config"].pop("rope_theta", None)
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path)[0].llm.rope_theta == 5000.0
