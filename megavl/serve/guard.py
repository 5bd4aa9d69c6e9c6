"""Keeps web pages of other sites away from a server on this machine.

A page that a browser shows may send requests to any address, and read the answers if its own name resolves to this
machine (DNS rebinding). So the Host must be a name of the server, and a request of a page must come from the server's
own.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megavl.serve.refusal import Refusal, excerpt

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\s]+)(:[0-9]+)?")
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class Guard:
    """Checks of every request before its body is read."""

    def __init__(self, names: Collection[str]) -> None:
        """`names` are host names of this server; addresses are always allowed, for no name can pretend to be one."""
        self._names = frozenset(name.lower() for name in names)

    def around(self, app: ASGIApp) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        """The application with the checks, and with headers that browsers heed."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return

            async def send_with_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).update(_HEADERS)
                await send(message)

            try:
                self.check(Headers(scope=scope), method=scope["method"])
            except Refusal as refusal:
                await JSONResponse(refusal.body, status_code=refusal.status)(scope, receive, send_with_headers)
                return
            await app(scope, receive, send_with_headers)

        return guarded

    def check(self, headers: Headers, *, method: str) -> None:
        """Check the headers of a request.

        Raises:
            Refusal: it is meant for another host, comes from a page of another site, or is no JSON.
        """
        host = headers.get("host", "")
        if not self._is_own(host):
            raise Refusal(
                f"Host: {excerpt(host, 200)!r} is no name of this server; use its address, or start it with "
                "--allow-host NAME",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        foreign = origin is not None and _site(origin) != host.lower()
        if foreign or headers.get("sec-fetch-site") == "cross-site" and method != "GET":
            raise Refusal(
                f"Origin: {excerpt(origin or '', 200)!r} is another site, and its pages may not ask this server",
                status=403,
                code="origin_not_allowed",
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Refusal(f"Content-Type: {excerpt(kind, 200)!r} is not understood; send application/json", status=415)

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found["name"].strip("[]").lower()
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._names
        return True


def _site(origin: str) -> str | None:
    """Host and port of an origin; None where it has none that can be read."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None
