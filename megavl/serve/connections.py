"""Connections with deadlines: one that brings no request, or takes nothing of an answer, is closed."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from megavl.serve.limits import HEAD_SECONDS, SEND_SECONDS

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedConnection(H11Protocol):
    """uvicorn's protocol, whose own timer runs between requests only and never for what is left to send."""

    most = 0
    """Connections at a time; further ones are closed. Set by `upto`."""
    _head_alarm: asyncio.TimerHandle | None = None
    _send_alarm: asyncio.TimerHandle | None = None

    @classmethod
    def upto(cls, most: int) -> type[BoundedConnection]:
        """The protocol for a server with this many connections at a time."""
        return type(cls.__name__, (cls,), {"most": most})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, if there is room for the connection."""
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most:
            transport.write(_FULL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        _off(self._head_alarm)
        _off(self._send_alarm)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """A request whose headers are complete has deadlines of its own."""
        if self.transport.is_closing():
            return
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _off(self._head_alarm)

    def on_response_complete(self) -> None:
        """Wait for the next request; what is left of the answer must leave in that time too."""
        self._await_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client takes less than is sent."""
        super().pause_writing()
        _off(self._send_alarm)
        self._send_alarm = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken it."""
        _off(self._send_alarm)
        super().resume_writing()

    def _await_head(self) -> None:
        _off(self._head_alarm)
        self._head_alarm = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def _off(alarm: asyncio.TimerHandle | None) -> None:
    if alarm is not None:
        alarm.cancel()
