"""Pictures of web pages by headless Chromium, driven by Playwright.

A page is untrusted: scripts are off, every request is answered here (the page itself, a grey picture for each image,
nothing else), and the browser runs in its own sandbox, inside bubblewrap where that works: no network, no files.
"""

from __future__ import annotations

import asyncio
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.corpus.pairs.sandbox import NOBODY, bind_system, isolation_problem
from megavl.config.errors import UsageError

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "headless_shell")
ADDRESS = "http://page.invalid/"
"""Of every page; the ending is reserved and never resolves (RFC 2606)."""
POLICY = "default-src 'none'; img-src http: https: data:; style-src 'unsafe-inline'; font-src data:"
"""Content-Security-Policy: what a page may use, enforced by the browser besides the answers given here."""
SECONDS = 20
"""For one page."""
TALLEST = 4096
"""Pixels of a whole page."""
_FLAGS = (
    "--disable-gpu",
    "--disable-lcd-text",
    "--font-render-hinting=none",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class PageError(Exception):
    """A page without a usable picture; the message is the reason under which it is counted."""


@dataclass(kw_only=True)
class Browser:
    """A running Chromium, started again when a page takes it down."""

    playwright: Any
    program: str
    browser: Any = None
    starting: asyncio.Lock

    async def shoot(self, html: str, *, size: tuple[int, int]) -> bytes:
        """PNG of a whole page in a window of some width and height.

        Raises:
            PageError: too slow, too tall, of one colour, or more than the browser bears.
        """
        import playwright.async_api as api

        for _ in range(2):
            try:
                return await asyncio.wait_for(self._shoot(await self._running(), html, size), SECONDS)
            except (asyncio.TimeoutError, api.TimeoutError) as error:
                raise PageError("too_slow") from error
            except api.Error:
                # Another page may have taken the browser down; a second time it is this one.
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
            if metrics["cssContentSize"]["height"] > TALLEST or metrics["cssContentSize"]["width"] > TALLEST:
                raise PageError("too_tall")
            png = await page.screenshot(full_page=True, animations="disabled", caret="hide", type="png")
        finally:
            await context.close()
        return _rewritten(png)

    async def _running(self) -> Any:
        async with self.starting:
            if self.browser is None or not self.browser.is_connected():
                self.browser = await self.playwright.chromium.launch(
                    executable_path=self.program, chromium_sandbox=True, args=list(_FLAGS), timeout=60_000
                )
            return self.browser


@asynccontextmanager
async def open_browser(given: Path | None) -> AsyncIterator[Browser]:
    """Start Chromium.

    Args:
        given: its program; by default the one that is installed.

    Raises:
        UsageError: it is not installed, cannot be shut off here, or does not start.
    """
    import playwright.async_api as api

    program = find_browser(given)
    problem = isolation_problem()
    if problem and os.geteuid() == 0:
        raise UsageError(f"screens: {problem}, and Chromium has no sandbox for root; run as an ordinary user")
    with tempfile.TemporaryDirectory(prefix="megavl-browser-") as folder:
        if not problem:
            program = _isolated(program, folder=Path(folder))
        async with api.async_playwright() as running:
            browser = Browser(playwright=running, program=program, starting=asyncio.Lock())
            try:
                await browser._running()
            except api.Error as error:
                message = " ".join(str(error).split())[:300]
                raise UsageError(
                    f"screens: {program} does not start ({message}); name another with --browser"
                ) from error
            yield browser
            await browser.browser.close()


def find_browser(given: Path | None) -> str:
    """Path of Chromium.

    Raises:
        UsageError: there is none.
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


def _isolated(program: str, *, folder: Path) -> str:
    """A program that starts Chromium inside bubblewrap; Chromium's own sandbox works in there."""
    options = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    options += ["--die-with-parent", "--uid", str(NOBODY), "--gid", str(NOBODY), *bind_system()]
    for name in ("/opt", "/etc/chromium", "/etc/chromium.d"):
        options += ["--ro-bind-try", name, name]
    options += ["--tmpfs", "/tmp", "--setenv", "HOME", "/tmp"]
    if not program.startswith(("/usr/", "/opt/")):
        parent = str(Path(program).resolve().parent)
        options += ["--ro-bind", parent, parent]
        program = str(Path(program).resolve())
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*options, "--", program])} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def _rewritten(png: bytes) -> bytes:
    """The same picture as RGB, in Pillow's compression.

    Raises:
        PageError: it is of one colour.
    """
    image = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")
    if image.getcolors(1) is not None:
        raise PageError("blank")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _grey() -> bytes:
    """What stands for every picture that is not in the page itself."""
    buffer = io.BytesIO()
    Image.new("RGB", (320, 200), (190, 190, 190)).save(buffer, "PNG")
    return buffer.getvalue()
