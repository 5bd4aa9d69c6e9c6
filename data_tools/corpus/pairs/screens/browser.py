"""Screenshots of web pages by headless Chromium, driven by Playwright.

Pages are untrusted. Scripts are off, and every request is answered here: with the page itself, with a grey picture for
an image, and with an error otherwise. The browser runs in its own sandbox; where bubblewrap works it runs inside that
too, without network and files.
"""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from data_tools.corpus.pairs.screens.isolation import isolation_problem, write_isolated_launcher
from megavl.config.errors import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "headless_shell")
ADDRESS = "http://page.invalid/"
"""Address of every page; the top-level domain is reserved and never resolves (RFC 2606)."""
POLICY = "default-src 'none'; img-src http: https: data:; style-src 'unsafe-inline'; font-src data:"
"""Content-Security-Policy that the browser enforces in addition to the answers given here."""
SECONDS = 20
"""Time limit for one page."""
MAX_PAGE_PIXELS = 4096
"""Largest width and height of a whole page."""
_FLAGS = (
    "--disable-gpu",
    "--disable-lcd-text",
    "--font-render-hinting=none",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)

T = TypeVar("T")


class PageError(Exception):
    """A page gives no usable picture; the message is the reason to count."""


@dataclass(kw_only=True)
class Browser:
    """A running Chromium, restarted when a page crashes it. Its methods may be called from any thread."""

    playwright: Any
    program: str
    loop: asyncio.AbstractEventLoop
    """Event loop of Playwright, which runs in a thread of its own."""
    browser: Any = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def version(self) -> str:
        """Version of Chromium."""
        return str(self.browser.version)

    def shoot(self, html: str, *, size: tuple[int, int]) -> bytes:
        """Take a screenshot of a whole page.

        Args:
            html: source of the page.
            size: width and height of the window.

        Returns:
            A PNG file.

        Raises:
            PageError: the page is too slow, too tall, of one colour, or crashes the browser.
        """
        return _wait(self._shoot_in_time(html, size), self.loop)

    async def _shoot_in_time(self, html: str, size: tuple[int, int]) -> bytes:
        import playwright.async_api as api

        for _ in range(2):
            try:
                return await asyncio.wait_for(self._shoot(await self.running(), html, size), SECONDS)
            except (asyncio.TimeoutError, api.TimeoutError) as error:
                raise PageError("too_slow") from error
            except api.Error:
                # Another page may have crashed the browser; the second failure is due to this one.
                continue
        raise PageError("not_shown")

    async def _shoot(self, browser: Any, html: str, size: tuple[int, int]) -> bytes:
        context = await browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            device_scale_factor=1,
            java_script_enabled=False,
            accept_downloads=False,
            service_workers="block",
            locale="en-US",
            timezone_id="UTC",
            reduced_motion="reduce",
        )
        try:

            async def answer(route: Any) -> None:
                request = route.request
                if request.url == ADDRESS and request.is_navigation_request():
                    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": POLICY}
                    await route.fulfill(status=200, headers=headers, body=html)
                elif request.resource_type == "image":
                    await route.fulfill(status=200, content_type="image/png", body=_grey())
                else:
                    await route.abort()

            await context.route("**/*", answer)
            page = await context.new_page()
            await page.goto(ADDRESS, wait_until="load", timeout=SECONDS * 1000)
            session = await context.new_cdp_session(page)
            metrics = await session.send("Page.getLayoutMetrics")
            if max(metrics["cssContentSize"]["height"], metrics["cssContentSize"]["width"]) > MAX_PAGE_PIXELS:
                raise PageError("too_tall")
            png = await page.screenshot(full_page=True, animations="disabled", caret="hide", type="png")
        finally:
            await context.close()
        return _rewritten(png)

    async def running(self) -> Any:
        """Playwright's browser, started if it does not run."""
        async with self.starting:
            if self.browser is None or not self.browser.is_connected():
                self.browser = await self.playwright.chromium.launch(
                    executable_path=self.program, chromium_sandbox=True, args=list(_FLAGS), timeout=60_000
                )
            return self.browser


@contextmanager
def open_browser(given: Path | None) -> Iterator[Browser]:
    """Start Chromium.

    Args:
        given: path of Chromium; None finds the installed one.

    Raises:
        UsageError: Chromium is not installed, cannot be isolated here, or does not start.
    """
    import playwright.async_api as api

    program = find_browser(given)
    problem = isolation_problem()
    if problem and os.geteuid() == 0:
        raise UsageError(f"screens: {problem}, and Chromium has no sandbox for root; run as an ordinary user")
    with tempfile.TemporaryDirectory(prefix="megavl-browser-") as folder, _event_loop() as loop:
        if not problem:
            program = write_isolated_launcher(program, folder=Path(folder))
        running = _wait(api.async_playwright().start(), loop)
        try:
            browser = Browser(playwright=running, program=program, loop=loop)
            try:
                _wait(browser.running(), loop)
            except api.Error as error:
                message = " ".join(str(error).split())[:300]
                raise UsageError(
                    f"screens: {program} does not start ({message}); name another with --browser"
                ) from error
            yield browser
            _wait(browser.browser.close(), loop)
        finally:
            _wait(running.stop(), loop)


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="playwright", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _wait(coroutine: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a coroutine in the thread of the event loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def find_browser(given: Path | None) -> str:
    """Path of Chromium.

    Raises:
        UsageError: Chromium is not found.
    """
    if given is not None:
        if not os.access(given, os.X_OK):
            raise UsageError(f"--browser {given}: is no program; give the path of Chromium")
        return str(given.absolute())
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        raise UsageError(
            "screens: Chromium is not installed (Debian: apt install chromium); install it or name it with --browser"
        )
    return found


def _rewritten(png: bytes) -> bytes:
    """The same picture in RGB, compressed by Pillow.

    Raises:
        PageError: the picture has only one colour.
    """
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")
    if image.getcolors(1) is not None:
        raise PageError("blank")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _grey() -> bytes:
    """A placeholder picture. It replaces images that are not embedded in the page."""
    buffer = io.BytesIO()
    Image.new("RGB", (320, 200), (190, 190, 190)).save(buffer, "PNG")
    return buffer.getvalue()
