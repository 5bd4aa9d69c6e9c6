"""`megavl convert init`: the parts compute what their sources compute, whatever layout they come in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from megavl.checkpoint.reader import open_model_tensors, resolve
from megavl.config.load import load_model_config
from megavl.convert.safetensors_in import SafetensorsFile
from megavl.convert.verify import compare
from megavl.convert.weight_files import open_file
from megavl.data.batch import make_batch
from megavl.generate.open_model import find_model, loaded
from megavl.main.cli import main
from megavl.model.adaptor import build_adaptor
from megavl.weights.canonical_names import canonical_shapes
from tests.unit.convert import public_models

TOLERANCE = 1e-5
NEW = ("vision.adaptor.", "vision.sam.downsamples.")


@pytest.fixture(scope="module")
def public(tokenizer_dir, tmp_path_factory):
    return public_models.build(tmp_path_factory.mktemp("public"), tokenizer_dir)


def init(public, out, *options, llm="safetensors", siglip="transformers", sam="transformers", preset="tiny-hybrid"):
    words = ["--llm", public.llm_paths[llm], "--siglip", public.siglip_paths[siglip], "--preset", preset, *options]
    if sam is not None:
        words += ["--sam", public.sam_paths[sam]]
    return main(["convert", "init", *map(str, words), str(out)])


@pytest.fixture(scope="module")
def start(public, tmp_path_factory):
    """A checkpoint in float32 of the tiny hybrid model."""
    out = tmp_path_factory.mktemp("start") / "hybrid"
    assert init(public, out, "--dtype", "float32") == 0
    return out


def weights(out):
    return open_model_tensors(out)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_parts_compute_what_their_sources_compute(public, start, report_table):
    config, generator = load_model_config("tiny-hybrid"), torch.Generator().manual_seed(1)
    low = torch.randn(2, 3, config.siglip.image_size, config.siglip.image_size, generator=generator)
    high = torch.randn(2, 3, config.sam.image_size, config.sam.image_size, generator=generator)
    ids = torch.randint(4, config.llm.vocab_size, (1, 40), generator=generator)
    necks = {}
    with loaded(find_model(start), dtype="float32") as model:
        tower = model.vision.sam
        for name in ("neck", "neck_hd"):
            getattr(tower, name).register_forward_hook(lambda module, args, out, name=name: necks.update({name: out}))
        found = {"siglip": model.vision.siglip(low)}
        with_detail = tower(high)
        tower.neck_hd.apply(lambda module: [nn.init.zeros_(parameter) for parameter in module.parameters(False)])
        without = tower(high)
        found["llm"] = model.logits(make_batch(ids[0]))[None]
    found["sam"] = necks["neck"]
    expected = {
        "siglip": public.siglip.vision_model(low).last_hidden_state,
        "sam": public.sam.vision_encoder(high).last_hidden_state,
        "llm": public.llm(ids).logits,
    }
    errors = {name: relative(found[name], expected[name]) for name in expected}
    report_table(
        *[[name, "against its source in transformers, relative", error, TOLERANCE] for name, error in errors.items()]
    )
    assert all(value.std() > 0.1 for value in expected.values())
    assert all(error < TOLERANCE for error in errors.values())
    # The HD branch starts silent.
    assert torch.equal(with_detail, without)


LAYOUTS = [
    ("bin", "transformers without prefix", "segment-anything"),
    ("safetensors", "timm", "transformers"),
    ("bin", "open_clip", "segment-anything"),
]


@pytest.mark.parametrize(("llm", "siglip", "sam"), LAYOUTS)
def test_every_layout_gives_the_same_checkpoint(public, start, tmp_path, llm, siglip, sam):
    assert init(public, tmp_path / "out", "--dtype", "float32", llm=llm, siglip=siglip, sam=sam) == 0
    verdict = compare(weights(start), weights(tmp_path / "out"))
    assert verdict.identical and verdict.compared == len(canonical_shapes(load_model_config("tiny-hybrid")))
    pools = [open_file(resolve(out) / "passthrough.safetensors") for out in (start, tmp_path / "out")]
    assert len(pools[0]) == 13 and compare(*pools).identical


def test_model_without_sam_is_complete(public, tmp_path, capsys):
    assert init(public, tmp_path / "out", sam=None, preset="tiny-siglip") == 0
    assert {name: tuple(tensor.shape) for name, tensor in weights(tmp_path / "out").items()} == canonical_shapes(
        load_model_config("tiny-siglip")
    )
    rows = [line[:20].strip() for line in capsys.readouterr().out.splitlines()]
    assert rows[:5] == ["from", "llm", "siglip", "random, seed 0", "total"]


def test_adaptor_of_an_ablation_is_initialised(public, tmp_path, capsys):
    options = ("--adaptor", "separate_mlp", "--adaptor-depth", "3")
    assert init(public, tmp_path / "out", *options) == 0
    config = load_model_config("tiny-hybrid", adaptor={"kind": "separate_mlp", "depth": 3})
    source = find_model(tmp_path / "out")
    assert source.config == config
    assert {name: tuple(tensor.shape) for name, tensor in source.tensors.items()} == canonical_shapes(config)
    assert init(public, tmp_path / "no", "--adaptor", "linear", "--adaptor-depth", "1") == 2
    assert "model.adaptor.kind: linear" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_table_and_origins_name_every_tensor(public, tmp_path, capsys):
    assert init(public, tmp_path / "out", "--seed", "7", siglip="timm", sam="segment-anything") == 0
    printed = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in printed.splitlines()}
    groups = ["llm", "siglip", "sam", "copy of SAM's neck", "random, seed 7", "zero"]
    tensors = weights(tmp_path / "out")
    counts = [sum(int(rows[group][column]) for group in groups) for column in range(3)]
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert counts == [len(tensors), parameters, 2 * parameters] == [int(cell) for cell in rows["total"]]
    assert rows["sam"][3] == str(public.sam_paths["segment-anything"])
    path = resolve(tmp_path / "out")
    origins = json.loads((path / "origins.json").read_text())
    assert origins["tensors"].keys() == set(tensors) and origins["seed"] == 7 and len(origins["unused"]) == 13
    found = origins["tensors"]
    assert found["vision.adaptor.layers.1.weight"] == found["vision.sam.downsamples.0.weight"] == "random, seed 7"
    assert found["vision.sam.hd_alpha_downsamples"] == "zero"
    assert found["vision.sam.neck_hd.2.weight"] == "copy of vision.sam.neck.2.weight"
    assert found["vision.siglip.norm.bias"] == [{"file": str(public.siglip_paths["timm"]), "tensor": "norm.bias"}]
    query = found["language_model.decoder.layers.3.self_attention.linear_qkv.weight"]
    assert [part["tensor"] for part in query] == [f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"]
    assert all(Path(part["file"]).parent == public.llm_paths["safetensors"] for part in query)
    assert main(["inspect", "--tensors", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"llm from {public.llm_paths['safetensors']}" in shown
    assert "vision.siglip.norm.bias  (64,)  bfloat16  <- timm.safetensors:norm.bias" in shown
    assert "vision.sam.hd_alpha_downsamples  (1,)  bfloat16  <- zero" in shown


def test_new_tensors_begin_as_in_a_new_model(public, start, tmp_path, report_table):
    config = load_model_config("tiny-hybrid")
    torch.manual_seed(0)
    fresh = {f"vision.adaptor.{name}": value.detach() for name, value in build_adaptor(config).named_parameters()}
    channels = config.sam.neck_channels
    for index, layer in enumerate((nn.Conv2d(channels, 2 * channels, 3), nn.Conv2d(2 * channels, 4 * channels, 3))):
        fresh[f"vision.sam.downsamples.{index}.weight"] = layer.weight.detach()
    made = {name: tensor.load() for name, tensor in weights(start).items() if name.startswith(NEW)}
    assert made.keys() == fresh.keys()
    rows = []
    for name, reference in fresh.items():
        fan_in = math.prod(fresh[name.replace(".bias", ".weight")].shape[1:])
        bound, count = 1 / math.sqrt(fan_in), reference.numel()
        for values in (made[name], reference):
            assert float(values.abs().max()) <= bound
            # Mean and standard deviation of a uniform distribution, within five standard errors.
            assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * count)
            assert abs(float(values.std()) * math.sqrt(3) / bound - 1) < 5 * math.sqrt(0.2 / count) + 1 / count
        rows.append([name, float(made[name].std()), float(reference.std())])
    report_table(["new tensor", "standard deviation", "of a fresh layer"], *rows)
    assert len({float(values.flatten()[0]) for values in made.values()}) == len(made)


def test_new_tensors_depend_on_the_seed_alone(public, start, tmp_path):
    assert init(public, tmp_path / "same", "--dtype", "float32", llm="bin", siglip="timm") == 0
    assert init(public, tmp_path / "other", "--dtype", "float32", "--seed", "1") == 0
    assert compare(weights(start), weights(tmp_path / "same")).identical
    changed = {item.name for item in compare(weights(start), weights(tmp_path / "other")).different}
    assert changed == {name for name in weights(start) if name.startswith(NEW)}


def test_all_tensors_get_one_type(public, start, tmp_path):
    """Parts of one tensor may differ too: here the query of one layer."""
    folder = tmp_path / "llm"
    public.llm.save_pretrained(folder)
    for file in public.llm_paths["safetensors"].glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    state = {name: value.contiguous() for name, value in public.llm.state_dict().items()}
    state["model.layers.1.self_attn.q_proj.weight"] = state["model.layers.1.self_attn.q_proj.weight"].double()
    public_models.save_file(state, folder / "model.safetensors")
    words = ["--llm", folder, "--siglip", public.siglip_paths["timm"], "--sam", public.sam_paths["transformers"]]
    assert main(["convert", "init", *map(str, words), "--preset", "tiny-hybrid", str(tmp_path / "out")]) == 0
    for name, tensor in weights(tmp_path / "out").items():
        expected = weights(start)[name].load().bfloat16()
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor.load(), expected), name
    kept = open_file(resolve(tmp_path / "out") / "passthrough.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}


def test_attention_pool_reaches_the_original_format(public, start, tmp_path):
    assert main(["convert", "to-hf", str(start), str(tmp_path / "hf"), "--format", "original"]) == 0
    written = SafetensorsFile(tmp_path / "hf" / "model.safetensors")
    image = public_models.timm_names(dict(public.siglip.vision_model.state_dict()))
    pool = {name: value for name, value in image.items() if name.startswith("attn_pool.")}
    assert len(pool) == 13
    for name, value in pool.items():
        assert torch.equal(written.load(f"vision_model.vision_tower_low.vision_tower.{name}"), value), name


def test_source_without_attention_pool_is_accepted(public, start, tmp_path):
    image = public_models.timm_names(dict(public.siglip.vision_model.state_dict()))
    alone = {name: value.contiguous() for name, value in image.items() if not name.startswith("attn_pool.")}
    public_models.save_file(alone, tmp_path / "towers.safetensors")
    public.siglip_paths["without a pool"] = tmp_path / "towers.safetensors"
    assert init(public, tmp_path / "out", "--dtype", "float32", siglip="without a pool") == 0
    assert compare(weights(start), weights(tmp_path / "out")).identical
    assert not (resolve(tmp_path / "out") / "passthrough.safetensors").exists()
