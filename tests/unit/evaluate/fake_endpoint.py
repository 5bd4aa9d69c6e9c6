"""A chat endpoint on this machine, whose replies a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeReply:
    """What the endpoint sends: a status, headers and a body, or a chat completion with a text."""

    text: str = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hang_up: bool = False
    """Close the connection without a reply."""
    promised: int | None = None
    """Content-Length, where it is a lie."""

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        return json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()


@dataclass
class FakeEndpoint:
    """Its URL, and every request that it got."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies, with the `Authorization` header under `key` and the path under `path`."""


@contextmanager
def fake_endpoint(reply: Callable[[dict[str, Any], int], FakeReply], *, port: int = 0) -> Iterator[FakeEndpoint]:
    """An HTTP server that answers with `reply(body, number of the request)`; numbers begin with 0."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(endpoint.requests)
                endpoint.requests.append({**body, "key": self.headers.get("Authorization"), "path": self.path})
            found = reply(body, number)
            if found.hang_up:
                self.close_connection = True
                return
            content = found.content()
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if found.promised is None else found.promised))
            self.end_headers()
            self.wfile.write(content)
            if found.promised is not None:
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    endpoint = FakeEndpoint(url=f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
