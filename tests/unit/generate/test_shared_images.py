"""Images that several prompts share are encoded once, and change no score and no answer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megavl.evaluate.free_form import answer_texts, encode_open_questions
from megavl.evaluate.task import OpenQuestion
from megavl.generate import shared_images
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import prompt_pieces
from megavl.generate.score_inputs import encode_options
from megavl.generate.score_rows import ScoreRequest
from tests.unit.generate import models

PRESET = "tiny-hybrid"
CONFIG = models.config_of(PRESET)


@pytest.fixture(scope="module")
def model(tokenizer) -> Iterator[Model]:
    with models.built(PRESET, seed=models.TALKATIVE[PRESET]) as stage:
        yield Model(stage, Processor(CONFIG, tokenizer))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[tuple[Path, ...]]:
    """Images of seven prompts: two pictures, one of them in two files."""
    folder = tmp_path_factory.mktemp("pictures")
    one, two = (models.write_picture(folder / f"{seed}.png", seed=seed) for seed in (1, 2))
    copy = Path(shutil.copy(one, folder / "copy.png"))
    return [(one,), (two,), (two, one), (copy,), (), (one, copy), (two,)]


@pytest.fixture
def encoded(model) -> Iterator[list[int]]:
    """The number of images of each pass through the encoders."""
    counts: list[int] = []
    assert model.stage.vision is not None
    hook = model.stage.vision.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    hook.remove()


def requests(model: Model, prompts: Sequence[tuple[Path, ...]]) -> list[ScoreRequest]:
    return [
        encode_options(
            prompt_pieces(f"colour {number}?", images=len(images)),
            [" red", " dark blue"],
            tokenizer=model.processor.tokenizer,
            config=CONFIG,
            images=images,
        )
        for number, images in enumerate(prompts)
    ]


@pytest.mark.parametrize("row_tokens", [1, 10_000])
@pytest.mark.parametrize(("remembered", "count"), [(shared_images.REMEMBERED, 2), (1, 4)])
def test_scored_prompts_share_their_images(
    model, prompts, encoded, row_tokens, remembered, count, monkeypatch, report_table
):
    """In one row or several; what is forgotten between two prompts is encoded again."""
    asked = requests(model, prompts)
    alone = [model.score_requests([one])[0] for one in asked]
    encoded.clear()
    monkeypatch.setattr(shared_images, "REMEMBERED", remembered)
    found = model.score_requests(asked, row_tokens=row_tokens)
    assert sum(encoded) == count
    pairs = [(a.log_prob, b.log_prob) for x, y in zip(found, alone, strict=True) for a, b in zip(x, y, strict=True)]
    largest = max(abs(a / b - 1) for a, b in pairs)
    report_table([f"scores with shared images against alone, relative, rows of {row_tokens}", largest])
    assert largest < 1e-5
    assert len({round(value, 3) for _, value in pairs}) == len(pairs)


def test_answers_share_their_images(model, prompts, encoded):
    asked = [
        OpenQuestion(id=str(number), prompt=f"colour {number}?", images=images, answers=("red",))
        for number, images in enumerate(prompts)
    ]
    alone = [model.generate(model.processor(one.prompt, one.images), max_new_tokens=12).text.strip() for one in asked]
    encoded.clear()
    ids = encode_open_questions(asked, processor=model.processor, max_new_tokens=12)
    texts = answer_texts(model, asked, ids, max_new_tokens=12, batch_size=2)
    assert sum(encoded) == 2
    assert [text.strip() for text in texts] == alone
    assert len(set(alone)) > 3
