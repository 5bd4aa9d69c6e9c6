"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megavl.config.errors import one_line
from megavl.foreign.parsing import Limit, parse_json
from megavl.foreign.printing import say, visible
from megavl.serve.fields import ChatFields, CompletionFields, Fields, read_fields
from megavl.serve.front import Front, until_gone
from megavl.serve.guard import Guard
from megavl.serve.limits import BODY_SECONDS, SEND_SECONDS
from megavl.serve.page import PAGE, POLICY
from megavl.serve.prompts import PromptReader
from megavl.serve.refusal import Refusal, excerpt
from megavl.serve.replies import ChatForm, CompletionForm, Piece, Reply, usage_of

_VALUES = 1_000_000
"""Values in the JSON of a request, such as token ids."""

_DISCARDED = 4
"""Times the largest body that are read and discarded of one that is too large, so that its client hears why."""

_PART = 1 << 16
"""Bytes of an answer that are sent at a time."""

T = TypeVar("T")
Form = ChatForm | CompletionForm


class Service:
    """The endpoints over one model."""

    def __init__(self, front: Front, reader: PromptReader, *, name: str) -> None:
        """`name` is how clients call the model."""
        self.front, self._reader, self._name = front, reader, name
        self._created = int(time.time())

    async def page(self, request: Request) -> Response:
        """The chat page."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def health(self, request: Request) -> Response:
        """Whether the server takes requests, how many it has, and how many answers are in progress."""
        if self.front.draining:
            return JSONResponse({"status": "ending"}, status_code=503)
        assert self.front.leader is not None, "the server has started"
        return JSONResponse({"status": "ok", "active": self.front.active, "answers": self.front.leader.in_progress})

    async def models(self, request: Request) -> Response:
        """The only model, alone or in a list."""
        limits = self.front.limits
        card = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "megavl",
            "max_model_len": limits.tokens,
            "max_images": limits.images,
        }
        wanted = request.path_params.get("name")
        if wanted is None:
            return JSONResponse({"object": "list", "data": [card]})
        self._require_name(wanted)
        return JSONResponse(card)

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""

        async def prepare(fields: ChatFields) -> list[Reply]:
            asked = await self._reader.chat(fields)
            return [Reply(asked, self._reader.processor, strip=True)]

        return await self._answer(request, ChatFields, prepare, ChatForm(self._name))

    async def completions(self, request: Request) -> Response:
        """`/v1/completions`."""

        async def prepare(fields: CompletionFields) -> list[Reply]:
            requests = await self._reader.completions(fields)
            echoes: Sequence[str | None] = [None] * len(requests)
            if fields.echo:
                echoes = await self._reader.echoes(fields.prompts, requests)
            return [
                Reply(asked, self._reader.processor, strip=False, echo=echo)
                for asked, echo in zip(requests, echoes, strict=True)
            ]

        return await self._answer(request, CompletionFields, prepare, CompletionForm(self._name))

    async def _answer(
        self, request: Request, kind: type[Fields], prepare: Callable[[Any], Awaitable[list[Reply]]], form: Form
    ) -> Response:
        with ExitStack() as admission:
            admission.enter_context(self.front.admitted())
            fields = await asyncio.to_thread(read_fields, kind, await self._body(request))
            if fields.model is not None:
                self._require_name(fields.model)
            replies = await prepare(fields)
            pieces = self.front.pieces(replies)
            answer: WholeAnswer | EventStream
            if fields.stream:
                answer = EventStream(pieces, replies, form, usage=fields.includes_usage)
                await _unless_gone(answer.begin(), request.receive)
            else:
                answer = WholeAnswer(await _unless_gone(_whole(pieces, replies, form), request.receive))
            answer.admission = admission.pop_all()
            return answer

    def _require_name(self, name: str) -> None:
        if name != self._name:
            raise Refusal(
                f"model: {excerpt(name, 200)!r} is not served here, only {self._name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _body(self, request: Request) -> Any:
        """The JSON of a request, within its limits of size and time."""
        most = self.front.limits.body
        refusal = Refusal(f"the request has more than {most} bytes; send less", status=413)
        announced = request.headers.get("content-length", "")
        if "expect" in request.headers and announced.isdecimal() and int(announced[:20]) > most:
            raise refusal

        async def read() -> bytes:
            parts, size = [], 0
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    parts.append(part)
                elif size > most * _DISCARDED:
                    break
            # A client that is still sending would lose the answer.
            if size > most:
                raise refusal
            return b"".join(parts)

        try:
            raw = await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise Refusal(f"the request took more than {BODY_SECONDS:g} seconds to arrive", status=408) from None
        try:
            return await asyncio.to_thread(parse_json, raw, limit=Limit(size=most, values=_VALUES))
        except ValueError as error:
            raise Refusal(f"the body is not JSON that can be read: {visible(one_line(error))}") from None


class WholeAnswer(Response):
    """A complete answer as JSON. A client that has gone, or takes nothing for a while, ends it."""

    def __init__(self, body: bytes) -> None:
        """`body` is JSON."""
        super().__init__(body, media_type="application/json")
        self.admission = ExitStack()
        """Left when the answer is sent, or ends otherwise."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self.admission:
            await _sent(self._send_all(send), receive)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send_parts(send, bytes(self.body))
        await _in_time(send, b"", more=False)


class EventStream(Response):
    """An answer as server-sent events. A client that has gone, or takes nothing for a while, ends it."""

    def __init__(
        self,
        pieces: AsyncIterator[tuple[int, Piece]],
        replies: Sequence[Reply],
        form: Form,
        *,
        usage: bool,
    ) -> None:
        """With `usage`, the numbers of tokens come last."""
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._pieces, self._replies, self._form, self._usage = pieces, replies, form, usage
        self._first: tuple[int, Piece] | None = None
        self.admission = ExitStack()
        """Left when the answer ends, however it does."""

    async def begin(self) -> None:
        """Wait for the first piece, so that what goes wrong before it has its own HTTP status."""
        self._first = await anext(self._pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await _sent(self._send_all(send), receive)
        finally:
            await self._pieces.aclose()  # type: ignore[attr-defined]
            self.admission.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for text in self._events():
            await _send_parts(send, text.encode())
        await _in_time(send, b"", more=False)

    async def _events(self) -> AsyncIterator[str]:
        usage: dict[str, Any] = {"usage": None} if self._usage else {}
        try:
            if (first := self._form.first()) is not None:
                yield _event({**first, **usage})
            assert self._first is not None, "the answer has begun"
            yield await self._chunk(*self._first, usage)
            async for index, piece in self._pieces:
                if piece:
                    yield await self._chunk(index, piece, usage)
            if self._usage:
                yield _event(self._form.usage(usage_of(self._replies)))
        except Refusal as refusal:
            yield _event(refusal.body)
        yield "data: [DONE]\n\n"

    async def _chunk(self, index: int, piece: Piece, usage: dict[str, Any]) -> str:
        def written() -> str:
            return _event({**self._form.chunk(index, piece), **usage})

        # The scores of a prompt come all at once.
        return await asyncio.to_thread(written) if len(piece.entries) > 1 else written()


class Gone(Exception):
    """The client has closed its connection."""


async def _unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of some work, which is cancelled when the client goes.

    Raises:
        Gone: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.wait({task, gone})


async def _sent(sending: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Send until it is done, or the client goes or takes nothing."""
    with suppress(Gone, asyncio.TimeoutError):
        await _unless_gone(sending, receive)


async def _send_parts(send: Send, body: bytes) -> None:
    """Send a part when the one before has left, so that a client that reads slowly is told from one that reads not."""
    for start in range(0, len(body), _PART):
        await _in_time(send, body[start : start + _PART], more=True)


async def _in_time(send: Send, part: bytes, *, more: bool) -> None:
    await asyncio.wait_for(send({"type": "http.response.body", "body": part, "more_body": more}), SEND_SECONDS)


async def _whole(pieces: AsyncIterator[tuple[int, Piece]], replies: Sequence[Reply], form: Form) -> bytes:
    parts: list[list[Piece]] = [[] for _ in replies]
    async with aclosing(pieces):  # type: ignore[type-var]
        async for index, piece in pieces:
            parts[index].append(piece)
    return await asyncio.to_thread(lambda: bytes(JSONResponse(form.whole(parts, usage_of(replies))).body))


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal), "registered for refusals"
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for Starlette's own errors"
    what = f"{request.method} {excerpt(request.url.path, 200)}: {error.detail}"
    response = await _refused(request, Refusal(what, status=error.status_code))
    # Of a wrong method, the right ones.
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    # Nobody reads it.
    return Response(status_code=499)


async def _failed(request: Request, error: Exception) -> Response:
    say(*"".join(traceback.format_exception(error)).splitlines(), to_errors=True)
    return await _refused(request, Refusal("the server failed; its own output says why", status=500))


def build_app(service: Service, guard: Guard) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The application with all its checks."""
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.models),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.completions, methods=["POST"]),
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _no_route,
            Gone: _gone,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    return guard.around(app)
