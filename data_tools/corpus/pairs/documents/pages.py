"""From one document to its pages: set, drawn, and compared with what the record says."""

from __future__ import annotations

import json
import random
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus.pairs.documents import page_worker
from data_tools.corpus.pairs.documents.blocks import read_blocks, weight
from data_tools.corpus.pairs.documents.layout import Layout, draw_layout
from data_tools.corpus.pairs.documents.wording import FORMULA, Wording
from data_tools.corpus.pairs.fonts import FontBook, visible
from data_tools.corpus.pairs.sandbox import PYTHON, Limits, run_limited
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import Script

LIMITS = Limits(seconds=120, cpu_seconds=60, memory=6 << 30, file_size=64 << 20, output=256 << 20)
"""Of setting and drawing one part of a document."""

PART_BLOCKS, PART_WEIGHT = 60, 16_000
"""Blocks and characters of one part; a part begins on a new page, so that a long document stays within the limits."""

SHORTEST = 40
"""Characters of a page; emptier ones are left out."""

_IGNORED = frozenset("-\u00ad\u2010\u2011•\x02\ufffe\uffff")
"""Hyphens that the page adds at line ends, and the bullets of lists, for which Markdown has another sign."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """One page image and its text."""

    image: bytes
    text: str
    number: int
    layout: Layout


def make_pages(
    text: str, *, name: str, format: str, script: Script, seed: str, book: FontBook, side: int
) -> tuple[list[Page], Dropped]:
    """All usable pages of a document, in one look; the same arguments give the same bytes.

    Args:
        text: the document's source.
        name: for the count of what is left out.
        format: `text`, `markdown`, `html` or `latex`.
        script: Chinese or not.
        seed: decides the look.
        book: fonts; with a Chinese one where the script is Chinese.
        side: long side of a page in pixels.
    """
    dropped = Dropped()
    layout = draw_layout(random.Random(seed), book, side=side, chinese=script == "chinese")
    blocks = []
    for block in read_blocks(text, format=format, name=name, dropped=dropped):
        missing = visible(block.seen.replace(FORMULA, "")) - layout.characters
        if missing:
            dropped.add("no_glyph", name, " ".join(f"U+{code:04X}" for code in sorted(missing)[:5]))
        else:
            blocks.append(block)
    pages: list[Page] = []
    for part in _parts(blocks):
        for page in _set(part, layout=layout, name=name, dropped=dropped):
            pages.append(Page(image=page[0], text=page[1], number=len(pages) + 1, layout=layout))
    return pages, dropped


def same_text(seen: str, *, expected: str) -> bool:
    """Whether a page shows what is expected: every character in order, with anything where the formulas are."""
    shown, position = _letters(seen), 0
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


def _parts(blocks: list[Wording]) -> Iterator[list[Wording]]:
    part: list[Wording] = []
    size = 0
    for block in blocks:
        if part and (len(part) == PART_BLOCKS or size + weight(block.seen) > PART_WEIGHT):
            yield part
            part, size = [], 0
        part.append(block)
        size += weight(block.seen)
    if part:
        yield part


def _set(part: list[Wording], *, layout: Layout, name: str, dropped: Dropped) -> Iterator[tuple[bytes, str]]:
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
        dropped.add("not_set", name, f"ended by {outcome.ended}, {last}")
        return
    line, _, files = outcome.output.partition(b"\n")
    answer = json.loads(line)
    for message in answer["failed"].values():
        dropped.add("block_not_set", name, message)
    for number in answer["overflow"]:
        dropped.add("overflow", name, part[number].seen)
    if not answer["pages"] and len(answer["failed"]) + len(answer["overflow"]) < len(part):
        dropped.add("too_many_pages", name)
    start = 0
    for page in answer["pages"]:
        image, start = files[start : start + page["size"]], start + page["size"]
        blocks = [part[number] for number in page["blocks"]]
        text = "\n\n".join(block.markdown for block in blocks)
        expected = " ".join(block.seen for block in blocks)
        if not page["clean"]:
            dropped.add("page_overflow", name)
        elif not same_text(page["seen"], expected=expected):
            dropped.add("text_differs", name, page["seen"])
        elif weight(text) < SHORTEST:
            dropped.add("short", name)
        else:
            yield image, text
