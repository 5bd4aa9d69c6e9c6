"""Perplexities from packed rows against those of single options."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megavl.config.errors import DataError, NumericsError
from megavl.data.batch import make_batch
from megavl.evaluate.multiple_choice import encode_questions, evaluate_choices
from megavl.evaluate.task import read_tasks
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import read_canvases
from megavl.generate.score_rows import EncodedOption, ScoreRequest, score_rows
from megavl.model.vl_model import DeepseekVL
from tests.unit.generate import models

PRESET = "tiny-hybrid"
CONFIG = models.config_of(PRESET)


@pytest.fixture(scope="module")
def model() -> Iterator[DeepseekVL]:
    with models.built(PRESET) as built:
        yield built


@torch.no_grad()
def alone(model: DeepseekVL, option: EncodedOption, images: tuple) -> float:
    """The definition: the whole sequence in one pass, mean over the option's tokens."""
    canvases = read_canvases(images, geometry=CONFIG.image_geometry)
    batch = make_batch(torch.tensor(option.ids), images=canvases, image_token_id=CONFIG.image_token_id)
    losses = -model.logits(batch).double().log_softmax(-1)
    scores = [float(losses[at - 1, option.ids[at]]) for at in range(option.start, len(option.ids))]
    return float(torch.tensor(scores).mean().exp())


@pytest.mark.parametrize("row_tokens", [1, 500, 100_000])
def test_packed_rows_equal_single_options(model, task, tokenizer, row_tokens, report_table):
    questions = encode_questions(read_tasks([task]), processor=Processor(CONFIG, tokenizer))
    assert {len(option.ids) - option.start for q in questions for option in q.options} > {1}
    told = []
    scorer = Model(model, Processor(CONFIG, tokenizer))
    scores = scorer.score_requests(questions, row_tokens=row_tokens, progress=told.append)
    found = [[score.perplexity for score in of_question] for of_question in scores]
    expected = [[alone(model, option, question.images) for option in question.options] for question in questions]
    errors = [abs(a / b - 1) for x, y in zip(found, expected) for a, b in zip(x, y)]
    report_table([f"perplexity, rows of at most {row_tokens} tokens against alone, relative", max(errors)])
    assert all(error < 1e-5 for error in errors)
    assert len({round(value, 3) for values in found for value in values}) > 9
    assert sum(told) == sum(len(question.options) for question in questions)


def test_options_share_their_common_prefix():
    options = ((4,), (5,), (6, 7), (6, 8), (9, 7))
    request = ScoreRequest(options=tuple(EncodedOption(ids=(1, 2, 3, *option), start=3) for option in options))
    (row,) = score_rows([request], limit=100)
    assert [(segment.ids, segment.parent) for segment in row.segments] == [((1, 2, 3), -1), ((6,), 0), ((9,), 0)]
    found = {one.option: (one.positions, one.labels) for one in row.predictions}
    assert found == {0: ((2,), (4,)), 1: ((2,), (5,)), 2: ((2, 3), (6, 7)), 3: ((2, 3), (6, 8)), 4: ((2, 4), (9, 7))}


def test_options_repeat_the_prompt_where_none_is_shared():
    options = tuple(EncodedOption(ids=(1, 2, *option), start=2) for option in ((6, 7), (9, 7)))
    request = ScoreRequest(options=options, images=("one.png",))
    (row,) = score_rows([request], limit=100, shared=False)
    assert [(segment.ids, segment.parent) for segment in row.segments] == [((1, 2, 6), -1), ((1, 2, 9), -1)]
    assert row.images == ("one.png", "one.png")
    assert [one.positions for one in row.predictions] == [(1, 2), (4, 5)]


def test_every_option_is_tokenized_as_in_training(task, tokenizer):
    for question, encoded in zip(
        read_tasks([task]), encode_questions(read_tasks([task]), processor=Processor(CONFIG, tokenizer))
    ):
        for choice, option in zip(question.choices, encoded.options):
            assert tokenizer.decode(option.ids[option.start :]) == f" {choice}"
            assert tokenizer.decode(option.ids[: option.start]).endswith("\n\nAssistant:")


def test_a_prompt_beyond_the_positions_names_its_line(task, tokenizer):
    short = models.load_model_config(PRESET, llm={"max_position_embeddings": 60})
    with pytest.raises(DataError, match=r"task.jsonl:1: \d+ tokens exceed the model's 60 positions"):
        encode_questions(read_tasks([task]), processor=Processor(short, tokenizer))


def test_damaged_weights_are_reported(model, task, tokenizer):
    weight = model.language_model.output_layer.weight
    before = weight[5].clone()
    try:
        weight[5] = torch.nan
        with pytest.raises(NumericsError, match=r"task.jsonl:1: .* not finite"):
            evaluate_choices(Model(model, Processor(CONFIG, tokenizer)), read_tasks([task]))
    finally:
        weight[5] = before


def test_report_counts_accuracy_chance_and_blind(model, task, tokenizer):
    report = evaluate_choices(Model(model, Processor(CONFIG, tokenizer)), read_tasks([task]), blind=True)
    found = report.to_dict()
    assert list(found) == ["accuracy", "blind", "chance", "n", "by_kind", "questions"]
    assert found["n"] == 9 and list(found["by_kind"]) == ["0 images", "1 images", "2 images"]
    sizes = [2 + number % 4 for number in range(9)]
    assert found["chance"] == pytest.approx(sum(1 / size for size in sizes) / 9)
    for number, line in enumerate(found["questions"]):
        assert line["prediction"] == min(range(sizes[number]), key=line["perplexities"].__getitem__)
        assert (line["blind_perplexities"] is None) == (number % 3 == 2)
        assert line["blind_perplexities"] != line["perplexities"]
    right = [line["prediction"] == line["answer"] for line in found["questions"]]
    assert found["accuracy"] == sum(right) / 9
    assert found["by_kind"]["0 images"]["blind"] is None and found["by_kind"]["1 images"]["n"] == 3
    rows = [row.split() for row in report.table().splitlines()]
    assert rows[0] == ["kind", "n", "accuracy", "blind", "chance"] and rows[-1][:2] == ["all", "9"]
