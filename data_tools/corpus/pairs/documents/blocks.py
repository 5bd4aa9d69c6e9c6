"""A document as a list of blocks, each small enough to fit on one page undivided.

Long paragraphs are split at sentence ends; long lists, tables and code are split between items, rows and lines. A block
that cannot be rendered is left out of page and record, and counted.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.corpus.pairs.documents.elements import (
    Element,
    Formulas,
    Node,
    Unusable,
    code_block,
    heading,
    inlines,
    listing,
    paragraph,
    plain,
    quotation,
    rule,
    stacked,
    table,
    typst_string,
)
from data_tools.corpus.pairs.documents.reading import ReadingError, read_tree
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import is_han

MAX_WEIGHT = 600
"""Weight of one block: its characters, with Chinese ones counted twice."""
MAX_LINES = 16
"""Lines of code or rows of a table in one block."""
MAX_ITEMS = 6
"""Items of a list in one block."""
MAX_COLUMNS = 12
MAX_CODE_LINE = 100
"""Characters. A longer line would wrap, and a reader could not tell the wrap from a line break of the code."""
MAX_DEPTH = 6
"""Nesting of lists and quotations."""

_ALIGNMENTS = {"AlignLeft": "left", "AlignRight": "right", "AlignCenter": "center", "AlignDefault": "auto"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])")
_STOPS, _FULL_STOPS = (".", "!", "?"), ("。", "！", "？", "；")
"""Sentence ends that need a space after them, and those that need none."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Name and formulas of the document that is read, and the count of its dropped blocks."""

    name: str
    dropped: Dropped
    formulas: Formulas

    def drop(self, reason: str, detail: str = "") -> None:
        """Count a dropped block."""
        self.dropped.add(reason, self.name, detail)


def read_blocks(text: str, *, format: str, name: str, dropped: Dropped) -> list[Element]:
    """The blocks of a document.

    Args:
        text: source of the document.
        format: `text`, or one of those that pandoc reads.
        name: name of the document, for the count of dropped blocks.
        dropped: counts dropped blocks.
    """
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n"))
    if format == "text":
        return list(_plain_blocks(text, Reader(name=name, dropped=dropped, formulas={})))
    try:
        tree, formulas = read_tree(text, format=format)
        return list(_blocks(tree, Reader(name=name, dropped=dropped, formulas=formulas), depth=0))
    except ReadingError as error:
        dropped.add("unreadable", name, str(error))
    except RecursionError:
        dropped.add("too_deep", name)
    return []


def weight(text: str) -> int:
    """Number of characters, with Chinese ones counted twice."""
    return sum(2 if is_han(character) else 1 for character in text)


def _blocks(nodes: list[Node], reader: Reader, *, depth: int) -> Iterator[Element]:
    for node in nodes:
        try:
            yield from (
                block for block in _block(node, reader, depth=depth) if block.visible.strip() or block == rule()
            )
        except Unusable as error:
            reader.drop(str(error))


def _block(node: Node, reader: Reader, *, depth: int) -> Iterator[Element]:
    kind, content = node["t"], node.get("c")
    if depth > MAX_DEPTH:
        raise Unusable("too_deep")
    if kind in ("Para", "Plain"):
        for part in _sentences(content):
            yield paragraph(inlines(part, reader.formulas))
    elif kind == "Header":
        yield heading(inlines(content[2], reader.formulas), level=min(content[0], 6))
    elif kind == "CodeBlock":
        classes = content[0][1]
        yield from _code(content[1], language=classes[0] if classes else "")
    elif kind == "BulletList":
        yield from _list(content, reader, start=None, depth=depth)
    elif kind == "OrderedList":
        yield from _list(content[1], reader, start=max(0, content[0][0]), depth=depth)
    elif kind == "BlockQuote":
        yield quotation(stacked(list(_blocks(content, reader, depth=depth + 1))))
    elif kind == "Table":
        yield from _table(content, reader)
    elif kind == "HorizontalRule":
        yield rule()
    elif kind == "LineBlock":
        yield inlines([part for line in content for part in (*line, {"t": "LineBreak"})][:-1], reader.formulas)
    elif kind == "DefinitionList":
        for term, definitions in content:
            yield inlines([{"t": "Strong", "c": term}], reader.formulas)
            for definition in definitions:
                yield from _blocks(definition, reader, depth=depth + 1)
    elif kind == "Div":
        yield from _blocks(content[1], reader, depth=depth)
    elif kind == "Figure":
        yield from _blocks([inner for inner in content[2] if inner["t"] == "Table"], reader, depth=depth)
    elif kind != "RawBlock":
        raise Unusable("element")


def _sentences(nodes: list[Node]) -> Iterator[list[Node]]:
    """A paragraph in parts of about MAX_WEIGHT at most, split at sentence ends if possible."""
    if weight(_letters(nodes)) <= MAX_WEIGHT:
        yield nodes
        return
    part: list[Node] = []
    size, ended, spaced, last = 0, False, False, ""
    for node in nodes:
        # Chinese sentences follow each other without spaces, so that a single Str may hold a page.
        texts = [text for text in _SENTENCE_END.split(node["c"]) if text] if node["t"] == "Str" else [""]
        for text in texts:
            letters = text or _letters([node])
            # A sentence that is too long itself is split between two words.
            if (ended and size + weight(letters) > MAX_WEIGHT // 2) or (spaced and size > MAX_WEIGHT):
                yield part
                part, size = [], 0
            part.append({"t": "Str", "c": text} if text else node)
            size += weight(letters)
            ended = last in _STOPS if letters.isspace() else letters[-1:] in _FULL_STOPS
            last, spaced = letters.strip()[-1:] or last, letters.isspace()
    if part:
        yield part


def _letters(nodes: Any) -> str:
    """All text below some nodes, about as long as on the page."""
    if isinstance(nodes, dict):
        kind, content = nodes.get("t"), nodes.get("c")
        if kind == "Str":
            return str(content)
        if kind in ("Space", "SoftBreak", "LineBreak"):
            return " "
        return str(nodes["c"][1]) if kind in ("Code", "Math") else _letters(content)
    if isinstance(nodes, list):
        return "".join(_letters(node) for node in nodes if isinstance(node, dict | list))
    return ""


def _code(text: str, *, language: str) -> Iterator[Element]:
    lines = text.expandtabs(4).split("\n")
    if any(len(line) > MAX_CODE_LINE for line in lines):
        raise Unusable("code_line_too_long")
    for first in range(0, len(lines), MAX_LINES):
        part = "\n".join(lines[first : first + MAX_LINES]).strip("\n")
        if part.strip():
            yield code_block(part, language=re.sub(r"[^\w+#-]", "", language))


def _list(items: list[list[Node]], reader: Reader, *, start: int | None, depth: int) -> Iterator[Element]:
    done: list[Element] = []
    first = start
    for number, item in enumerate(items):
        lists_only = all(node["t"] in ("BulletList", "OrderedList") for node in item[1:])
        one = stacked(list(_blocks(item, reader, depth=depth + 1)), between="\n" if lists_only else "\n\n")
        full = len(done) == MAX_ITEMS or sum(weight(each.visible) for each in [*done, one]) > MAX_WEIGHT
        if done and full:
            yield listing(done, start=first)
            done, first = [], None if start is None else start + number
        done.append(one)
    if any(item.visible.strip() for item in done):
        yield listing(done, start=first)


def _table(content: list[Any], reader: Reader) -> Iterator[Element]:
    """Tables of plain cells; a table with a merged or multi-paragraph cell is dropped."""
    columns, head, bodies, foot = content[2], content[3], content[4], content[5]
    if not 1 <= len(columns) <= MAX_COLUMNS:
        raise Unusable("table")
    caption = stacked(list(_blocks(content[1][1], reader, depth=MAX_DEPTH)))
    if caption.visible.strip():
        yield caption
    rows = [_cells(row, reader, columns=len(columns)) for body in bodies for row in (*body[2], *body[3])]
    rows += [_cells(row, reader, columns=len(columns)) for row in foot[1]]
    rows = [*(_cells(row, reader, columns=len(columns)) for row in head[1]), *rows]
    rows = [row for row in rows if any(cell.visible.strip() for cell in row)]
    if not rows:
        raise Unusable("table")
    # Markdown has no table without a header, so a table without one gives its first row.
    header = rows.pop(0)
    aligned = [_ALIGNMENTS[column[0]["t"]] for column in columns]
    part: list[list[Element]] = []
    for row in rows:
        size = sum(weight(cell.visible) for each in [*part, row] for cell in each)
        if part and (len(part) == MAX_LINES or size > MAX_WEIGHT):
            yield table(header, part, aligned=aligned)
            part = []
        part.append(row)
    yield table(header, part, aligned=aligned)


def _cells(row: Any, reader: Reader, *, columns: int) -> list[Element]:
    cells = []
    for _, _, high, wide, blocks in row[1]:
        if (high, wide) != (1, 1) or len(blocks) > 1 or (blocks and blocks[0]["t"] not in ("Plain", "Para")):
            raise Unusable("table")
        cells.append(inlines(blocks[0]["c"], reader.formulas) if blocks else Element())
    if len(cells) != columns:
        raise Unusable("table")
    return cells


def _plain_blocks(text: str, reader: Reader) -> Iterator[Element]:
    """Paragraphs of plain text: lines of full length are joined and wrap anew, other lines keep their ends."""
    for piece in _BLANK_LINES.split(text):
        lines = [line.rstrip() for line in piece.expandtabs(8).strip("\n").split("\n")]
        if not any(lines):
            continue
        # The first line may have an indent of its own.
        margins = {len(line) - len(line.lstrip()) for line in lines[1:]}
        bare = [line.strip() for line in lines]
        try:
            if len(margins) > 1 or any("   " in line for line in bare):
                yield from _code(textwrap.dedent("\n".join(lines)), language="")
            elif not all(50 <= len(line) <= 110 for line in bare[:-1]):
                for first in range(0, len(bare), MAX_LINES):
                    yield _kept_lines(bare[first : first + MAX_LINES])
            else:
                nodes = [node for word in " ".join(bare).split() for node in ({"t": "Str", "c": word}, {"t": "Space"})]
                for part in _sentences(nodes):
                    yield paragraph(inlines(part, {}))
        except Unusable as error:
            reader.drop(str(error))


def _kept_lines(lines: list[str]) -> Element:
    typst = "#linebreak();".join(f"#{typst_string(line)};" for line in lines)
    text = "\n".join(lines)
    return Element(typst, text, plain(text).visible)
