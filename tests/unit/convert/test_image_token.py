"""A language model's tokenizer gets an image token, under the id that the model has; nothing else of it changes."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megavl.checkpoint.reader import resolve
from megavl.config.errors import DataError
from megavl.config.presets import MODELS
from megavl.convert.tokenizer_files import read_tokenizer, with_image_token
from megavl.data.tokenizer import open_tokenizer
from megavl.main.cli import main
from tests.unit.convert import public_models

IMAGE = "<image_placeholder>"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SIZE = 310
"""Entries before the image token: 295 of the BPE, then 15 added ones, as DeepSeek-LLM has 100000 and 15."""
TEXTS = ("User: which colour is the square?\n\nAssistant: red", "ø û é <b> 12345  ", "<image _placeholder>", f"{EOS}x")


@pytest.fixture
def folder(tmp_path):
    """A tokenizer of the shape of DeepSeek-LLM's, without an image token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE - 15, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["User: which colour is the square? Assistant: red, green or blue\n\n"] * 20, trainer)
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([AddedToken(f"<{number}>", normalized=True) for number in range(13)])
    assert tokenizer.get_vocab_size() == SIZE
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    return folder


def written(folder, files):
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_missing_token_becomes_the_last_one(folder):
    raw, before = (
        json.loads((folder / "tokenizer.json").read_text()),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    files, added = with_image_token(folder, image_id=SIZE)
    assert added and files["tokenizer_config.json"] == folder / "tokenizer_config.json"
    after = written(folder, files)
    assert after.get_vocab() == {**before.get_vocab(), IMAGE: SIZE}
    assert [after.encode(text).ids for text in TEXTS] == [before.encode(text).ids for text in TEXTS]
    assert after.encode(f"a{IMAGE}b").tokens == ["a", IMAGE, "b"]
    edited = json.loads((folder / "tokenizer.json").read_text())
    assert edited["added_tokens"][:-1] == raw["added_tokens"] and edited["added_tokens"][-1]["special"] is True
    assert {**edited, "added_tokens": raw["added_tokens"]} == raw
    assert read_tokenizer(folder).ids.image == open_tokenizer(folder).image_id == SIZE
    # Once it is there, the files are kept as they are.
    assert with_image_token(folder, image_id=SIZE) == ({path.name: path for path in sorted(folder.iterdir())}, False)


@pytest.mark.parametrize("image_id", [SIZE - 1, SIZE + 1, 100015])
def test_token_that_would_get_another_id_is_refused(folder, image_id):
    with pytest.raises(DataError, match=rf"next free id is {SIZE}, but the model has model.image_token_id {image_id}"):
        with_image_token(folder, image_id=image_id)


def test_token_with_another_id_is_refused(folder):
    written(folder, with_image_token(folder, image_id=SIZE)[0])
    with pytest.raises(DataError, match=rf"{IMAGE} has id {SIZE}, the model has model.image_token_id 7"):
        with_image_token(folder, image_id=7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not readable as JSON"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3}}', "bos_token|not a Hugging Face tokenizer"),
        ("tokenizer_config.json", "[", "tokenizer_config.json: not readable as JSON"),
        ("tokenizer.json", None, "tokenizer.json: no such file"),
    ],
)
def test_damaged_files_are_named(folder, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        with_image_token(folder, image_id=SIZE)


def test_start_weights_add_the_token(folder, tmp_path, monkeypatch, capsys):
    """From the command to a tokenizer that transformers loads from the export."""
    monkeypatch.setitem(MODELS["tiny-siglip"], "image_token_id", SIZE)
    public = public_models.build(tmp_path / "public", folder)
    words = ["--llm", public.llm_paths["bin"], "--siglip", public.siglip_paths["timm"], "--preset", "tiny-siglip"]
    assert main(["convert", "init", *map(str, words), str(tmp_path / "out")]) == 0
    path = resolve(tmp_path / "out")
    assert f"{IMAGE} was not in the tokenizer and got id {SIZE}: prepare data and train with {path}/tokenizer" in (
        capsys.readouterr().out
    )
    assert open_tokenizer(path / "tokenizer").image_id == SIZE
    assert main(["convert", "to-hf", str(path), str(tmp_path / "hf"), "--format", "native"]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (len(tokenizer), tokenizer.image_token_id) == (SIZE + 1, SIZE)
    before = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == before.encode(text).ids


def test_start_weights_refuse_a_wrong_tokenizer(folder, tmp_path, capsys):
    public = public_models.build(tmp_path / "public", folder)
    words = ["--llm", public.llm_paths["bin"], "--siglip", public.siglip_paths["timm"], "--preset", "tiny-siglip"]
    assert main(["convert", "init", *map(str, words), str(tmp_path / "out")]) == 4
    assert f"next free id is {SIZE}, but the model has model.image_token_id 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
