"""`build_corpus.py screens`: screenshots of web pages with the source that makes them."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.fonts import (
    NO_CHINESE_FONT,
    SYSTEM_FOLDERS,
    find_faces,
    is_stand_in,
    visible,
    writes_chinese,
)
from data_tools.corpus.pairs.records import Form, Pair, Prompts, RecordWriter
from data_tools.corpus.pairs.screens.browser import Browser, PageError, open_browser
from data_tools.corpus.pairs.screens.page_source import shown_source
from data_tools.corpus.pairs.sources import Dropped, Kind, Source, find_sources, heldout_sources, load
from data_tools.corpus.scripts import script_of
from data_tools.pipeline.extras import require
from megavl.config.errors import DataError

KIND = Kind(suffixes={".html": "html", ".htm": "html"}, keys={"html": "html", "text": "html"})

CATEGORY = "conversion/code/ui"
PROMPTS: Prompts = {
    "latin": (
        "Write the HTML of this page.",
        "Which HTML and CSS produce this screenshot?",
        "Turn this user interface into code.",
    ),
    "chinese": ("请写出这个页面的 HTML。", "用 HTML 和 CSS 重现这张截图。", "把这个界面转换成代码。"),
}
LICENCE = "Pages and pictures carry the rights of their sources; see `source` in each record before passing them on."

WINDOWS = ((1280, 800), (1024, 768), (800, 600), (768, 1024), (390, 844))
"""Width and height in pixels: desktop, tablet, telephone."""
LONGEST_SOURCE = 20_000
"""Characters; more do not fit into a training sequence."""


@dataclass(frozen=True, kw_only=True)
class ScreenOptions:
    """Settings of the command."""

    inputs: list[Path]
    browser: Path | None
    limit: int | None
    """Pages."""
    form: Form
    heldout: float
    seed: int
    workers: int
    """Pages open at the same time."""
    force: bool


def build_screens(output: Path, options: ScreenOptions) -> dict[str, int]:
    """Write screenshots and their records; returns records by file.

    Raises:
        UsageError: Chromium, a package or an input is missing.
        DataError: nothing usable, or Chinese pages and no font for them.
    """
    require("playwright", extra="screens")
    require("fontTools")
    return asyncio.run(_build(output, options))


async def _build(output: Path, options: ScreenOptions) -> dict[str, int]:
    dropped = Dropped()
    faces = [face for face in find_faces(SYSTEM_FOLDERS) if not is_stand_in(face)]
    characters = frozenset[int]().union(*(face.characters for face in faces))
    async with open_browser(options.browser) as browser:
        with new_folder(output, force=options.force) as folder:
            sources = find_sources(options.inputs, kind=KIND, dropped=dropped, limit=options.limit)
            chinese = next((source for source in sources if source.script == "chinese"), None)
            if chinese is not None and not any(writes_chinese(face) for face in faces):
                raise DataError(f"{chinese.name}: is written in Chinese, and {NO_CHINESE_FONT}")
            held = heldout_sources(sources, share=options.heldout, seed=options.seed)
            writer = RecordWriter(
                folder=folder, seed=options.seed, form=options.form, prompts=PROMPTS, dropped=dropped, category=CATEGORY
            )
            with writer, tqdm(total=len(sources), unit="page", desc="screens", disable=None) as progress:
                async for source, pair in _shots(sources, browser, options, characters, dropped):
                    if pair is not None:
                        writer.add(pair, split="heldout" if source.key in held else "train")
                    progress.update()
            settings = {"heldout": options.heldout, "pages": len(sources), "chromium": browser.browser.version}
            return writer.finish(
                kind="screens", options=settings, licence=LICENCE, packages=("playwright", "fonttools")
            )


async def _shots(
    sources: list[Source], browser: Browser, options: ScreenOptions, characters: frozenset[int], dropped: Dropped
) -> AsyncIterator[tuple[Source, Pair | None]]:
    """Sources with their pairs, in order; some pages are open at the same time."""
    waiting: deque[tuple[Source, asyncio.Task[tuple[Pair | None, Dropped]]]] = deque()
    rest = iter(sources)
    try:
        while True:
            while len(waiting) < options.workers and (source := next(rest, None)) is not None:
                waiting.append((source, asyncio.create_task(_shot(source, browser, options, characters))))
            if not waiting:
                return
            source, task = waiting.popleft()
            pair, lost = await task
            dropped.merge(lost)
            yield source, pair
    finally:
        for _, task in waiting:
            task.cancel()


async def _shot(
    source: Source, browser: Browser, options: ScreenOptions, characters: frozenset[int]
) -> tuple[Pair | None, Dropped]:
    """One page's pair, or why there is none."""
    dropped = Dropped()
    html, words = shown_source(load(source, kind=KIND))
    missing = visible(words) - characters
    size = random.Random(f"screens/{options.seed}/{source.key}").choice(WINDOWS)
    if len(html) > LONGEST_SOURCE:
        dropped.add("source_too_long", source.name, f"{len(html)} characters")
    elif missing:
        dropped.add("no_glyph", source.name, " ".join(f"U+{code:04X}" for code in sorted(missing)[:5]))
    else:
        try:
            image = await browser.shoot(html, size=size)
        except PageError as error:
            dropped.add(str(error), source.name)
        else:
            text = f"```html\n{html}```" if options.form == "llava" else html
            extra = {"window": list(size)}
            script = script_of(words)
            return Pair(source=source.name, image=image, text=text, script=script, extra=extra), dropped
    return None, dropped
