"""Fields of requests: each mistake is named, and what changes nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megavl.serve import refusal
from megavl.serve.fields import ChatFields, CompletionFields, read_fields
from megavl.serve.limits import MAX_MESSAGES, MAX_PARTS
from megavl.serve.refusal import Refusal

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "is missing"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": ["hello"]}, "messages.0", "found 'hello'"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        ({"messages": [{"role": "user", "content": [{"type": 5}]}]}, "messages.0.content.0.type", "string, found 5"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "found 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.image_url.url",
            "is missing",
        ),
        ({"messages": HELLO, "stream": "yes"}, "stream", "valid boolean, found 'yes'"),
        ({"messages": HELLO, "max_tokens": True}, "max_tokens", "valid integer, found True"),
        ({"messages": HELLO, "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"messages": HELLO, "top_p": 0}, "top_p", "greater than 0"),
        ({"messages": HELLO, "repetition_penalty": 1e-300}, "repetition_penalty", "greater than or equal to 0.000001"),
        ({"messages": HELLO, "repetition_penalty": 1e300}, "repetition_penalty", "less than or equal to 1000000"),
        ({"messages": HELLO, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": HELLO, "seed": 2**63}, "seed", "less than"),
        ({"messages": HELLO, "stop": [1]}, "stop", "give a text, or a list of up to 16"),
        ({"messages": HELLO, "logit_bias": {"5": 100}}, "logit_bias", "is not supported"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"messages": HELLO, "frequency_penalty": 0.5}, "frequency_penalty", "0.5 is not supported"),
        ({"messages": HELLO, "no\x1bfield": 1}, None, "no␛field: 1 is not supported"),
    ],
)
def test_a_mistake_is_named(body: dict[str, Any], param: str | None, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_fields(ChatFields, body)
    assert message in str(refused.value) and (param is None or refused.value.param == param)


@pytest.mark.parametrize("prompt", [[], [[]], 5, [1, "a"], ["a", 1], [[1], "a"], [-1], [[1], [2.5]], {}, [None]])
def test_prompts_have_four_forms(prompt: Any) -> None:
    with pytest.raises(Refusal, match="^prompt: ") as refused:
        read_fields(CompletionFields, {"prompt": prompt})
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [0] * 1000},
        {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [0] * 1000}]},
        {"messages": [{"role": "user", "content": [{"type": 5, "text": 5}] * 1000}]},
        {"messages": HELLO, "stop": [0] * 16},
        {"prompt": [None] * 1000},
        {"prompt": [[None]] * 1000},
        {"prompt": [[1, *["a"] * 1000]]},
    ],
)
def test_many_mistakes_are_few_errors(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as found:
        (CompletionFields if "prompt" in body else ChatFields).model_validate(body)
    assert found.value.error_count() <= 8


def test_large_values_are_shortened_before_they_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    visible = refusal.visible
    monkeypatch.setattr(refusal, "visible", lambda text: shown.append(len(text)) or visible(text))
    large = "\x1b" * 100_000
    for body in ({large: 1}, {"tools": large}, {"tools": [large] * 1000}, {"model": [[large]] * 1000}):
        with pytest.raises(Refusal) as refused:
            read_fields(ChatFields, {"messages": HELLO, **body})
        assert len(str(refused.value)) < 400
    assert shown and max(shown) <= 200


def test_messages_and_parts_are_bounded() -> None:
    part = {"type": "text", "text": "x"}
    assert read_fields(ChatFields, {"messages": HELLO * MAX_MESSAGES}).messages
    for messages in (HELLO * (MAX_MESSAGES + 1), [{"role": "user", "content": [part] * (MAX_PARTS + 1)}]):
        with pytest.raises(Refusal, match="at most 4096 items"):
            read_fields(ChatFields, {"messages": messages})


def test_forms_of_prompts() -> None:
    for prompt, expected in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])):
        assert read_fields(CompletionFields, {"prompt": prompt}).prompts == expected


def test_fields_without_effect_are_ignored() -> None:
    nothing = {"n": 1, "tools": [], "logit_bias": {}, "response_format": {"type": "text"}, "presence_penalty": 0.0}
    nothing |= {"echo": False, "stop_token_ids": [], "continue_final_message": False, "chat_template_kwargs": {}}
    fields = read_fields(ChatFields, {"messages": HELLO, "user": "me", "metadata": {"a": "b"}, "stop": None, **nothing})
    assert fields.sampling().plain and fields.stops == () and fields.alternatives is None


def test_greedy_is_the_default_and_draws_need_a_temperature() -> None:
    assert read_fields(ChatFields, {"messages": HELLO, "temperature": 0, "top_p": 0.5}).sampling().plain
    with pytest.raises(Refusal, match="top_k: it has no effect on greedy"):
        read_fields(ChatFields, {"messages": HELLO, "top_k": 5}).sampling()
    drawn = read_fields(ChatFields, {"messages": HELLO, "temperature": 0.7, "top_k": -1, "seed": -1}).sampling()
    assert (drawn.temperature, drawn.top_k, drawn.seed) == (0.7, 0, 2**63 - 1)
    seeds = {read_fields(ChatFields, {"messages": HELLO, "temperature": 1}).sampling().seed for _ in range(4)}
    assert len(seeds) == 4
