"""Bits per byte against their definition, and against values that are known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from megavl.config.errors import DataError
from megavl.data.batch import make_batch
from megavl.evaluate.bits_per_byte import encode_passages, score_passages
from megavl.evaluate.run_tasks import evaluate
from megavl.evaluate.task import Passage
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import read_canvases
from tests.unit.generate import models

PRESET = "tiny-hybrid"
CONFIG = models.config_of(PRESET)
TEXTS = ("which colour is it? red", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.", "天地玄黄" * 20)


def passages(texts=TEXTS, images=()):
    return [
        Passage(id=f"p{number}", location=f"t:{number}", images=images, kind=f"k{number % 2}", text=text)
        for number, text in enumerate(texts)
    ]


@torch.no_grad()
def definition(model, ids, images, start):
    """Bits of the tokens from `start` on, in one pass."""
    canvases = read_canvases(images, geometry=CONFIG.image_geometry)
    batch = make_batch(torch.tensor(ids), images=canvases, image_token_id=CONFIG.image_token_id)
    losses = -model.logits(batch).double().log_softmax(-1)
    return sum(float(losses[at - 1, ids[at]]) for at in range(start, len(ids))) / math.log(2)


@pytest.mark.parametrize("with_image", [False, True])
def test_bits_equal_those_of_one_pass(tokenizer, tmp_path, with_image, report_table):
    images = (models.write_picture(tmp_path / "a.png", seed=1),) if with_image else ()
    texts = passages(images=images)
    with models.built(PRESET) as model:
        read = evaluate(Model(model, Processor(CONFIG, tokenizer)), texts).passages
        errors = []
        for found in read:
            text = tokenizer.encode_batch([found.entry.text])[0]
            ids = [tokenizer.bos_id, *[3] * (CONFIG.image_tokens * len(images)), *text]
            expected = definition(model, ids, images, start=len(ids) - len(text))
            errors.append(abs(found.bits / expected - 1))
            assert found.tokens == len(text) and found.text_bytes == len(found.entry.text.encode())
    report_table([f"bits of a text{' after an image' * with_image} against one pass, relative", max(errors)])
    assert max(errors) < 1e-6


def test_long_text_scores_every_token_once(tokenizer):
    short = models.load_model_config(PRESET, llm={"max_position_embeddings": 20})
    (text,) = passages(["which colour is it? " * 20])
    ids = [tokenizer.bos_id, *tokenizer.encode_batch([text.text])[0]]
    (windows,) = encode_passages([text], processor=Processor(short, tokenizer))
    assert len(windows) == math.ceil((len(ids) - 1) / 19) > 2
    options = [window.options[0] for window in windows]
    assert all(option.start == 1 and 1 < len(option.ids) <= 20 for option in options)
    assert [token for option in options for token in option.ids[1:]] == ids[1:]
    assert [option.ids[0] for option in options[1:]] == [option.ids[-1] for option in options[:-1]]
    with models.built(PRESET) as model:
        (found,) = score_passages(Model(model, Processor(short, tokenizer)), [text], [windows])
        expected = sum(definition(model, list(option.ids), (), start=1) for option in options)
    assert found.bits == pytest.approx(expected, rel=1e-6) and found.tokens == len(ids) - 1


def test_uniform_model_needs_log2_of_the_vocabulary(tokenizer):
    with models.built(PRESET) as model:
        model.language_model.output_layer.weight.data.zero_()
        report = evaluate(Model(model, Processor(CONFIG, tokenizer)), passages())
    text = report.to_dict()["text"]
    bits = math.log2(CONFIG.llm.vocab_size)
    assert text["bytes"] == sum(len(one.encode()) for one in TEXTS)
    assert text["bits_per_byte"] == pytest.approx(bits * text["tokens"] / text["bytes"], rel=1e-6)
    assert list(text) == ["bits_per_byte", "bytes", "tokens", "n", "by_kind", "texts"]
    assert text["by_kind"]["k0"]["n"] == 2 and text["texts"][1]["id"] == "p1"
    rows = [row.split() for row in report.table().splitlines()]
    assert rows[0] == ["kind", "n", "bits_per_byte", "bytes", "tokens"]
    assert rows[-1] == ["all", "3", f"{text['bits_per_byte']:.3f}", str(text["bytes"]), str(text["tokens"])]


def test_a_long_text_with_images_names_its_line(tokenizer, tmp_path):
    images = (models.write_picture(tmp_path / "a.png", seed=1),)
    short = models.load_model_config(PRESET, llm={"max_position_embeddings": 20})
    with pytest.raises(DataError, match=r"t:1: text: \d+ tokens with its images exceed the model's 20 positions"):
        encode_passages(passages(["red", "which " * 40], images=images), processor=Processor(short, tokenizer))
