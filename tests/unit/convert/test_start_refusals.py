"""`megavl convert init` with sources that do not fit, are damaged or hostile: one message, its exit code, no file."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megavl.convert.open_weights import open_weights
from megavl.main.cli import main
from tests.unit.convert import public_models


@pytest.fixture(scope="module")
def public(tokenizer_dir, tmp_path_factory):
    return public_models.build(tmp_path_factory.mktemp("public"), tokenizer_dir)


@pytest.fixture
def parts(public, tmp_path):
    """Private copies: a folder of the language model, a safetensors file of SigLIP, an archive of SAM."""
    llm = shutil.copytree(public.llm_paths["bin"], tmp_path / "llm")
    siglip = shutil.copy(public.siglip_paths["timm"], tmp_path / "siglip.safetensors")
    sam = shutil.copy(public.sam_paths["segment-anything"], tmp_path / "sam.pth")
    return {"--llm": llm, "--siglip": siglip, "--sam": sam, "--preset": "tiny-hybrid"}


@pytest.fixture
def refusal(parts, tmp_path, capsys):
    """Run with the parts as they are now and give exit code and message."""

    def run(**changes):
        words = {**parts, **{f"--{key}": value for key, value in changes.items()}}
        options = [str(word) for pair in words.items() if pair[1] is not None for word in pair]
        before = sorted(tmp_path.rglob("*"))
        code = main(["convert", "init", *options, str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before and printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        return code, printed.err

    return run


def rewrite(path, change):
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    else:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)


def edit(path, **changes):
    raw = json.loads(path.read_text())
    for dotted, value in changes.items():
        node = raw
        *parents, last = dotted.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    path.write_text(json.dumps(raw))


FC1, QKV, HEAD = "blocks.1.mlp.fc1.weight", "image_encoder.blocks.1.attn.qkv.weight", "lm_head.weight"
ASKS = "preset tiny-hybrid asks for"


def put(name, *shape, dtype=torch.float32):
    """A change that gives a file this tensor."""
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


TENSORS = [
    ("--siglip", lambda t: t.pop(FC1), f"no tensor '{FC1}'"),
    ("--siglip", put("lora.a", 2), "unexpected tensor 'lora.a'"),
    ("--siglip", put(FC1, 64, 256), f"'{FC1}' has shape [64, 256], {ASKS} [256, 64]"),
    ("--siglip", put(FC1, 256, 64, dtype=torch.int8), f"tensor '{FC1}' is of type I8"),
    ("--siglip", put("pos_embed", 1, 16, 64), f"'pos_embed' has shape [1, 16, 64], {ASKS} [1, 9, 64]"),
    ("--siglip", lambda t: t.pop("attn_pool.kv.bias"), "no tensor 'attn_pool.kv.bias'"),
    ("--siglip", lambda t: t.pop("patch_embed.proj.weight"), "holds no SigLIP; expected are weights"),
    ("--sam", lambda t: t.pop(QKV), f"no tensor '{QKV}'"),
    ("--sam", put("image_encoder.lora.a", 2), "unexpected tensor 'image_encoder.lora.a'"),
    ("--sam", put(QKV, 192, 32), f"'{QKV}' has shape [192, 32], {ASKS} [192, 64]"),
    ("--sam", put(QKV, 192, 64, dtype=torch.int32), f"tensor '{QKV}' is of type int32"),
    ("--sam", lambda t: t.update({"epoch": 3}), "'epoch' is a int; a file of tensors by name is expected"),
    ("--sam", lambda t: t.update({"a": torch.eye(3).to_sparse()}), "'a' is a torch.sparse_coo tensor"),
    ("--sam", put("b.patch_embed.proj.weight", 2), "holds 2 SAM towers (image_encoder., b.)"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "change", "message"), TENSORS, ids=[message[:50] for _, _, message in TENSORS])
def test_tensors_that_do_not_fit_are_refused(parts, refusal, part, change, message):
    rewrite(parts[part], change)
    code, text = refusal()
    assert code == 4 and f"{parts[part]}: " in text and message in text


LLM_TENSORS = [
    (lambda t: t.pop(HEAD), "places there"),
    (put(HEAD, 1000, 128), f"'{HEAD}' has shape [1000, 128], {ASKS} [1024, 128]"),
    (put(HEAD, 1024, 128, dtype=torch.int64), f"'{HEAD}' is of type int64"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), LLM_TENSORS, ids=["missing", "misshapen", "integers"])
def test_language_model_that_does_not_fit_is_refused(parts, refusal, change, message):
    index = json.loads((parts["--llm"] / "pytorch_model.bin.index.json").read_text())
    shard = parts["--llm"] / index["weight_map"][HEAD]
    rewrite(shard, change)
    code, text = refusal()
    assert code == 4 and f"{shard}: " in text and message in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "gives num_layers 3, preset tiny-hybrid has model.llm.num_layers 4"),
        (
            {"rope_theta": 5000.0, "rope_parameters": None},
            "gives rope_theta 5000.0, preset tiny-hybrid has model.llm.rope_theta 10000.0",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}, "gives rope_theta 2.0, preset tiny-hybrid"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: MegaVL has 4 only, found 2"),
        ({"model_type": "qwen2"}, "model_type: MegaVL has 'llama' only, found 'qwen2'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: true or false is expected, found 'no'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling"),
    ],
)
def test_language_configuration_that_disagrees_is_refused(parts, refusal, changes, message):
    edit(parts["--llm"] / "config.json", **changes)
    code, text = refusal()
    assert code == 4 and f"{parts['--llm']}/config.json: " in text and message in text


def test_tied_language_model_gives_a_head(parts, tmp_path):
    edit(parts["--llm"] / "config.json", tie_word_embeddings=True)
    index = json.loads((parts["--llm"] / "pytorch_model.bin.index.json").read_text())
    rewrite(parts["--llm"] / index["weight_map"].pop(HEAD), lambda tensors: tensors.pop(HEAD))
    (parts["--llm"] / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    options = [str(word) for pair in parts.items() for word in pair]
    assert main(["convert", "init", *options, str(tmp_path / "out")]) == 0
    tensors = open_weights(tmp_path / "out")
    embedding, head = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"
    assert torch.equal(tensors[head].load(), tensors[embedding].load())


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("siglip", {"vision_config__num_attention_heads": 8}, "gives heads 8, preset tiny-hybrid has model.siglip."),
        ("siglip", {"vision_config__layer_norm_eps": 1e-5}, "gives layer_norm_eps 1e-05"),
        ("siglip", {"model_type": "clip"}, "model_type 'clip', expected siglip or siglip_vision_model"),
        ("sam", {"vision_config__num_attention_heads": 4}, "gives heads 4, preset tiny-hybrid has model.sam.heads 2"),
        ("sam", {"vision_config__global_attn_indexes": [0, 2]}, "gives global_attn_indexes (0, 2)"),
        ("sam", {"vision_config__use_rel_pos": False}, "vision_config.use_rel_pos: MegaVL has True only"),
    ],
)  # fmt: skip
def test_tower_configuration_that_disagrees_is_refused(public, refusal, tmp_path, part, changes, message):
    folder = shutil.copytree(getattr(public, f"{part}_paths")["transformers"], tmp_path / part)
    edit(folder / "config.json", **changes)
    code, text = refusal(**{part: folder})
    assert code == 4 and f"{folder}/config.json: " in text and message in text


@pytest.mark.parametrize("part", ["siglip", "sam"])
def test_tower_configuration_that_is_no_file_is_refused(public, refusal, tmp_path, part):
    folder = shutil.copytree(getattr(public, f"{part}_paths")["transformers"], tmp_path / part)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    code, text = refusal(**{part: folder})
    assert code == 4 and f"{folder}/config.json: " in text and "a FIFO" in text


@pytest.mark.parametrize("part", ["--siglip", "--sam"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_file_is_refused(parts, refusal, part, keep):
    path = parts[part]
    path.write_bytes(path.read_bytes()[:keep])
    code, text = refusal()
    assert code == 4 and f"{path}: " in text and "fetch it again" in text


@pytest.mark.parametrize("bare", [False, True], ids=["in an archive of torch.save", "a pickle alone"])
@pytest.mark.parametrize("part", ["--llm", "--siglip", "--sam"])
def test_hostile_pickle_does_not_run(parts, refusal, tmp_path, part, bare):
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    path = {
        "--llm": parts["--llm"] / "pytorch_model.bin",
        "--siglip": tmp_path / "hostile.bin",
        "--sam": parts["--sam"],
    }[part]
    if bare:
        path.write_bytes(pickle.dumps({"a": Hostile()}))
    else:
        torch.save({"a": Hostile()}, path)
    if part == "--llm":
        (parts["--llm"] / "pytorch_model.bin.index.json").unlink()
    code, text = refusal(**({"siglip": path} if part == "--siglip" else {}))
    assert code == 4 and str(path) in text and "refused" in text
    assert bare or "refused global posix.mkdir" in text
    assert not ran.exists()


def test_archive_of_other_objects_is_refused(parts, refusal):
    torch.save([torch.ones(2)], parts["--sam"])
    code, text = refusal()
    assert code == 4 and f"{parts['--sam']}: holds a list; tensors by name are expected" in text


def test_folder_with_several_files_is_refused(parts, refusal, tmp_path):
    folder = tmp_path / "towers"
    folder.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(parts["--siglip"], folder / name)
    code, text = refusal(siglip=folder)
    assert code == 4 and "holds 2 weight files (a.safetensors, b.safetensors); name the one to read" in text
    for path in folder.iterdir():
        path.unlink()
    code, text = refusal(siglip=folder)
    assert code == 4 and f"{folder}: no weights" in text


def test_value_beyond_float16_is_refused(parts, tmp_path, capsys):
    rewrite(parts["--siglip"], lambda tensors: tensors.update({"norm.bias": torch.full((64,), 1e6)}))
    words = [str(word) for pair in parts.items() for word in pair]
    assert main(["convert", "init", *words, "--dtype", "float16", str(tmp_path / "out")]) == 4
    assert "'norm.bias' reaches 1e+06, beyond float16's 65504; choose bfloat16 or float32" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sam": None}, "--preset tiny-hybrid: the model has a SAM tower; give --sam"),
        ({"preset": "tiny-siglip"}, "--preset tiny-siglip: the model has no SAM tower; leave --sam out"),
    ],
)
def test_sam_must_match_the_preset(refusal, changes, message):
    code, text = refusal(**changes)
    assert code == 2 and message in text


def test_missing_paths_are_named(refusal, tmp_path):
    for part in ("llm", "siglip", "sam"):
        code, text = refusal(**{part: tmp_path / "nowhere"})
        assert code == 4 and f"{tmp_path / 'nowhere'}" in text and "no such file" in text


def test_existing_checkpoint_is_kept(parts, tmp_path, capsys):
    words = [str(word) for pair in parts.items() for word in pair]
    assert main(["convert", "init", *words, str(tmp_path / "out")]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert main(["convert", "init", *words, str(tmp_path / "out")]) == 4
    assert "a valid checkpoint of this iteration exists" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
