"""`megavl serve` as clients see it: OpenAI's own Python client, and plain HTTP."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

from megavl.generate.open_model import find_model, loaded
from megavl.generate.pretrained import Model, Processor
from megavl.main.cli import main
from tests.tiny_run import PATIENCE_S
from tests.unit.generate import models
from tests.unit.serve.servers import Server, data_url, question, serving, wait_until

PRESET = "tiny-hybrid"
ROWS, WAITING = 4, 2


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    return models.write_folder(
        PRESET, root / "tiny", tokenizer=tokenizer_dir, fmt="native", seed=models.TALKATIVE[PRESET]
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_picture(tmp_path_factory.mktemp("pictures") / "a.png", seed=1)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    limits = ("--batch-size", str(ROWS), "--waiting", str(WAITING), "--max-body", "1", "--max-images", "3")
    with serving(folder, *limits) as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client


def chat(client: openai.OpenAI, messages: list[dict[str, Any]], **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **{"max_tokens": 24, **options})


def generated(folder: Path, *words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["generate", str(folder), "--device", "cpu", "--max-new-tokens", "24", *words]) == 0
    return out.getvalue().removesuffix("\n")


def post(
    server: Server, path: str, body: bytes, *, method: str = "POST", **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON and headers of a plain request."""
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(server.address + path, data=body, headers=sent, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), dict(error.headers)


def health(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(server.address + "/health") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_models_are_listed(client):
    (only,) = client.models.list().data
    assert only.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here, only 'tiny'"):
        client.models.retrieve("other")


def test_chat_says_what_generate_says(client, folder, picture):
    for words, messages in (
        (("--image", str(picture), "--prompt", "which colour?"), question("which colour?", data_url(picture))),
        (("--prompt", "red or blue?"), [{"role": "user", "content": "red or blue?"}]),
        (
            ("--system", "Be short.", "--prompt", "why?"),
            [{"role": "system", "content": "Be short."}, *question("why?")],
        ),
    ):
        answer = chat(client, messages)
        (choice,) = answer.choices
        assert choice.message.content == generated(folder, *words) and choice.message.role == "assistant"
        assert choice.finish_reason == "length" and answer.usage.completion_tokens == 24


def test_streams_add_up_to_the_answer(client, picture):
    messages = question("which colour?", data_url(picture))
    drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 60}
    whole = chat(client, messages, **drawn)
    chunks = list(chat(client, messages, stream=True, stream_options={"include_usage": True}, **drawn))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "length" and len(choices) > 3
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_prompts_stream_at_once(client):
    prompts = ["red", "which colour is it", "blue"]
    whole = client.completions.create(model="tiny", prompt=prompts, max_tokens=40)
    texts = dict.fromkeys(range(3), "")
    finishes = []
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=40, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        finishes += [choice.finish_reason] if choice.finish_reason else []
    assert list(texts.values()) == [choice.text for choice in whole.choices] and len(finishes) == 3


def test_log_probabilities_are_the_models_own(client):
    messages = [{"role": "user", "content": "red or blue?"}]
    greedy = chat(client, messages, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(greedy) == 24 and all(len(one.top_logprobs) == 2 for one in greedy)
    assert all(one.logprob == one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob for one in greedy)
    drawn = chat(client, messages, logprobs=True, temperature=1.5, seed=4, max_tokens=1).choices[0].logprobs.content
    again = chat(client, messages, logprobs=True, temperature=1.5, seed=4, max_tokens=1).choices[0].logprobs.content
    assert drawn == again and drawn[0].logprob < greedy[0].logprob


def test_stop_texts_end_answers(client):
    whole = client.completions.create(model="tiny", prompt="red", max_tokens=40).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    cut = client.completions.create(model="tiny", prompt="red", max_tokens=40, stop=[stop, "nowhere"]).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_echoed_prompts_are_scored(client, folder):
    """What lm-evaluation-harness asks for, against the library."""
    source = find_model(folder)
    tokenizer, texts = source.tokenizer, ("which colour is it", "blue", "red green")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    with loaded(source) as stage:
        model = Model(stage, Processor(source.config, tokenizer))
        expected = [model.score("", [text], template="plain", system="")[0] for text in texts]
    answer = client.completions.create(model="tiny", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and answer.usage.completion_tokens == 3
    for ids, text, score, choice in zip(prompts, texts, expected, answer.choices, strict=True):
        found = choice.logprobs
        assert len(found.tokens) == len(ids) + 1 and found.token_logprobs[0] is None is found.top_logprobs[0]
        assert sum(found.token_logprobs[1:-1]) == pytest.approx(score.log_prob, abs=1e-5)
        pairs = list(zip(found.token_logprobs, found.top_logprobs))[1:-1]
        assert all(value == max(top.values()) for value, top in pairs) == score.greedy
        assert choice.text.startswith(text) and found.text_offset[:2] == [0, 0]
        begins = list(zip(found.text_offset, found.tokens))[1:-1]
        assert all(choice.text[offset:].startswith(token) for offset, token in begins)
    alone = client.completions.create(model="tiny", prompt="blue", echo=True, logprobs=1, max_tokens=0).choices[0]
    assert alone.text == "blue" and alone.logprobs.token_logprobs == answer.choices[1].logprobs.token_logprobs[:-1]


def test_answers_do_not_depend_on_their_neighbours(client, picture):
    """Six clients at once, on four rows."""
    asked = [question(f"{'red ' * n}colour?", *[data_url(picture)] * (n % 3)) for n in range(6)]

    def ask(messages: list[dict[str, Any]]) -> tuple[str, list[float]]:
        choice = chat(client, messages, logprobs=True).choices[0]
        return choice.message.content, [one.logprob for one in choice.logprobs.content]

    alone = [ask(messages) for messages in asked]
    with ThreadPoolExecutor(len(asked)) as threads:
        together = list(threads.map(ask, asked))
    assert [text for text, _ in together] == [text for text, _ in alone]
    for (_, found), (_, expected) in zip(together, alone):
        assert found == pytest.approx(expected, abs=1e-4)


def test_clients_that_go_are_forgotten(server, client):
    """Four long answers hold all rows. Once their clients are gone, nothing of them is left to compute."""
    streams = [client.completions.create(model="tiny", prompt="red", max_tokens=4000, stream=True) for _ in range(ROWS)]
    for stream in streams:
        next(iter(stream))
    assert health(server)["answers"] == ROWS
    for stream in streams:
        stream.close()
    wait_until(lambda: health(server)["active"] == 0)
    assert client.completions.create(model="tiny", prompt="red", max_tokens=2).usage.completion_tokens == 2
    assert health(server)["answers"] == 0


def test_too_many_requests_are_turned_away(server, client):
    body = json.dumps({"prompt": "red", "max_tokens": 4000, "stream": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    address = urlsplit(server.address)
    sockets = [socket.create_connection((address.hostname, address.port)) for _ in range(ROWS + WAITING)]
    try:
        for one in sockets:
            one.sendall(request)
        wait_until(lambda: health(server)["active"] == ROWS + WAITING)
        status, refused, headers = post(server, "/v1/completions", body)
        assert (status, refused["error"]["code"]) == (429, "too_many_requests") and int(headers["retry-after"]) > 0
    finally:
        for one in sockets:
            one.close()
    wait_until(lambda: health(server)["active"] == 0)
    assert client.completions.create(model="tiny", prompt="red", max_tokens=1).usage.completion_tokens == 1


def test_mistakes_are_named(client, picture, tmp_path):
    url, long = data_url(picture), "red green blue " * 3000
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    bomb = data_url(tmp_path / "bomb.png")
    text = [{"role": "user", "content": "red?"}]
    cases: list[tuple[list[Any], dict[str, Any], str, str]] = [
        (text, {"n": 2}, "n", "n: 2 is not supported here"),
        (text, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools: .* is not supported"),
        (text, {"temperature": -1}, "temperature", "greater than or equal to 0, found -1"),
        (text, {"extra_body": {"guided_regex": ".*"}}, "guided_regex", "guided_regex: .* is not supported"),
        (text, {"top_p": 0.5}, "top_p", "give temperature too"),
        (text, {"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
        (text, {"stop": ["a", ""]}, "stop", "stop at is empty"),
        (text, {"max_tokens": 5000}, "messages", "5000 after them exceed the limit of 4096"),
        ([{"role": "user", "content": long}], {}, "messages", "tokens and 24 after them exceed"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], {}, "messages", "'tool' is not known"),
        ([*text, *text], {}, "messages", "must alternate"),
        ([{"role": "user", "content": " "}], {}, "messages", "is empty"),
        (question("red?", "http://127.0.0.1/a.png"), {}, "messages", r"\[0\].image_url: http: addresses are not"),
        (question("red?", "file:///etc/passwd"), {}, "messages", "file: addresses are not fetched"),
        (question("red?", url[:-900]), {}, "messages", r"messages\[0\].content\[0\]: truncated"),
        (question("red?", "data:image/png;base64,AAAA"), {}, "messages", "not one of JPEG, PNG"),
        (question("red?", bomb), {}, "messages", "9000 x 9000 is above 64000000 pixels"),
        (question("red?", *[url] * 4), {}, "messages", "4 images, at most 3"),
        (
            [{"role": "system", "content": question("x", url)[0]["content"]}, *text],
            {},
            "messages",
            "belong to the user",
        ),
    ]
    for messages, options, param, message in cases:
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            chat(client, messages, **options)
        assert refused.value.param == param, message
    for prompt, message in (([0, 4096], "no token 4096"), ([0, 3], "stands for an image"), ("", "")):
        if message:
            with pytest.raises(openai.BadRequestError, match=message):
                client.completions.create(model="tiny", prompt=prompt)
    with pytest.raises(openai.BadRequestError, match="1260000 log-probabilities, at most 200000 are given at once"):
        client.completions.create(model="tiny", prompt=[[0] * 1000] * 60, echo=True, logprobs=20, max_tokens=0)
    with pytest.raises(openai.NotFoundError, match="'big' is not served"):
        client.completions.create(model="big", prompt="red")
    assert chat(client, text, user="me", n=1, presence_penalty=0, max_tokens=1, temperature=0, top_p=0.9).choices


def test_bodies_that_are_no_requests(server):
    good = b'{"prompt": "red", "max_tokens": 1}'
    assert post(server, "/v1/completions", good)[0] == 200
    for body in (b"", b"[]", b'{"prompt": "a", "prompt": "b"}', b"[" * 100_000, b'{"prompt": NaN}', b"\xff"):
        status, refused, _ = post(server, "/v1/completions", body)
        assert status == 400 and "body" in refused["error"]["message"], body[:20]
    assert post(server, "/v1/completions", b'{"prompt": "\\ud800"}')[0] == 400
    # Three times the limit is read to its end, so that the client, which sends all of it first, hears why.
    for size in (1 << 20, 3 << 20):
        assert post(server, "/v1/completions", b'"' + b"x" * size + b'"')[0] == 413
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    address = urlsplit(server.address)
    with socket.create_connection((address.hostname, address.port), timeout=PATIENCE_S) as waiting:
        waiting.sendall(head + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n")
        assert waiting.recv(100).startswith(b"HTTP/1.1 413 ")
    assert post(server, "/v1/nothing", good)[0] == 404
    for method, path, right in (
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("GET", "/v1/completions", {"POST"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
        ("DELETE", "/", {"GET", "HEAD"}),
    ):
        status, refused, headers = post(server, path, good, method=method)
        assert status == 405 and set(headers["allow"].split(", ")) == right, (method, path)
        assert "Method Not Allowed" in refused["error"]["message"]
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": "localhost:80.evil.example"}, 403),
        ({"Host": "me@localhost"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[x"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
    ):
        found, answer, _ = post(server, "/v1/completions", good, **headers)
        assert found == status and (status == 200 or answer["error"]["message"]), headers


def test_a_terminated_server_ends_its_answers_first(server, client):
    """The last test of this server."""
    stream = iter(client.completions.create(model="tiny", prompt="red", max_tokens=100, stream=True))
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.process.wait(600) == 0


def test_ctrl_c_ends_at_once(folder):
    with serving(folder) as running:
        stream = iter(running.client.completions.create(model="tiny", prompt="red", max_tokens=4000, stream=True))
        next(stream)
        assert running.end(signal.SIGINT) == [130]
        with pytest.raises((openai.APIError, StopIteration)):
            while True:
                next(stream)


def test_options_that_cannot_be(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, message in (
            (("--port", port), f"--port {port}: cannot listen there"),
            (("--port", "70000"), "--port: 70000 is no port"),
            (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
            (("--max-tokens", "5000", "--port", "0"), "--max-tokens: 5000 exceeds the model's 4096 positions"),
            (("--batch-size", "0"), "--batch-size: 0 must be at least 1"),
            (("--max-seconds", "nan"), "--max-seconds: nan is no time"),
        ):
            assert main(["serve", str(folder), "--device", "cpu", *words]) == 2
            assert message in capsys.readouterr().err
