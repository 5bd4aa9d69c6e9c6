"""`megavl generate` from the outside: the three forms of MODEL, and one message for each mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from megavl.main.cli import main
from tests.unit.generate import models

PRESET = "tiny-hybrid"
IMAGE_TOKENS = models.config_of(PRESET).image_tokens


@pytest.fixture(scope="module")
def folders(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    checkpoint = models.write_checkpoint(PRESET, root / "checkpoints", tokenizer=tokenizer_dir)
    return {
        "native": models.write_folder(PRESET, root / "native", tokenizer=tokenizer_dir, fmt="native"),
        "original": models.write_folder(PRESET, root / "original", tokenizer=tokenizer_dir, fmt="original"),
        "checkpoint": checkpoint,
        "parent": checkpoint.parent,
    }


def ask(model: Path | str, *words: str) -> int:
    return main(["generate", str(model), "--device", "cpu", "--max-new-tokens", "6", *words])


def test_every_model_format_answers_the_same(folders, picture, capsys):
    lines = []
    for folder in folders.values():
        assert ask(folder, "--image", str(picture), "--prompt", "which colour?", "--json") == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        lines.append(json.loads(out))
    assert all(line == lines[0] for line in lines)
    assert list(lines[0]) == ["prompt_tokens", "token_ids", "text"]
    assert lines[0]["prompt_tokens"] > IMAGE_TOKENS and 1 <= len(lines[0]["token_ids"]) <= 6


def test_images_may_be_repeated_and_placed(folders, picture, capsys):
    prompt = "<image_placeholder> and <image_placeholder>"
    options = ("--image", str(picture), "--image", str(picture), "--system", "", "--json")
    assert ask(folders["native"], "--prompt", prompt, *options) == 0
    both = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert ask(folders["native"], "--prompt", " and ", "--system", "", "--json") == 0
    assert both - json.loads(capsys.readouterr().out)["prompt_tokens"] >= 2 * IMAGE_TOKENS


def test_text_alone_is_printed_without_json(folders, capsys):
    assert (
        ask(folders["native"], "--prompt", "red", "--template", "plain", "--temperature", "0.7", "--top-p", "0.9") == 0
    )
    assert capsys.readouterr().out.endswith("\n")


def test_checkpoint_with_sentencepiece_tokenizer_answers(picture, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["which colour is it? red green blue", "dark red and dark green"] * 20),
        model_prefix=str(folder / "own_name"),
        vocab_size=60,
        model_type="bpe",
        bos_id=0,
        eos_id=1,
        unk_id=2,
        user_defined_symbols=["<image_placeholder>"],
        minloglevel=2,
    )
    (folder / "own_name.vocab").unlink()
    checkpoint = models.write_checkpoint(PRESET, tmp_path / "checkpoints", tokenizer=folder)
    assert ask(checkpoint, "--image", str(picture), "--prompt", "which colour?", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > IMAGE_TOKENS


def test_bfloat16_answers(folders, picture, capsys):
    words = ("--image", str(picture), "--prompt", "red", "--json", "--dtype", "bfloat16")
    assert ask(folders["checkpoint"], *words) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) >= 1


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def test_bad_images_are_named(folders, picture, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:300])
    assert ask(folders["native"], "--image", str(broken), "--prompt", "red") == 3
    assert str(broken) in refused(capsys)
    assert ask(folders["native"], "--image", str(tmp_path / "none.png"), "--prompt", "red") == 3
    assert "none.png" in refused(capsys)
    assert ask(folders["native"], "--image", str(picture), "--prompt", "<image_placeholder>" * 2) == 3
    assert "has 2 <image_placeholder>, but 1 images are given" in refused(capsys)


def test_bad_models_are_named(folders, tmp_path, capsys):
    assert ask(tmp_path / "nothing", "--prompt", "red") == 4
    assert str(tmp_path / "nothing") in refused(capsys)
    (tmp_path / "empty").mkdir()
    assert ask(tmp_path / "empty", "--prompt", "red") == 4
    assert str(tmp_path / "empty") in refused(capsys)
    lost = shutil.copytree(folders["native"], tmp_path / "lost")
    (lost / "model.safetensors").unlink()
    assert ask(lost, "--prompt", "red") == 4
    assert str(lost) in refused(capsys)
    mute = shutil.copytree(folders["native"], tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    assert ask(mute, "--prompt", "red") == 3
    assert str(mute) in refused(capsys)


def test_prompt_longer_than_the_model_is_refused(folders, picture, capsys):
    assert ask(folders["checkpoint"], "--prompt", "red " * 5000) == 3
    assert "exceed the model's 4096 positions" in refused(capsys)
    assert ask(folders["native"], "--prompt", "red", "--max-new-tokens", "4096") == 3
    assert "4096 after them exceed the model's 4096 positions" in refused(capsys)


def test_tokenizer_without_the_image_token_answers(folders, picture, tmp_path, capsys):
    other = shutil.copytree(folders["native"], tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace("<image_placeholder>", "<something_else>")
    (other / "tokenizer.json").write_text(text)
    assert ask(other, "--prompt", "red", "--image", str(picture)) == 3
    assert f"{other / 'tokenizer.json'}: no <image_placeholder> token" in refused(capsys)


def test_foreign_tokenizer_is_refused(folders, tmp_path, capsys):
    other = shutil.copytree(folders["native"], tmp_path / "other")
    text = (other / "tokenizer.json").read_text().replace("<image_placeholder>", "<something_else>")
    (other / "tokenizer.json").write_text(text)
    assert ask(other, "--prompt", "red", "--json") == 0
    capsys.readouterr()
    config = json.loads((other / "config.json").read_text())
    shutil.copy(folders["native"] / "tokenizer.json", other / "tokenizer.json")
    (other / "config.json").write_text(json.dumps({**config, "image_token_id": 5}))
    assert ask(other, "--prompt", "red") == 3
    assert "the model's image token is 5" in refused(capsys)


def test_wrong_options_are_named(folders, monkeypatch, capsys):
    assert ask(folders["native"], "--prompt", "red", "--max-new-tokens", "0") == 2
    assert "--max-new-tokens: 0" in refused(capsys)
    assert ask(folders["native"], "--prompt", "red", "--top-p", "0.5") == 2
    assert "--temperature" in refused(capsys)
    if not torch.cuda.is_available():
        assert main(["generate", str(folders["native"]), "--prompt", "red", "--device", "cuda"]) == 2
        assert "--device cpu" in refused(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ask(folders["native"], "--prompt", "red") == 2
    assert "WORLD_SIZE is 2" in refused(capsys)
    with pytest.raises(SystemExit) as wrong:
        main(["generate", str(folders["native"]), "--prompt", "red", "--device", "tpu"])
    assert wrong.value.code == 2
