"""A judge's endpoint: what is sent, what is asked again, and that every failure ends as an error."""

from __future__ import annotations

import base64
import socket
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megavl.config.errors import UsageError
from megavl.data.image import ImageError
from megavl.evaluate.endpoint import GIVE_UP, Endpoint, Prompt, data_url
from tests.unit.evaluate.fake_endpoint import FakeReply, fake_endpoint

ASKED = Prompt(text="Which is better?")


def endpoint(url: str, **options: Any) -> Endpoint:
    return Endpoint(url, "judge-1", **{"pause_s": 0.001, "attempts": 3, "timeout_s": 60.0, **options})


def test_request_has_model_images_and_temperature_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-1")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    with fake_endpoint(lambda body, number: FakeReply("fine")) as fake:
        prompt = Prompt(text="Which?", images=(tmp_path / "a.png",), system="Be fair.")
        reply = endpoint(fake.url, key_variable="SOME_KEY").ask(prompt)
    (sent,) = fake.requests
    assert (reply.text, reply.error, reply.attempts) == ("fine", "", 1)
    assert (sent["path"], sent["key"], sent["model"]) == ("/v1/chat/completions", "Bearer secret-1", "judge-1")
    assert sent["temperature"] == 0
    system, user = sent["messages"]
    assert system == {"role": "system", "content": "Be fair."}
    image, text = user["content"]
    assert text == {"type": "text", "text": "Which?"}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()


def test_no_key_sends_no_authorization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with fake_endpoint(lambda body, number: FakeReply("fine")) as fake:
        endpoint(fake.url).ask(ASKED)
    assert fake.requests[0]["key"] is None


@pytest.mark.parametrize(
    "bad",
    [
        FakeReply(status=429, headers={"Retry-After": "0"}),
        FakeReply(status=503, headers={"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
        FakeReply(status=500, body=b"<html>oops"),
        FakeReply(hang_up=True),
        FakeReply(body=b"{"),
        FakeReply(body=b'{"choices": []}'),
        FakeReply(body=b'{"choices": [{"message":', promised=500),
        FakeReply(body=b"\xff" * 100),
    ],
    ids=["rate", "date", "broken", "hang-up", "no json", "no choice", "truncated", "bytes"],
)
def test_passing_errors_are_asked_again(bad: FakeReply) -> None:
    with fake_endpoint(lambda body, number: bad if number < 2 else FakeReply("fine")) as fake:
        reply = endpoint(fake.url).ask(ASKED)
    assert (reply.text, reply.attempts) == ("fine", 3)
    with fake_endpoint(lambda body, number: bad) as fake:
        reply = endpoint(fake.url).ask(ASKED)
    assert reply.error and reply.outage and not reply.text
    assert len(fake.requests) == 3


def test_retry_after_is_waited_for() -> None:
    slow = FakeReply(status=429, headers={"Retry-After": "1"})
    with fake_endpoint(lambda body, number: slow if number < 1 else FakeReply("fine")) as fake:
        begun = time.monotonic()
        assert endpoint(fake.url).ask(ASKED).text == "fine"
    assert time.monotonic() - begun >= 1


def test_endless_retry_after_ends_the_question() -> None:
    with fake_endpoint(lambda body, number: FakeReply(status=429, headers={"Retry-After": "86400"})) as fake:
        assert endpoint(fake.url).ask(ASKED).error.startswith("HTTP 429")
    assert len(fake.requests) == 1


def test_refused_question_is_asked_once() -> None:
    body = b'{"error": {"message": "image is too large"}}'
    with fake_endpoint(lambda _, number: FakeReply(status=400, body=body)) as fake:
        reply = endpoint(fake.url).ask(ASKED)
    assert reply.error == "HTTP 400: image is too large"
    assert not reply.outage
    assert len(fake.requests) == 1


def test_redirect_is_not_followed() -> None:
    moved = FakeReply(status=302, headers={"Location": "http://127.0.0.1:1/elsewhere"}, body=b"")
    with fake_endpoint(lambda body, number: moved) as fake:
        assert endpoint(fake.url).ask(ASKED).error == "HTTP 302"
    assert len(fake.requests) == 1


def test_key_is_blotted_out_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    body = b'{"error": {"message": "Incorrect API key provided: sk-secret"}}'
    with fake_endpoint(lambda _, number: FakeReply(status=401, body=body)) as fake:
        error = endpoint(fake.url).ask(ASKED).error
    assert "sk-secret" not in error
    assert "OPENAI_API_KEY" in error


@pytest.mark.parametrize("content", ["null", '""', '" "', "7"])
def test_reply_without_text_is_an_error(content: str) -> None:
    body = f'{{"choices": [{{"message": {{"content": {content}}}}}]}}'.encode()
    with fake_endpoint(lambda _, number: FakeReply(body=body)) as fake:
        assert endpoint(fake.url).ask(ASKED).error == "the reply has no text"


def test_huge_reply_is_not_read() -> None:
    with fake_endpoint(lambda body, number: FakeReply(body=b" " * (5 << 20))) as fake:
        assert "more than 4,194,304 bytes" in endpoint(fake.url, attempts=1).ask(ASKED).error


def test_dripping_reply_ends_in_time() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not ended.wait(0.05):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "took more than 0.5 s" in endpoint(url, attempts=1, timeout_s=0.5).ask(ASKED).error
    finally:
        ended.set()
        server.close()
        thread.join()


def test_absent_endpoint_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    replies = dict(endpoint(url, attempts=1).ask_all([ASKED] * (GIVE_UP + 30), workers=2))
    assert sorted(replies) == list(range(GIVE_UP + 30))
    assert all(reply.error for reply in replies.values())
    assert "given up" in replies[GIVE_UP + 29].error


def test_noisy_endpoint_answers_every_question() -> None:
    def noisy(body: dict[str, Any], number: int) -> FakeReply:
        return FakeReply(body["messages"][0]["content"]) if number % 3 else FakeReply(status=500)

    with fake_endpoint(noisy) as fake:
        asked = [Prompt(text=f"question {number}") for number in range(40)]
        replies = dict(endpoint(fake.url, attempts=9).ask_all(asked))
    assert [replies[number].text for number in range(40)] == [prompt.text for prompt in asked]


def test_left_questions_wait_for_no_request() -> None:
    release, ended = threading.Event(), list[int]()

    def held(body: dict[str, Any], number: int) -> FakeReply:
        if number:
            release.wait(60)
            ended.append(number)
        return FakeReply("fine")

    before = set(threading.enumerate())
    with fake_endpoint(held) as fake:
        replies = endpoint(fake.url, timeout_s=120).ask_all([ASKED] * 3, workers=2)
        assert next(replies)[1].text == "fine"
        replies.close()  # type: ignore[attr-defined]
        assert not ended
        # The interpreter waits for others at its end.
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)
        release.set()


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://a b/", "http://h:99999/", "x"]
)
def test_unusable_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="is no URL"):
        endpoint(url)


def test_password_in_the_url_is_refused() -> None:
    with pytest.raises(UsageError, match="holds a password") as caught:
        endpoint("https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("https://h/api?version=2", "https://h/api/chat/completions?version=2"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ],
)
def test_url_leads_to_chat_completions(url: str, asked: str) -> None:
    assert endpoint(url).url == asked


def test_other_image_formats_become_png(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.bmp")
    assert data_url(tmp_path / "a.bmp").startswith("data:image/png;base64,")
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ImageError):
        data_url(tmp_path / "b.png")
