"""`build_corpus.py screens`: screenshots of web pages with their HTML."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus.output import new_folder
from data_tools.corpus.pairs.build import SourceOptions, build_from_sources
from data_tools.corpus.pairs.fonts import SYSTEM_FOLDERS, find_faces, needed_glyphs, supports_chinese
from data_tools.corpus.pairs.records import Pair, PairCommand, SourceResult
from data_tools.corpus.pairs.screens.browser import PageError, open_browser
from data_tools.corpus.pairs.screens.page_source import shown_source
from data_tools.corpus.pairs.sources import InputFormats, Source
from data_tools.corpus.scripts import script_of
from data_tools.pipeline.extras import require

FORMATS = InputFormats(suffixes={".html": "html", ".htm": "html"}, keys={"html": "html", "text": "html"})
CATEGORY = "conversion/code/ui"
COMMAND = PairCommand(
    name="screens",
    unit="page",
    category=CATEGORY,
    prompts={
        "latin": (
            "Write the HTML of this page.",
            "Which HTML and CSS produce this screenshot?",
            "Turn this user interface into code.",
        ),
        "chinese": ("请写出这个页面的 HTML。", "用 HTML 和 CSS 重现这张截图。", "把这个界面转换成代码。"),
    },
    licence="Pages and pictures carry the rights of their sources; see `source` in each record before passing them on.",
    packages=("playwright", "fonttools"),
)

WINDOWS = ((1280, 800), (1024, 768), (800, 600), (768, 1024), (390, 844))
"""Width and height in pixels: desktop, tablet, phone."""
MAX_HTML_CHARACTERS = 20_000
"""A longer source does not fit into a training sequence."""


@dataclass(frozen=True, kw_only=True)
class ScreenOptions(SourceOptions):
    """Options of the command."""

    browser: Path | None
    """Path of Chromium; None finds the installed one."""


def build_screens(output: Path, options: ScreenOptions) -> dict[str, int]:
    """Write screenshots and their records; returns the number of records by file.

    Raises:
        UsageError: Chromium, a package or an input is missing.
        DataError: there is no usable input, or Chinese text and no font for it.
    """
    require("playwright", extra="screens")
    require("fontTools")
    faces = [face for face in find_faces(SYSTEM_FOLDERS) if not face.is_placeholder]
    characters = frozenset[int]().union(*(face.characters for face in faces))
    with open_browser(options.browser) as browser, new_folder(output, force=options.force) as folder:

        def make(source: Source, text: str) -> SourceResult:
            result = SourceResult()
            html, words = shown_source(text)
            missing = needed_glyphs(words) - characters
            size = random.Random(f"screens/{options.seed}/{source.key}").choice(WINDOWS)
            if len(html) > MAX_HTML_CHARACTERS:
                result.dropped.add("source_too_long", source.name, f"{len(html)} characters")
            elif missing:
                result.dropped.add("no_glyph", source.name, " ".join(f"U+{code:04X}" for code in sorted(missing)[:5]))
            else:
                try:
                    image = browser.shoot(html, size=size)
                except PageError as error:
                    result.dropped.add(str(error), source.name)
                else:
                    answer = f"```html\n{html}```" if options.records == "llava" else html
                    extra = {"window": list(size)}
                    result.pairs.append(
                        Pair(source=source.name, image=image, text=answer, script=script_of(words), extra=extra)
                    )
            return result

        return build_from_sources(
            COMMAND,
            options,
            make,
            folder=folder,
            formats=FORMATS,
            settings={"chromium": browser.version},
            has_chinese_font=any(map(supports_chinese, faces)),
        )
