"""A chat endpoint that speaks OpenAI's protocol, asked for judgements: `POST URL/chat/completions`.

A question ends as a reply with a text or with an error; nothing that the endpoint does raises. The key comes from an
environment variable alone, and is blotted out of every message.

Source of the protocol: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import base64
import email.utils
import json
import os
import queue
import random
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from megavl.config.errors import UsageError, one_line
from megavl.config.evaluation import KEY_VARIABLE
from megavl.data.image import check_image, decode_image
from megavl.foreign.parsing import Limit, parse_json
from megavl.foreign.reading import read_limited

REPLY = Limit(size=4 << 20, values=100_000)
"""The largest body of a reply that is read."""
IMAGE_BYTES = 64 << 20
"""The largest image file that is sent."""
LONGEST_PAUSE_S = 120.0
"""Between two attempts; an endpoint that asks for more in `Retry-After` is given up for this question."""
GIVE_UP = 10
"""Questions in a row that the endpoint failed to answer, after which no more are asked."""
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
_TRANSIENT = (408, 409, 425, 429)
_REFUSED = (401, 403, 404)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One question for the endpoint."""

    text: str
    images: tuple[Path, ...] = ()
    """Files, shown before the text."""
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of one question: a text, or an error."""

    text: str = ""
    error: str = ""
    """Why there is no text; empty where there is one."""
    outage: bool = False
    """Whether the error is the endpoint's and not the question's: no connection, overload, a refused key."""
    attempts: int = 1


class Endpoint:
    """A model at a URL. May be used from several threads."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = KEY_VARIABLE,
        max_tokens: int = 1024,
        attempts: int = 5,
        timeout_s: float = 120.0,
        pause_s: float = 1.0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: base URL such as `https://api.openai.com/v1`; without a path, `/v1` is added.
            model: name of the model there.
            key_variable: environment variable with the key; without it no key is sent.
            max_tokens: most tokens of a reply.
            attempts: requests for one question, where an error may pass.
            timeout_s: longest time of one request, in seconds.
            pause_s: before the second attempt, in seconds; doubled before each further one.

        Raises:
            UsageError: the URL cannot be used, or the extra `judge` is not installed.
        """
        self.url, self.model, self.max_tokens = _chat_url(url), model, max_tokens
        self._key, self._key_variable = os.environ.get(key_variable, "").strip(), key_variable
        self._attempts, self._timeout_s, self._pause_s = attempts, timeout_s, pause_s
        self._urllib3 = _urllib3()
        self._pool = self._connections()

    def ask(self, prompt: Prompt) -> Reply:
        """Ask one question, again where an error may pass.

        Raises:
            OSError, ValueError: an image cannot be read.
        """
        return self._ask(prompt, threading.Event())

    def _ask(self, prompt: Prompt, stopped: threading.Event) -> Reply:
        """One question, no more of whose requests are sent once `stopped` is set."""
        reply = Reply(error="not asked: the endpoint was given up", outage=True, attempts=0)
        if stopped.is_set():
            return reply
        body = self._body(prompt)
        for attempt in range(1, self._attempts + 1):
            if stopped.is_set():
                return reply
            reply, again_after = self._attempt(body, attempt)
            if again_after is None or attempt == self._attempts:
                return reply
            # Spread, so that questions that were refused together do not come back together.
            pause = max(again_after, self._pause_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
            if again_after > LONGEST_PAUSE_S:
                return reply
            stopped.wait(min(pause, LONGEST_PAUSE_S))
        return reply

    def ask_all(self, prompts: Sequence[Prompt], *, workers: int = 4) -> Iterator[tuple[int, Reply]]:
        """Ask many questions, some at a time. Yields each one's index and reply as they come.

        After `GIVE_UP` outages in a row no more questions are asked, and the rest ends as errors.

        Raises:
            OSError, ValueError: an image cannot be read.
        """
        stopped, done = threading.Event(), queue.SimpleQueue[tuple[int, Reply | Exception]]()
        numbers = iter(range(len(prompts)))

        def work() -> None:
            for number in numbers:
                try:
                    done.put((number, self._ask(prompts[number], stopped)))
                except Exception as error:  # raised again where replies are read
                    done.put((number, error))

        # Daemons: a request in flight ends with the process, which does not wait for its reply.
        for _ in range(min(workers, len(prompts))):
            threading.Thread(target=work, daemon=True).start()
        outages = 0
        try:
            for _ in prompts:
                number, reply = done.get()
                if isinstance(reply, Exception):
                    raise reply
                # An error of the question says nothing about the endpoint.
                outages = outages + 1 if reply.outage else outages if reply.error else 0
                if outages >= GIVE_UP:
                    stopped.set()
                yield number, reply
        finally:
            stopped.set()

    def _attempt(self, body: bytes, attempt: int) -> tuple[Reply, float | None]:
        """One request: its reply, and the seconds after which it may be repeated, or None."""
        try:
            status, headers, content = self._post(body)
        except (self._urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            # A reply that breaks off or never ends may be whole the next time.
            text = self._clean(f"{type(error).__name__}: {one_line(error)}")
            return Reply(error=text, outage=True, attempts=attempt), 0.0
        if status == 200:
            return self._read(content, attempt=attempt)
        passing = status in _TRANSIENT or status >= 500
        said = self._clean(_message(content))
        hint = f"; is the key in {self._key_variable} right?" if status in (401, 403) else ""
        reply = Reply(
            error=f"HTTP {status}{': ' + said if said else ''}{hint}",
            outage=passing or status in _REFUSED or status < 400,
            attempts=attempt,
        )
        return reply, _retry_after(headers.get("Retry-After", "")) if passing else None

    def _read(self, content: bytes, *, attempt: int) -> tuple[Reply, float | None]:
        try:
            text = parse_json(content, limit=REPLY)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            shown = self._clean(content[:200].decode("utf-8", "replace"))
            return Reply(error=f"the reply is no chat completion: {shown!r}", outage=True, attempts=attempt), 0.0
        if not isinstance(text, str) or not text.strip():
            return Reply(error="the reply has no text", attempts=attempt), None
        return Reply(text=text, attempts=attempt), None

    def _post(self, body: bytes) -> tuple[int, Any, bytes]:
        """Status, headers and content of one request.

        Raises:
            urllib3.exceptions.HTTPError, OSError, ValueError: no connection, or a reply that is too slow or too large.
        """
        until = time.monotonic() + self._timeout_s
        # Without compression: a small reply could unfold to a huge one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        response = self._pool.request(
            "POST",
            self.url,
            body=body,
            headers=headers,
            timeout=self._timeout_s,
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
        )
        try:
            parts, size = [], 0
            while part := response.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if size > REPLY.size:
                    raise ValueError(f"the reply has more than {REPLY.size:,} bytes")
                if time.monotonic() > until:
                    raise TimeoutError(f"the reply took more than {self._timeout_s:g} s")
        except BaseException:
            # What is left of the reply must not be read as the next one.
            response.close()
            raise
        response.release_conn()
        return response.status, response.headers, b"".join(parts)

    def _body(self, prompt: Prompt) -> bytes:
        images = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in prompt.images]
        content: Any = [*images, {"type": "text", "text": prompt.text}] if images else prompt.text
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": content})
        fields = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self.max_tokens}
        return json.dumps(fields).encode()

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _connections(self) -> Any:
        address = urlsplit(self.url)
        proxy = None
        if not urllib.request.proxy_bypass(address.hostname or ""):
            proxy = urllib.request.getproxies().get(address.scheme)
        try:
            return self._urllib3.ProxyManager(proxy, maxsize=64) if proxy else self._urllib3.PoolManager(maxsize=64)
        except (self._urllib3.exceptions.HTTPError, ValueError) as error:
            raise UsageError(f"{address.scheme}_proxy: {proxy}: {one_line(error)}; correct the proxy's URL") from error


def data_url(path: Path) -> str:
    """An image file as a data URL; formats that endpoints do not read become PNG.

    Raises:
        OSError, ValueError: the file is missing, too large, or no image.
    """
    data = read_limited(path, limit=IMAGE_BYTES)
    mime = _SENT_AS_THEY_ARE.get(check_image(data).format)
    if mime is None:
        buffer = BytesIO()
        decode_image(data).save(buffer, "PNG")
        data, mime = buffer.getvalue(), "image/png"
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _urllib3() -> ModuleType:
    try:
        import urllib3
    except ImportError as error:
        raise UsageError("--endpoint: urllib3 is not installed; pip install 'megavl[judge]'") from error
    return urllib3


def _chat_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(char.isspace() or not char.isprintable() for char in url):
        raise UsageError(f"--endpoint: {url!r} is no URL; give one such as https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"--endpoint: {parts.hostname}: the URL holds a password; put the key into {KEY_VARIABLE}")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def _message(content: bytes) -> str:
    """What the endpoint says about an error: `error.message` of its JSON, or the beginning of the body."""
    try:
        value = parse_json(content, limit=REPLY)
        error = value["error"] if isinstance(value, dict) and "error" in value else value
        text = error["message"] if isinstance(error, dict) and "message" in error else error
    except ValueError:
        text = content[:300].decode("utf-8", "replace")
    return " ".join(str(text).split())[:300]


def _retry_after(value: str) -> float:
    """Seconds that a `Retry-After` header asks for: a number, or a date."""
    if value.strip().isdecimal():
        return float(value.strip()[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
