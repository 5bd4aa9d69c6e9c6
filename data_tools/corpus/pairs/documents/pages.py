"""From one document to its pages: typeset, rendered, and compared with the text of the record."""

from __future__ import annotations

import json
import random
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from data_tools.corpus.pairs.documents import page_worker
from data_tools.corpus.pairs.documents.blocks import read_blocks, weight
from data_tools.corpus.pairs.documents.elements import FORMULA, Element
from data_tools.corpus.pairs.documents.layout import Layout, choose_layout
from data_tools.corpus.pairs.documents.limited_process import PYTHON, Limits, run_limited
from data_tools.corpus.pairs.fonts import Fonts, needed_glyphs
from data_tools.corpus.pairs.records import Pair, SourceResult
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import Script

LIMITS = Limits(seconds=120, cpu_seconds=60, memory=6 << 30, file_size=256 << 20)
"""Limits for typesetting and rendering one part of a document."""

MAX_PART_BLOCKS, MAX_PART_WEIGHT = 60, 16_000
"""Blocks and characters of one part. A part begins on a new page, so a long document stays within the limits."""

MIN_PAGE_WEIGHT = 40
"""Characters; a page with fewer is dropped."""

_IGNORED = frozenset("-\u00ad\u2010\u2011•\x02\ufffe\uffff")
"""Hyphens, which the page adds at line ends, and list bullets, which differ in Markdown."""


def make_pages(
    text: str, *, name: str, format: str, script: Script, seed: str, fonts: Fonts, side: int
) -> SourceResult:
    """All usable pages of a document, in one layout; the same arguments give the same bytes.

    Args:
        text: source of the document.
        name: name of the document.
        format: `text`, `markdown`, `html` or `latex`.
        script: script of the text.
        seed: decides the layout.
        fonts: usable fonts; one must be Chinese if the script is.
        side: long side of a page in pixels.
    """
    result = SourceResult()
    layout = choose_layout(random.Random(seed), fonts, side=side, chinese=script == "chinese")
    blocks = []
    for block in read_blocks(text, format=format, name=name, dropped=result.dropped):
        missing = needed_glyphs(block.visible.replace(FORMULA, "")) - layout.characters
        if missing:
            result.dropped.add("no_glyph", name, " ".join(f"U+{code:04X}" for code in sorted(missing)[:5]))
        else:
            blocks.append(block)
    for part in _parts(blocks):
        for image, shown in _typeset(part, layout=layout, name=name, dropped=result.dropped):
            extra = {"page": len(result.pairs) + 1, "format": format, **layout.record_keys}
            result.pairs.append(Pair(source=name, image=image, text=shown, script=script, extra=extra))
    return result


def same_text(visible: str, *, expected: str) -> bool:
    """Whether a page shows the expected characters in order; a formula matches anything."""
    shown, position = _letters(visible), 0
    pieces = [_letters(piece) for piece in expected.split(FORMULA)]
    if len(pieces) == 1:
        return shown == pieces[0]
    for piece in pieces:
        position = shown.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


def _letters(text: str) -> str:
    return "".join(
        character
        for character in unicodedata.normalize("NFKC", text)
        if not character.isspace() and character not in _IGNORED
    )


def _parts(blocks: list[Element]) -> Iterator[list[Element]]:
    part: list[Element] = []
    size = 0
    for block in blocks:
        if part and (len(part) == MAX_PART_BLOCKS or size + weight(block.visible) > MAX_PART_WEIGHT):
            yield part
            part, size = [], 0
        part.append(block)
        size += weight(block.visible)
    if part:
        yield part


def _typeset(part: list[Element], *, layout: Layout, name: str, dropped: Dropped) -> Iterator[tuple[bytes, str]]:
    request = {
        "preamble": layout.preamble,
        "fonts": {word: [(face.path, face.index) for face in family.faces] for word, family in layout.families.items()},
        "blocks": [block.typst for block in part],
        "empty": layout.empty,
    }
    with tempfile.TemporaryDirectory(prefix="megavl-pages-") as folder:
        outcome = run_limited(
            [PYTHON, "-I", page_worker.__file__],
            request=json.dumps(request).encode(),
            limits=LIMITS,
            folder=Path(folder),
        )
    if not outcome.good:
        last = outcome.message.strip().rsplit("\n", 1)[-1]
        reason = "time" if outcome.timed_out else "exit"
        dropped.add("not_set", name, f"ended by {reason}, {last}")
        return
    line, _, files = outcome.output.partition(b"\n")
    answer = json.loads(line)
    for message in answer["failed"].values():
        dropped.add("block_not_set", name, message)
    for number in answer["overflow"]:
        dropped.add("overflow", name, part[number].visible)
    if not answer["pages"] and len(answer["failed"]) + len(answer["overflow"]) < len(part):
        dropped.add("too_many_pages", name)
    start = 0
    for page in answer["pages"]:
        image, start = files[start : start + page["size"]], start + page["size"]
        blocks = [part[number] for number in page["blocks"]]
        text = "\n\n".join(block.markdown for block in blocks)
        expected = " ".join(block.visible for block in blocks)
        if not page["clean"]:
            dropped.add("page_overflow", name)
        elif not same_text(page["visible"], expected=expected):
            dropped.add("text_differs", name, page["visible"])
        elif weight(text) < MIN_PAGE_WEIGHT:
            dropped.add("short", name)
        else:
            yield image, text
