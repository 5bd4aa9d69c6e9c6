"""Decoding with cached keys and values against running everything again, alone and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from megavl.config.errors import NumericsError
from megavl.data.batch import make_batch
from megavl.generate.decode import AnswerBatch, Request, generate
from megavl.generate.engine import Engine
from megavl.generate.sampling import Sampling
from megavl.model.vl_model import DeepseekVL
from tests.unit.generate import models

NEVER = -1


@pytest.fixture(scope="module", params=models.PRESETS)
def model(request: pytest.FixtureRequest) -> Iterator[DeepseekVL]:
    with models.built(request.param) as built:
        built.preset = request.param
        yield built


def prompt(model: DeepseekVL, *, images: int, text: int = 9, seed: int = 3) -> tuple[list[int], torch.Tensor]:
    config, generator = models.config_of(model.preset), torch.Generator().manual_seed(seed)
    ids = [0, *torch.randint(4, 1024, (text,), generator=generator).tolist()]
    for _ in range(images):
        ids += [3] * config.image_tokens + torch.randint(4, 1024, (5,), generator=generator).tolist()
    side = config.canvas_size
    return ids, torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)


def mixed(model: DeepseekVL) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts of five lengths with none to three images."""
    kinds = [(0, 9), (2, 4), (1, 30), (3, 1), (0, 2)]
    return [prompt(model, images=images, text=text, seed=i) for i, (images, text) in enumerate(kinds)]


def forced(count: int, *, seed: int = 5) -> list[int]:
    """Random tokens to go on with, for tiny random models repeat themselves when left alone."""
    return torch.randint(4, 1024, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits_from_scratch(model: DeepseekVL, ids: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    return model.logits(make_batch(torch.tensor(ids), images=images, image_token_id=model.image_token_id))[-1]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def answers(
    model: DeepseekVL,
    requests: Sequence[Request],
    *,
    eos_id: int | tuple[int, ...] = NEVER,
    rows: int = 1,
    length: int = 0,
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in requests]
    ended = [False] * len(requests)
    for number, token, last in generate(model, requests, eos_id=eos_id, rows=rows, length=length):
        assert not ended[number]
        found[number].append(token)
        ended[number] = last
    assert all(ended)
    return found


def answer(
    model: DeepseekVL,
    ids: list[int],
    images: torch.Tensor,
    *,
    tokens: int,
    eos_id: int | tuple[int, ...] = NEVER,
    **how: Sampling,
) -> list[int]:
    return answers(model, [Request(ids=ids, images=images, max_new_tokens=tokens, **how)], eos_id=eos_id)[0]


@pytest.mark.parametrize("images", [0, 2])
def test_cached_decoding_equals_full_recomputation(model, images, report_table):
    ids, pixels = prompt(model, images=images)
    tokens = forced(12)
    engine = Engine(model)
    logits, errors, chosen = engine.extend(0, ids, images=pixels)[0], [], set()
    for count in range(12):
        expected = logits_from_scratch(model, ids + tokens[:count], pixels)
        errors.append(relative(logits, expected))
        assert logits.argmax() == expected.argmax()
        chosen.add(int(logits.argmax()))
        logits = engine.append(tokens[count : count + 1])[0]
    report_table(["logits, cached against recomputed, relative", max(errors), "limit 1e-5"])
    assert all(error < 1e-5 for error in errors)
    assert len(chosen) > 1


def test_several_tokens_after_a_prefix_equal_full_recomputation(model, report_table):
    """The prompt may be split anywhere, also between the images; the cache grows on the way."""
    ids, pixels = prompt(model, images=3)
    image = models.config_of(model.preset).image_tokens
    cuts = [0, 4, 10 + image, 13 + image, 15 + 2 * image, len(ids)]
    engine, errors, seen = Engine(model), [], 0
    for start, stop in zip(cuts, cuts[1:]):
        new = ids[start:stop].count(3) // image
        logits = engine.extend(0, ids[start:stop], images=pixels[seen : seen + new])[0]
        seen += new
        errors.append(relative(logits, logits_from_scratch(model, ids[:stop], pixels[:seen])))
    report_table(["logits, read in five parts against recomputed, relative", max(errors), "limit 1e-5"])
    assert seen == 3 and all(error < 1e-5 for error in errors)


def test_a_batch_has_the_logits_of_single_sequences(model, report_table):
    prompts, engine = mixed(model), Engine(model, rows=5)
    continued = [forced(8, seed=row) for row in range(5)]
    for row, (ids, pixels) in enumerate(prompts):
        engine.extend(row, ids, images=pixels)
    errors = []
    for count in range(8):
        logits = engine.append([tokens[count] for tokens in continued])
        for row, (ids, pixels) in enumerate(prompts):
            expected = logits_from_scratch(model, ids + continued[row][: count + 1], pixels)
            errors.append(relative(logits[row], expected))
    report_table(["logits, five sequences of five lengths against each alone, relative", max(errors), "limit 1e-5"])
    assert all(error < 1e-5 for error in errors)


def test_a_bf16_batch_follows_fp32(report_table):
    """The cache of a bf16 model is fp32 on the CPU; rows of several lengths go through its own path."""
    with models.built("tiny-hybrid") as exact, models.built("tiny-hybrid", dtype=torch.bfloat16) as short:
        exact.preset = "tiny-hybrid"
        found = []
        for model in (exact, short):
            engine = Engine(model, rows=5)
            for row, (ids, pixels) in enumerate(mixed(exact)):
                engine.extend(row, ids, images=pixels)
            engine.append(forced(5))
            engine.extend(1, forced(3), images=None)
            found.append(engine.append(forced(5, seed=6)).float())
    error = max(relative(a, b) for a, b in zip(found[1], found[0]))
    report_table(["logits in bf16 against fp32, five sequences, relative", error, "limit 0.05"])
    assert error < 0.05


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_a_batch_gives_what_single_runs_give(model, rows):
    """Lengths, images, ends and settings differ; with 2 rows, later prompts take the rows of finished ones."""
    kinds = [{}, {"temperature": 1.3, "seed": 4}, {"repetition_penalty": 1.4}, {"temperature": 2.0, "top_p": 0.9}, {}]
    requests = [
        Request(ids=ids, images=pixels, max_new_tokens=3 + 4 * number, sampling=Sampling(**kinds[number]))
        for number, (ids, pixels) in enumerate(mixed(model))
    ]
    alone = [answers(model, [request])[0] for request in requests]
    assert [len(tokens) for tokens in alone] == [3, 7, 11, 15, 19]
    assert answers(model, requests, rows=rows) == alone
    assert answers(model, requests, rows=rows, length=100) == alone
    eos_id = alone[3][4]
    ended = [tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens for tokens in alone]
    assert ended != alone
    assert answers(model, requests, rows=rows, eos_id=eos_id) == ended


def test_finished_answers_are_not_computed(model, monkeypatch):
    counts, append = [], Engine.append

    def counted(self: Engine, tokens: Sequence[int]) -> torch.Tensor | None:
        counts.append(len(tokens))
        return append(self, tokens)

    monkeypatch.setattr(Engine, "append", counted)
    ids, pixels = prompt(model, images=0)
    answers(model, [Request(ids=ids, images=pixels, max_new_tokens=n) for n in (1, 2, 4, 1, 3)], rows=3)
    # The first row and then the fourth prompt end at once; the fifth takes the free row while the third goes on.
    assert counts == [2, 2, 2]


@pytest.mark.parametrize("images", [0, 2])
def test_greedy_tokens_are_those_of_full_recomputation(model, images):
    ids, pixels = prompt(model, images=images)
    expected: list[int] = []
    for _ in range(12):
        expected.append(int(logits_from_scratch(model, ids + expected, pixels).argmax()))
    assert answer(model, ids, pixels, tokens=12) == expected


def test_decoding_stops_at_the_end_of_sentence(model):
    ids, pixels = prompt(model, images=1)
    free = answer(model, ids, pixels, tokens=8)
    assert answer(model, ids, pixels, tokens=8, eos_id=free[3]) == free[: free.index(free[3]) + 1]
    first = min(free.index(free[3]), free.index(free[2]))
    assert answer(model, ids, pixels, tokens=8, eos_id=(NEVER, free[3], free[2])) == free[: first + 1]


def test_the_picture_decides(model):
    ids, pixels = prompt(model, images=1)
    seen, other = (Engine(model).extend(0, ids, images=x) for x in (pixels, 255 - pixels))
    assert float((seen - other).abs().max()) > 1e-3


def test_draws_depend_on_the_seed_alone(model):
    ids, pixels = prompt(model, images=1)

    def draw(seed: int) -> list[int]:
        return answer(model, ids, pixels, tokens=8, sampling=Sampling(temperature=1.5, seed=seed))

    assert draw(1) == draw(1) != draw(2)


def test_a_repetition_penalty_sees_prompt_and_answer(model):
    ids, pixels = prompt(model, images=1)
    tokens = answer(model, ids, pixels, tokens=20, sampling=Sampling(repetition_penalty=1e6))
    assert len(set(tokens)) == 20 and not set(tokens) & set(ids)


def test_logits_that_are_not_finite(model):
    ids, pixels = prompt(model, images=0)
    weight = model.language_model.output_layer.weight
    kept = weight[7].clone()
    weight[7] = float("nan")
    try:
        with pytest.raises(NumericsError, match="not finite"):
            answer(model, ids, pixels, tokens=2)
    finally:
        weight[7] = kept


def test_only_the_last_position_gets_logits(model):
    ids, pixels = prompt(model, images=1)
    assert Engine(model).extend(0, ids, images=pixels).shape == (1, 1024)


def test_likelihoods_of_prompt_and_answer_equal_scores(model, report_table):
    """A prompt that is scored while it is read, and the tokens after it, against the logits of the whole sequence."""
    ids, pixels = prompt(model, images=1)
    request = Request(ids=ids, images=pixels, max_new_tokens=4, alternatives=3, score_prompt=True)
    batch = AnswerBatch(model, eos_id=NEVER, rows=2)
    found = batch.start([(5, request), (6, Request(ids=ids[:1], max_new_tokens=9))])
    while len(batch) > 1:
        found += batch.step()
    mine = [one for one in found if one.number == 5]
    tokens = [one.token for one in mine]
    assert [one.last for one in mine] == [False, False, False, True] and not any(one.prompt for one in mine[1:])
    likelihoods = [*mine[0].prompt, *(one.likelihood for one in mine)]
    whole = torch.tensor(ids + tokens)
    with torch.no_grad():
        logits = model.logits(make_batch(whole[:-1], images=pixels, image_token_id=model.image_token_id))
    expected = logits.log_softmax(-1)
    errors = [abs(one.log_prob - float(row[token])) for one, row, token in zip(likelihoods, expected, whole[1:])]
    report_table(["log-probabilities against the whole sequence, absolute", max(errors), "limit 1e-5"])
    assert len(likelihoods) == len(whole) - 1 and max(errors) < 1e-5
    assert [one.top[0][0] for one in likelihoods] == expected.argmax(-1).tolist()
    assert all(len(one.top) == 3 and one.top[0][1] >= one.top[1][1] for one in likelihoods)
    assert all(one.likelihood is None for one in found if one.number == 6)


def test_a_prompt_may_be_read_without_an_answer(model):
    ids, _ = prompt(model, images=0)
    batch = AnswerBatch(model, eos_id=NEVER, rows=2)
    request = Request(ids=ids, max_new_tokens=0, alternatives=0, score_prompt=True)
    (only, other) = batch.start([(0, request), (1, Request(ids=ids, max_new_tokens=2))])
    assert only.token is None and only.last and len(only.prompt) == len(ids) - 1 and not only.prompt[0].top
    assert other.token is not None and len(batch) == 1


def test_a_dropped_answer_leaves_the_others(model):
    prompts = [prompt(model, images=0, seed=seed) for seed in range(3)]
    alone = [answer(model, *one, tokens=6) for one in prompts]
    batch = AnswerBatch(model, eos_id=NEVER, rows=3)
    chosen = batch.start((n, Request(ids=ids, max_new_tokens=6)) for n, (ids, _) in enumerate(prompts))
    batch.drop({0, 77})
    chosen += batch.start([(3, Request(ids=prompts[0][0], max_new_tokens=6))])
    while batch:
        chosen += batch.step()
    found = [[one.token for one in chosen if one.number == n] for n in range(4)]
    assert found == [alone[0][:1], alone[1], alone[2], alone[0]]
