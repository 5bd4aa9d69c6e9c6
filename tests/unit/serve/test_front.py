"""What clients get when the model is silent, the time is up, or they take nothing themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from megavl.generate.decode import Chosen, Request
from megavl.serve import app
from megavl.serve.app import EventStream, WholeAnswer
from megavl.serve.front import Front
from megavl.serve.limits import Limits
from megavl.serve.refusal import Refusal
from megavl.serve.replies import CompletionForm, Reply
from megavl.serve.turns import Event, Job


class Silent:
    """A leader that gives each job one token, if it has any, and then nothing."""

    def __init__(self, front: Front, token: int | None) -> None:
        self.front, self.token = front, token
        self.cancelled: list[Job] = []

    def submit(self, job: Job) -> None:
        if self.token is not None:
            chosen = Chosen(number=0, token=self.token, last=False)
            self.front.deliver([Event(job=job, index=0, chosen=chosen)])

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)


class Words:
    """A processor with a tokenizer of one word."""

    end_ids = (0,)

    @property
    def tokenizer(self) -> Words:
        return self

    vocab_size, control_ids = 10, frozenset({0})

    def decode(self, ids: list[int]) -> str:
        return "red " * len(ids)


def run(
    work: Callable[[Front, Silent, list[Reply]], Awaitable[None]], *, token: int | None, seconds: float = 3600
) -> Silent:
    """Run some work with a server of one silent model."""

    async def inside() -> Silent:
        front = Front(Limits(tokens=64, rows=1, waiting=1, seconds=seconds))
        leader = Silent(front, token)
        front.leader, front.loop = leader, asyncio.get_running_loop()  # type: ignore[assignment]
        request = Request(ids=[1, 2], max_new_tokens=9)
        await work(front, leader, [Reply(request, Words(), strip=False)])  # type: ignore[arg-type]
        return leader

    return asyncio.run(inside())


def test_no_answer_in_time_is_refused() -> None:
    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        with pytest.raises(Refusal, match="no answer began within 0.01 seconds") as refused:
            await anext(front.pieces(replies))
        assert refused.value.status == 503 and "Retry-After" in refused.value.headers

    assert len(run(work, token=None, seconds=0.01).cancelled) == 1


def test_an_answer_ends_with_its_time() -> None:
    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        found = [piece async for _, piece in front.pieces(replies)]
        assert [piece.finish for piece in found] == [None, "length"]
        assert "".join(piece.text for piece in found) == "red "

    assert len(run(work, token=3, seconds=0.2).cancelled) == 1


def test_an_ending_server_refuses_what_is_left() -> None:
    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        asyncio.get_running_loop().call_later(0.01, front.abandon)
        with pytest.raises(Refusal, match="the server has ended"):
            await anext(front.pieces(replies))
        with pytest.raises(Refusal, match="about to end"), front.admitted():
            pass

    run(work, token=None)


def test_requests_beyond_the_queue_are_refused() -> None:
    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        with front.admitted(), front.admitted(), pytest.raises(Refusal) as refused, front.admitted():
            pass
        assert refused.value.status == 429 and front.active == 0

    run(work, token=None)


@pytest.mark.parametrize("gone", [True, False])
def test_a_client_that_goes_or_takes_nothing_is_left(gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is cancelled and its slot freed, whether it closes the connection or only stops reading."""
    monkeypatch.setattr(app, "SEND_SECONDS", 0.05)
    sent: list[dict[str, Any]] = []

    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        async def receive() -> dict[str, Any]:
            if not gone:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)
            if message.get("body"):
                await asyncio.Event().wait()

        stream = EventStream(front.pieces(replies), replies, CompletionForm("tiny"), usage=False)
        await stream.begin()
        stream.admission.enter_context(front.admitted())
        await stream({"type": "http"}, receive, send)  # type: ignore[arg-type]
        assert front.active == 0

    assert len(run(work, token=3).cancelled) == 1
    if not gone:
        assert json.loads(sent[1]["body"][6:])["choices"][0]["text"] == "red "


@pytest.mark.parametrize("gone", [True, False])
def test_a_whole_answer_holds_its_slot_until_sent(gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third part of it finds no reader."""
    monkeypatch.setattr(app, "SEND_SECONDS", 0.05)
    sent: list[bytes] = []

    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            assert front.active == 1
            sent.append(message.get("body", b""))
            if len(sent) == 4:
                left.set() if gone else None
                await asyncio.Event().wait()

        answer = WholeAnswer(b"x" * 1_000_000)
        answer.admission.enter_context(front.admitted())
        await answer({"type": "http"}, receive, send)  # type: ignore[arg-type]
        assert front.active == 0

    run(work, token=None)
    assert len(sent) == 4 and all(len(part) <= 1 << 16 for part in sent)


def test_a_whole_answer_arrives_complete() -> None:
    sent: list[dict[str, Any]] = []
    body = bytes(range(256)) * 1000

    async def work(front: Front, leader: Silent, replies: list[Reply]) -> None:
        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        answer = WholeAnswer(body)
        answer.admission.enter_context(front.admitted())
        await answer({"type": "http"}, asyncio.Event().wait, send)  # type: ignore[arg-type]
        assert front.active == 0

    run(work, token=None)
    assert b"".join(message.get("body", b"") for message in sent) == body
    assert (b"content-length", b"256000") in sent[0]["headers"] and not sent[-1]["more_body"]
