"""The weight tables: complete, of the published sizes, and exact in both directions."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from launch.bench.engines.random_models import name_in
from megavl.config.load import load_model_config
from megavl.convert import native_format
from megavl.convert.table import FORMATS, key_shapes, unused_parameters, weight_rows
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.convert.transforms import InterleaveHeads, StackRows
from megavl.weights.canonical_names import canonical_shapes

PRESETS = ("1b", "7b", "tiny-siglip", "tiny-hybrid")
PUBLISHED = {
    ("7b", "original"): (775, 7_343_990_017),
    ("7b", "native"): (854, 7_331_390_721),
    ("1b", "original"): (529, 1_975_235_584),
    ("1b", "native"): (612, 1_962_640_384),
}


@pytest.mark.parametrize(("preset", "fmt"), PUBLISHED)
def test_tensor_and_parameter_counts_are_the_published_ones(preset, fmt):
    shapes = key_shapes(load_model_config(preset), fmt)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == PUBLISHED[preset, fmt]


def test_unused_parameters_have_the_published_sizes():
    pool = sum(math.prod(row.shape) for row in unused_parameters(load_model_config("1b")))
    everything = sum(math.prod(row.shape) for row in unused_parameters(load_model_config("7b")))
    assert (pool, everything - pool) == (12_595_200, 4_096)


@pytest.mark.parametrize("preset", PRESETS)
def test_native_table_equals_the_state_dict_of_transformers(preset, tmp_path):
    config = load_model_config(preset)
    raw = native_format.side_files(config, ids=TokenizerIds(bos=0, eos=1, pad=1, image=3), dtype="float32")
    hf_config = AutoConfig.for_model(**raw["config.json"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(hf_config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name_in(model, key): shape for key, shape in key_shapes(config, "native").items()} == expected


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("preset", ("tiny-siglip", "tiny-hybrid"))
def test_every_row_inverts_exactly(preset, fmt):
    for row in weight_rows(load_model_config(preset), fmt):
        tensor = torch.randn(row.shape)
        parts = row.transform.from_canonical(tensor)
        assert [tuple(part.shape) for part in parts] == list(row.key_shapes.values()), row.name
        assert torch.equal(row.transform.to_canonical(parts), tensor), row.name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_key_belongs_to_one_row(preset, fmt):
    rows = weight_rows(load_model_config(preset), fmt)
    keys = [key for row in rows for key in row.keys]
    assert len(keys) == len(set(keys))
    assert {row.name: row.shape for row in rows} == canonical_shapes(load_model_config(preset))


def test_attention_rows_are_interleaved_by_head():
    q, k, v = (torch.full((4, 4), value) + torch.arange(4.0).unsqueeze(1) for value in (0.0, 10.0, 20.0))
    tensor = InterleaveHeads(2).to_canonical([q, k, v])
    assert tensor[:, 0].tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_gate_rows_stand_before_up_rows():
    tensor = StackRows(2).to_canonical([torch.zeros(3, 2), torch.ones(3, 2)])
    assert tensor[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_synthesised_parameters_are_zero_but_norm_scales():
    tensors = {row.key: row.synthesise(torch.bfloat16) for row in unused_parameters(load_model_config("tiny-hybrid"))}
    ones = {key for key, tensor in tensors.items() if bool((tensor == 1).all())}
    assert ones == {
        "vision_model.vision_tower_low.vision_tower.attn_pool.norm.weight",
        "vision_model.high_layer_norm.weight",
        "vision_model.low_layer_norm.weight",
    }
    assert all(not tensor.any() for key, tensor in tensors.items() if key not in ones)
