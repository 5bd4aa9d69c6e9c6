"""Start and end of the server: the socket, the thread that serves clients, signals and exit codes."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from megavl.config.errors import EXIT_INTERRUPTED, UsageError
from megavl.foreign.printing import say
from megavl.generate.pretrained import Model
from megavl.serve.app import Service, build_app
from megavl.serve.connections import BoundedConnection
from megavl.serve.front import Front
from megavl.serve.guard import Guard
from megavl.serve.limits import Limits
from megavl.serve.plan import PlanChannel
from megavl.serve.prompts import PromptReader
from megavl.serve.turns import Leader, Turns, follow

GRACE_S = 25.0
"""Time after SIGTERM in which answers may end; launchers kill after 30 s."""
_LEAVE_S = 5
"""Time in which clients may take the last of their answers."""
_BACKLOG = 256


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the server listens, and how it may be called."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    names: Sequence[str] = ()
    """Further names of the host."""

    def open(self) -> socket.socket:
        """The socket, on which nobody is answered yet.

        Raises:
            UsageError: the host is not this machine, or the port is taken.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, _, _, address = found[0]
            listener = socket.socket(family, kind)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except (OSError, UnicodeError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"--host {self.host} --port {self.port}: cannot listen there ({reason}); choose another port, or 0 for "
                "any free one"
            ) from error
        return listener

    def guard(self) -> Guard:
        """Checks with the names of this server."""
        own = (socket.gethostname(), socket.getfqdn()) if not self.is_loopback else ()
        return Guard(["localhost", self.host, *own, *self.names])

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def serve(
    model: Model,
    *,
    name: str,
    limits: Limits,
    listener: socket.socket | None,
    guard: Guard,
    system: str | None = None,
) -> int:
    """Serve until a signal ends it. Every rank calls it.

    Args:
        name: how clients call the model.
        listener: on rank 0; None on the others.
        system: system text of chats that bring none; None for the model's.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C; on every rank.

    Raises:
        NumericsError: the model's logits are not finite.
        PeerError: the thread that serves clients has ended.
        UsageError: there is not enough memory; once answers are in progress, with several ranks only.
    """
    channel = PlanChannel(model.processor.tokenizer)
    turns = Turns(model, rows=limits.rows, length=limits.tokens, images=limits.images)
    if listener is None:
        # Rank 0 gets the same signals and ends all ranks together.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return follow(turns, channel)
    front = Front(limits)
    app = build_app(Service(front, PromptReader(model.processor, limits, system=system), name=name), guard)
    http = _HttpThread(app, listener, front)
    leader = front.leader = Leader(turns, channel, deliver=front.deliver, healthy=http.is_alive)
    with _signals(leader, front):
        http.start()
        http.ready.wait()
        host, port = listener.getsockname()[:2]
        say(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends)")
        try:
            return leader.run()
        finally:
            http.leave()


class _HttpThread(threading.Thread):
    """uvicorn with its event loop."""

    def __init__(self, app: ASGIApp, listener: socket.socket, front: Front) -> None:
        super().__init__(name="http", daemon=True)
        config = uvicorn.Config(
            app,
            http=BoundedConnection.upto(front.limits.connections),
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LEAVE_S,
        )
        self._server, self._listener, self._front = uvicorn.Server(config), listener, front
        self.ready = threading.Event()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:
            self.ready.set()

    async def _serve(self) -> None:
        self._front.loop = asyncio.get_running_loop()
        self._listener.listen(_BACKLOG)
        self.ready.set()
        await self._server.serve(sockets=[self._listener])

    def leave(self) -> None:
        """Let clients take what is ready, then close their connections."""
        self._front.abandon()
        self._server.should_exit = True
        self.join(_LEAVE_S + 5)


@contextmanager
def _signals(leader: Leader, front: Front) -> Iterator[None]:
    """SIGINT ends at once, SIGTERM after the answers in progress."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        front.draining = True
        leader.end(EXIT_INTERRUPTED)

    def drain(number: int, frame: FrameType | None) -> None:
        if not front.draining:
            front.draining = True
            threading.Thread(target=_end_when_done, args=(leader, front), daemon=True).start()

    handlers = {signal.SIGINT: interrupt, signal.SIGTERM: drain}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_when_done(leader: Leader, front: Front) -> None:
    say("ending after the answers in progress", to_errors=True)
    deadline = time.monotonic() + GRACE_S
    while front.active and time.monotonic() < deadline:
        time.sleep(0.05)
    leader.end(0)
