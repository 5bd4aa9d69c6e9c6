"""Special tokens are read from the tokenizer's own files; the chat template speaks the released conversation format."""

import json
import shutil
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, LlamaTokenizerFast
from transformers import __version__ as release

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.config.load import load_model_config
from megavl.convert.chat_template import chat_template
from megavl.convert.hf_read import canonical_tensors, open_hf_tensors, read_config
from megavl.convert.hf_write import write_hf
from megavl.convert.tokenizer_files import (
    TokenizerIds,
    image_token_id,
    read_tokenizer,
    tokenizer_config,
    tokenizer_paths,
    with_bos_first,
)

EOS = "<｜end▁of▁sentence｜>"
OLD = release.startswith("4.")
"""The original format is for the released client, which needs transformers 4."""


@pytest.fixture
def folder(tokenizer_dir, tmp_path):
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))


def test_ids_come_from_the_files(folder):
    assert read_tokenizer(folder).ids == TokenizerIds(bos=0, eos=1, pad=2, image=3)
    assert image_token_id(folder) == 3


def test_released_names_hold_without_a_configuration(folder):
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer(folder).ids == TokenizerIds(bos=0, eos=1, pad=1, image=3)


def test_usual_names_are_found_where_none_is_given(folder):
    (folder / "tokenizer_config.json").unlink()
    vocabulary = {"model": {"vocab": {"<bos>": 5, "</s>": 6, "<pad>": 7, "<image_placeholder>": 8}}}
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert read_tokenizer(folder).ids == TokenizerIds(bos=5, eos=6, pad=7, image=8)


def test_tokens_given_as_objects_and_in_the_map(folder):
    config = {"bos_token": {"content": "<｜▁pad▁｜>", "lstrip": False}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "Ġ"}}))
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.ids.bos, tokenizer.tokens["eos_token"]) == (2, "Ġ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": "<none>"}, "token '<none>' is not in it"),
        (None, "tokenizer.json: no such file"),
    ],
)
def test_missing_pieces_are_named(folder, change, message):
    if change is None:
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps(change))
    with pytest.raises(DataError, match=message):
        read_tokenizer(folder)


def test_a_tokenizer_without_known_specials_is_refused(folder):
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(DataError, match="bos_token is not given"):
        read_tokenizer(folder)


def test_another_image_token_id_is_refused(sources, folder, tmp_path):
    config, fmt = read_config(sources["tiny-siglip"])
    flat = canonical_tensors(open_hf_tensors(sources["tiny-siglip"]), config=config, fmt=fmt)
    text = (folder / "tokenizer.json").read_text().replace('"id": 3,', '"id": 7,', 1)
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="<image_placeholder> has id 7.*image_token_id 3"):
        write_hf(tmp_path / "out", config=config, tensors=flat, fmt="native", tokenizer_dir=folder)


@pytest.mark.parametrize("fmt", ["native", "original"] if OLD else ["native"])
def test_exported_tokenizer_adds_bos_and_no_other_token(folder, fmt):
    tokenizer = read_tokenizer(folder)
    (folder / "tokenizer_config.json").write_bytes(tokenizer_config(tokenizer, fmt=fmt, max_length=4096))
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    if fmt == "native":
        (folder / "tokenizer.json").write_bytes(with_bos_first(tokenizer) or b"")
    # In transformers 5 the named class splits words at blanks. AutoTokenizer sees that the file does not.
    for cls in (AutoTokenizer, *([LlamaTokenizerFast] if OLD else [])):
        loaded = cls.from_pretrained(folder)
        assert isinstance(loaded, LlamaTokenizerFast) == OLD and len(loaded) == size
        encoded = loaded("which colour is é?")
        assert encoded["input_ids"][0] == 0 and 1 not in encoded["input_ids"] and "token_type_ids" not in encoded
        assert loaded.decode(encoded["input_ids"], skip_special_tokens=True) == "which colour is é?"
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (
            0,
            1,
            2,
            4096,
        )
    assert hasattr(AutoTokenizer.from_pretrained(folder), "image_token") == (fmt == "native")


def test_a_complete_configuration_is_kept_byte_for_byte(folder):
    first = tokenizer_config(read_tokenizer(folder), fmt="native", max_length=4096)
    spaced = first.replace(b'\n  "', b'\n      "')
    (folder / "tokenizer_config.json").write_bytes(spaced)
    assert tokenizer_config(read_tokenizer(folder), fmt="native", max_length=512) == spaced


def test_paths_to_keep_with_a_checkpoint(folder):
    (folder / "modeling.py").write_text("raise SystemExit")
    assert sorted(path.name for path in tokenizer_paths(folder)) == ["tokenizer.json", "tokenizer_config.json"]


def render(messages, *, generate=False, eos=EOS):
    # As transformers compiles it.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template(eos_token=eos, image_token="<image_placeholder>"))
    return template.render(messages=messages, add_generation_prompt=generate)


def said(role, *parts):
    return {
        "role": role,
        "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
    }


def test_template_renders_the_inference_prompt():
    rendered = render([said("user", None, "What is\nthis? ")], generate=True)
    assert rendered == f"{SYSTEM_PROMPT}\n\nUser: <image_placeholder>What is\nthis?\n\nAssistant:"


def test_template_closes_every_answer_with_eos():
    messages = [said("User", "a", "b", None), {"role": "Assistant", "content": " c "}, said("User", "d")]
    assert render(messages, generate=True) == (
        f"{SYSTEM_PROMPT}\n\nUser: a b<image_placeholder>\n\nAssistant: c{EOS}User: d\n\nAssistant:"
    )
    assert render(messages[:2]) == f"{SYSTEM_PROMPT}\n\nUser: a b<image_placeholder>\n\nAssistant: c{EOS}"
    assert render(messages) == f"{SYSTEM_PROMPT}\n\nUser: a b<image_placeholder>\n\nAssistant: c{EOS}User: d"


def test_system_message_replaces_or_removes_the_prompt():
    assert render([said("system", "Be brief."), said("user", "x")]) == "Be brief.\n\nUser: x"
    assert render([said("system", ""), said("user", "x")]) == "User: x"


def test_empty_assistant_turn_asks_for_an_answer():
    assert render([said("user", "x"), said("assistant", "")]) == f"{SYSTEM_PROMPT}\n\nUser: x\n\nAssistant:"


def test_tokens_with_quotes_survive():
    assert render([said("user", "x"), said("assistant", "y")], eos="<\"e'\\>").endswith("Assistant: y<\"e'\\>")


def test_side_files_follow_the_model_sizes():
    assert load_model_config("tiny-hybrid").image_tokens == 9
