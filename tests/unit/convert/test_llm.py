"""`megavl convert to-hf --format llm`: the decoder alone, as any client of language models opens it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megavl.checkpoint.reader import open_model_tensors
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from megavl.convert.hf_read import read_config
from megavl.convert.verify import compare
from megavl.data.tokenizer import open_tokenizer
from megavl.generate.pretrained import Processor
from megavl.main.cli import main
from tests.unit.convert import public_models

PRESET = "tiny-siglip"
TEXTS = ("The quick brown fox", "User: which colour?\n\nAssistant:", "  café 你好 <|x|>")


def convert(*words):
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def checkpoint(sources, tokenizer_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("llm")
    native = shutil.copytree(sources[PRESET], root / "native")
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, native)
    assert convert("from-hf", native, root / "checkpoint") == 0
    return root / "checkpoint"


@pytest.fixture(scope="module")
def folder(checkpoint):
    out = checkpoint.parent / "llm"
    assert convert("to-hf", checkpoint, out, "--format", "llm") == 0
    return out


@pytest.fixture(scope="module")
def public(tokenizer_dir, tmp_path_factory):
    return public_models.build(tmp_path_factory.mktemp("public"), tokenizer_dir)


def test_weights_are_those_of_the_native_export(checkpoint, folder, tmp_path):
    assert convert("to-hf", checkpoint, tmp_path / "native", "--format", "native") == 0
    native = load_file(tmp_path / "native" / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    names = {name: name.replace("model.", "model.language_model.", 1) for name in found if name != "lm_head.weight"}
    assert len(found) == sum("language_model" in name for name in native) + 1
    assert torch.equal(found["lm_head.weight"], native["lm_head.weight"])
    assert all(torch.equal(found[name], native[theirs]) for name, theirs in names.items())


def test_transformers_opens_every_file(checkpoint, folder, tokenizer_dir, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info.values())
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 1, 2)
    assert convert("to-hf", checkpoint, tmp_path / "native", "--format", "native") == 0
    ours, whole = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "native"))
    assert [ours(text)["input_ids"] for text in TEXTS] == [whole(text)["input_ids"] for text in TEXTS]
    # Under a class of LLaMA some releases of transformers 5 would split the text at blanks.
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    config = json.loads((folder / "config.json").read_text())
    assert "vision_config" not in config
    assert config["vocab_size"] == 1024


def test_chats_have_the_ids_of_generate(checkpoint, folder, tmp_path):
    """Clients of language models tokenize a chat without special tokens, so its template writes BOS."""
    native = tmp_path / "native"
    assert convert("to-hf", checkpoint, native, "--format", "native") == 0
    templates = [(path / "chat_template.jinja").read_text() for path in (folder, native)]
    assert templates[0] == "{{- bos_token -}}\n" + templates[1]
    tokenizer, processor = (
        AutoTokenizer.from_pretrained(folder),
        Processor(read_config(native)[0], open_tokenizer(native)),
    )
    for text in ("Hello", "  café 你好 <|x|>", "two\n\nlines"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == list(processor(text).ids)
        assert ids.count(tokenizer.bos_token_id) == 1


def test_start_weights_take_the_decoder_back(checkpoint, folder, public, tmp_path):
    words = ("--llm", folder, "--siglip", public.siglip_paths["transformers"], "--preset", PRESET, "--dtype", "float32")
    assert convert("init", *words, tmp_path / "start") == 0
    before, after = (
        {name: tensor for name, tensor in open_model_tensors(path).items() if name.startswith("language_model.")}
        for path in (checkpoint, tmp_path / "start")
    )
    assert compare(before, after).identical


def test_logits_equal_those_of_transformers(folder, tmp_path, capsys, report_table):
    assert convert("verify", folder, "--against", "transformers", "--json", tmp_path / "report.json") == 0
    first, verdict = capsys.readouterr().out.splitlines()
    assert first.startswith("text, ")
    assert first.endswith(", the same")
    assert "LlamaForCausalLM" in verdict
    report_table(verdict)
    assert json.loads((tmp_path / "report.json").read_text())["max_rel_diff"] <= 1e-5


def test_changed_weight_fails_the_comparison(checkpoint, folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert convert("verify", checkpoint, other, "--against", "transformers") == 4
    printed = capsys.readouterr().out
    assert "NOT within" in printed
    assert "text, " in printed


@pytest.mark.parametrize("command", ["generate", "evaluate", "from-hf"])
def test_decoder_alone_is_no_whole_model(command, folder, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps({"id": "1", "text": "a"}))
    words = {
        "generate": ["generate", folder, "--prompt", "Hello"],
        "evaluate": ["evaluate", folder, task],
        "from-hf": ["convert", "from-hf", folder, tmp_path / "out"],
    }[command]
    assert main(list(map(str, words))) == 4
    assert "`megavl convert init --llm` makes start weights" in capsys.readouterr().err


def test_any_adaptor_leaves_the_decoder_exportable(public, tmp_path):
    paths = ("--llm", public.llm_paths["safetensors"], "--siglip", public.siglip_paths["timm"])
    more = ("--sam", public.sam_paths["transformers"], "--preset", "tiny-hybrid", "--adaptor", "separate_mlp")
    assert convert("init", *paths, *more, tmp_path / "start") == 0
    assert convert("to-hf", tmp_path / "start", tmp_path / "native", "--format", "native") == 2
    assert convert("to-hf", tmp_path / "start", tmp_path / "llm", "--format", "llm", "--dtype", "float32") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "llm").dtype == torch.float32


def test_checkpoint_without_a_decoder_is_refused(tokenizer_dir, checkpoint, tmp_path, capsys):
    config = load_model_config(PRESET)
    towers = {name: one for name, one in open_model_tensors(checkpoint).items() if name.startswith("vision.")}
    files = {f"tokenizer/{path.name}": path for path in tokenizer_dir.iterdir()}
    pairs = ((name, tensor.load()) for name, tensor in towers.items())
    try:
        write_model_checkpoint(tmp_path / "towers", config=config, tensors=pairs, files=files)
    except ValueError as error:
        assert "language_model" in str(error)
        return
    assert convert("to-hf", tmp_path / "towers", tmp_path / "out", "--format", "llm") == 4
    assert "no tensor 'language_model." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
