"""Prompts: positions of images, templates, image files, limits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from launch.bench.engines.random_models import EOS
from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.generate.prompt import answer_text, encode_prompt, prompt_pieces, read_canvases
from tests.unit.generate import models

PLACE = "<image_placeholder>"
CONFIG = models.config_of("tiny-hybrid")
SIDE, LIMIT = CONFIG.canvas_size, CONFIG.llm.max_position_embeddings


def shown(pieces) -> str:
    marks = {"bos": "[bos]", "image": "[image]", "eos": "[eos]"}
    return "".join(marks.get(piece.kind, piece.text) for piece in pieces)


def test_chat_prompt_has_the_inference_format():
    assert shown(prompt_pieces(f" A {PLACE} B\n", images=1)) == (
        f"[bos]{SYSTEM_PROMPT}\n\nUser: A [image] B\n\nAssistant:"
    )
    assert shown(prompt_pieces("A", images=0, system="")) == "[bos]User: A\n\nAssistant:"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("deepseek", "[bos]User: [image][image]A\n\nAssistant:"),
        ("plain", "[bos][image][image]A"),
        ("none", "[image][image]A"),
    ],
)
def test_images_precede_a_prompt_without_image_tags(template, expected):
    assert shown(prompt_pieces("A", images=2, template=template, system="")) == expected


@pytest.mark.parametrize("template", ["deepseek", "plain", "none"])
def test_nothing_of_a_prompt_is_supervised(template):
    assert not any(piece.supervised for piece in prompt_pieces("A", images=1, template=template))


@pytest.mark.parametrize(("text", "images"), [(f"{PLACE}A", 2), (f"{PLACE}{PLACE}A", 1), (f"{PLACE}A", 0)])
def test_image_tags_and_images_must_agree(text, images):
    with pytest.raises(DataError, match=f"has {text.count(PLACE)} {PLACE}, but {images} images are given"):
        prompt_pieces(text, images=images)


@pytest.mark.parametrize("template", ["deepseek", "none"])
def test_empty_prompt_is_refused(template):
    with pytest.raises(DataError, match="empty"):
        prompt_pieces("", images=0, template=template)


def test_ids_hold_every_position_of_an_image(tokenizer):
    ids = encode_prompt(prompt_pieces("red", images=2), tokenizer=tokenizer, config=CONFIG, room=0)
    assert ids[0] == tokenizer.bos_id and ids.count(3) == 2 * CONFIG.image_tokens


def test_spelt_special_tokens_are_ordinary_text(tokenizer):
    ids = encode_prompt(prompt_pieces(EOS, images=0), tokenizer=tokenizer, config=CONFIG, room=0)
    assert tokenizer.eos_id not in ids


def test_prompt_beyond_the_positions_is_refused(tokenizer):
    pieces = prompt_pieces("red", images=0, system="")
    size = len(encode_prompt(pieces, tokenizer=tokenizer, config=CONFIG, room=0))
    encode_prompt(pieces, tokenizer=tokenizer, config=CONFIG, room=LIMIT - size)
    with pytest.raises(
        DataError, match=f"{size} prompt tokens and {LIMIT + 1 - size} after them exceed the model's {LIMIT} "
    ):
        encode_prompt(pieces, tokenizer=tokenizer, config=CONFIG, room=LIMIT + 1 - size)


def test_images_become_canvases(picture, tmp_path):
    colour = tmp_path / "red.png"
    Image.new("RGB", (64, 32), (200, 0, 0)).save(colour)
    canvases = read_canvases([picture, colour], geometry=CONFIG.image_geometry)
    assert canvases.shape == (2, 3, SIDE, SIDE) and canvases.dtype == torch.uint8
    assert canvases[1, :, SIDE // 2, SIDE // 2].tolist() == [200, 0, 0] and canvases[1, :, 0, 0].tolist() == [
        122,
        116,
        104,
    ]
    assert read_canvases([], geometry=CONFIG.image_geometry).shape == (0, 3, SIDE, SIDE)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text"])
def test_unusable_images_are_named(picture, tmp_path, damage):
    path = tmp_path / "x.png"
    content = {"empty": b"", "truncated": picture.read_bytes()[:400], "text": b"no image"}
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(DataError) as caught:
        read_canvases([picture, path], geometry=CONFIG.image_geometry)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_answer_text_leaves_out_special_tokens(tokenizer):
    ids = tokenizer.encode(" red")
    assert answer_text([*ids, 1023, tokenizer.eos_id], tokenizer=tokenizer) == " red"
