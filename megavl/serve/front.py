"""The side of the server that meets clients: admits requests, follows their tokens, and notices who has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import Receive

from megavl.serve.limits import Limits
from megavl.serve.refusal import Refusal
from megavl.serve.replies import Piece, Reply
from megavl.serve.turns import Event, Job, Leader


@dataclass(eq=False, kw_only=True)
class ClientJob(Job):
    """A job with what became of it; None says that its time is up."""

    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)


class Front:
    """Belongs to the thread of the event loop, but for `deliver`."""

    def __init__(self, limits: Limits) -> None:
        """Open to requests once `leader` is set and `loop` runs."""
        self.limits = limits
        self.leader: Leader | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.draining = False
        """Whether the server ends after what it has begun."""
        self._jobs: set[ClientJob] = set()
        self.active = 0
        """Requests that have been admitted and not answered yet."""

    def deliver(self, events: list[Event]) -> None:
        """Take the events of a turn from the thread of the engine."""
        assert self.loop is not None, "the engine runs jobs of this loop only"
        self.loop.call_soon_threadsafe(self._sort, events)

    def abandon(self) -> None:
        """Refuse what has not been answered; from the thread of the engine, once it answers no more."""
        self.draining = True
        if self.loop is not None and self.loop.is_running():
            self.loop.call_soon_threadsafe(self._refuse_all)

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """One of the requests that are answered or wait.

        Raises:
            Refusal: there are too many, or the server is about to end.
        """
        if self.draining:
            raise Refusal("the server is about to end; ask another one, or later", status=503, code="shutting_down")
        if self.active >= self.limits.rows + self.limits.waiting:
            raise Refusal(
                f"{self.active} requests are answered or wait, and no more are taken; ask again later",
                status=429,
                code="too_many_requests",
            )
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    async def pieces(self, replies: Sequence[Reply]) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers, each with the index of its prompt, as they come.

        Close the iterator to stop the answers. After the time of a request its answers end where they are.

        Raises:
            Refusal: the model failed, or no answer began in time.
        """
        assert self.leader is not None and self.loop is not None, "the server has started"
        job = ClientJob(requests=[reply.request for reply in replies])
        alarm = self.loop.call_later(self.limits.seconds, job.events.put_nowait, None)
        self._jobs.add(job)
        self.leader.submit(job)
        left = len(replies)
        try:
            while left:
                event = await job.events.get()
                if event is None:
                    for late in self._interrupted(replies):
                        yield late
                    return
                if event.chosen is None:
                    raise Refusal(event.problem, status=500)
                left -= event.chosen.last
                reply = replies[event.index]
                # A prompt may have thousands of tokens to label.
                scored = event.chosen.prompt
                yield (
                    event.index,
                    await asyncio.to_thread(reply.add, event.chosen) if scored else reply.add(event.chosen),
                )
        finally:
            alarm.cancel()
            self._jobs.discard(job)
            if left:
                self.leader.cancel(job)

    def _interrupted(self, replies: Sequence[Reply]) -> Iterator[tuple[int, Piece]]:
        if not any(reply.ids for reply in replies):
            raise Refusal(
                f"no answer began within {self.limits.seconds:g} seconds; ask again later", status=503, code="timeout"
            )
        for index, reply in enumerate(replies):
            if reply.finish is None:
                yield index, reply.interrupt()

    def _refuse_all(self) -> None:
        for job in self._jobs:
            job.events.put_nowait(Event(job=job, index=0, chosen=None, problem="the server has ended"))

    def _sort(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event.job, ClientJob):
                event.job.events.put_nowait(event)


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
