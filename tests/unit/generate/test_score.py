"""Scores of options against one plain pass, and answers that end at a stop text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from megavl.config.errors import DataError, UsageError
from megavl.data.batch import make_batch
from megavl.generate.pretrained import Model, Processor
from megavl.generate.score_rows import EncodedOption, ScoreRequest
from megavl.generate.stop import StopTexts
from tests.unit.generate import models

CONFIG = models.config_of("tiny-hybrid")
PROMPT = "which colour?"


@pytest.fixture(scope="module")
def model(tokenizer) -> Iterator[Model]:
    with models.built("tiny-hybrid", seed=models.TALKATIVE["tiny-hybrid"]) as stage:
        yield Model(stage, Processor(CONFIG, tokenizer))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    return str(models.write_picture(tmp_path_factory.mktemp("picture") / "one.png", seed=3))


@torch.no_grad()
def plain(model: Model, inputs, option: str) -> tuple[float, bool]:
    """The definition: log-probabilities of the whole sequence in one pass."""
    ids = [*inputs.ids, *model.processor.tokenizer.encode(option)]
    batch = make_batch(torch.tensor(ids), images=inputs.images, image_token_id=CONFIG.image_token_id)
    table = model.stage.logits(batch).double().log_softmax(-1)
    rows = range(len(inputs.ids) - 1, len(ids) - 1)
    likeliest = all(int(table[row].argmax()) == ids[row + 1] for row in rows)
    return sum(float(table[row, ids[row + 1]]) for row in rows), likeliest


def test_scores_equal_one_plain_pass(model, picture, report_table):
    inputs = model.processor(PROMPT, [picture])
    answer = model.generate(inputs, max_new_tokens=6)
    options = [" red", " a dark red house", answer.text]
    found = model.score(PROMPT, options, images=[picture])
    expected = [plain(model, inputs, option) for option in options]
    errors = [abs(one.log_prob - value) / abs(value) for one, (value, _) in zip(found, expected)]
    report_table(["log-probability of an option against one pass, relative", max(errors)])
    assert max(errors) < 1e-5
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]
    assert len({one.tokens for one in found}) > 1
    assert found[0].perplexity == pytest.approx(math.exp(-found[0].log_prob / found[0].tokens))


def test_no_projection_runs_token_by_token(model):
    """A batch of products of one row each takes three times as long, on a GPU far longer."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        model.score(PROMPT, [" red"])
        model.generate(model.processor(PROMPT), max_new_tokens=2)
    products = [event.input_shapes[0] for event in recorded.events() if event.name in ("aten::bmm", "aten::mm")]
    assert len(products) > 40
    assert [shape for shape in products if len(shape) == 3 and shape[1] == 1] == []


def test_greedy_answer_is_marked_greedy(model, picture):
    inputs = model.processor(PROMPT, [picture])
    said = model.generate(inputs, max_new_tokens=6).token_ids
    other = (*said[:-1], (said[-1] + 1) % 100)
    options = [EncodedOption(ids=inputs.ids + ids, start=len(inputs.ids)) for ids in (said, other, said[:3])]
    (scores,) = model.score_requests([ScoreRequest(options=tuple(options), images=(picture,))])
    assert [one.greedy for one in scores] == [True, False, True]
    assert [one.tokens for one in scores] == [6, 6, 3]


def test_bits_per_byte_is_the_loss_over_bytes(model):
    text = "The quick brown fox"
    ids = [model.processor.tokenizer.bos_id, *model.processor.tokenizer.encode(text)]
    with torch.no_grad():
        table = model.stage.logits(make_batch(torch.tensor(ids))).double().log_softmax(-1)
    bits = -sum(float(table[at, token]) for at, token in enumerate(ids[1:])) / math.log(2)
    assert model.bits_per_byte(text) == pytest.approx(bits / len(text), rel=1e-5)
    with pytest.raises(DataError, match="text: is empty"):
        model.bits_per_byte("")


def test_option_without_tokens_is_refused(model):
    with pytest.raises(DataError, match="has no token of its own"):
        model.score(PROMPT, ["red", ""])


def test_answer_ends_before_a_stop_text(model, picture):
    inputs = model.processor(PROMPT, [picture])
    whole = model.generate(inputs, max_new_tokens=24)
    middle = len(whole.text) // 2
    stop = [whole.text[middle : middle + 3], "never said"]
    found = model.generate(inputs, max_new_tokens=24, stop=stop)
    assert found.text == whole.text[: whole.text.find(stop[0])]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)] and len(found.token_ids) < len(whole.token_ids)
    pieces = list(model.stream(model.request(inputs, max_new_tokens=24, stop=stop)))
    assert "".join(pieces) == found.text
    assert model.generate(inputs, max_new_tokens=24, stop=["never said"]) == whole
    with pytest.raises(UsageError, match="stop: a text to stop at is empty"):
        model.generate(inputs, stop=[""])


def test_beginning_of_a_stop_text_is_held_back(tokenizer):
    stop = StopTexts(["\n\nUser:", "<end>"], tokenizer)
    assert stop.certain("a red\n") == "a red"
    assert stop.certain("a red\n\nUs") == "a red"
    assert stop.certain("a red\n\nUnder <") == "a red\n\nUnder "
    assert stop.certain("a red\n\nUser: b") == stop.truncate("a red\n\nUser: b") == "a red"
