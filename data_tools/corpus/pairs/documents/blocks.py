"""A document as a row of blocks, each small enough to stand on one page undivided.

Long paragraphs are parted at sentence ends, long lists, tables and code between their items, rows and lines. A block
that cannot be shown is left out of page and record alike, and counted.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_tools.corpus.pairs.documents.reading import ReadingError, convert_formulas, formulas_in, read_tree
from data_tools.corpus.pairs.documents.wording import (
    Formulas,
    Node,
    Unusable,
    Wording,
    code_block,
    heading,
    inlines,
    listing,
    literal,
    paragraph,
    plain,
    quotation,
    rule,
    stacked,
    table,
)
from data_tools.corpus.pairs.sources import Dropped
from data_tools.corpus.scripts import is_han

MOST_CHARACTERS = 600
"""Weight of one block, in characters; a Chinese character weighs two."""
MOST_LINES = 16
"""Lines of code, rows of a table."""
MOST_ITEMS = 6
"""Items of a list in one block."""
MOST_COLUMNS = 12
LONGEST_CODE_LINE = 100
"""Characters; longer lines are broken by the page, which no reader could tell from the code's own breaks."""
DEEPEST = 6
"""Lists and quotations inside each other."""

_ALIGNMENTS = {"AlignLeft": "left", "AlignRight": "right", "AlignCenter": "center", "AlignDefault": "auto"}
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])")
_STOPS, _FULL_STOPS = (".", "!", "?"), ("。", "！", "？", "；")
"""Ends of sentences: followed by a space, and by nothing."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How one document is read, and where its losses are counted."""

    name: str
    dropped: Dropped
    formulas: Formulas

    def lose(self, reason: str, detail: str = "") -> None:
        """Count a block that is left out."""
        self.dropped.add(reason, self.name, detail)


def read_blocks(text: str, *, format: str, name: str, dropped: Dropped) -> list[Wording]:
    """The blocks of a document.

    Args:
        text: its source.
        format: `text`, or one of pandoc's.
        name: for the count of what is lost.
        dropped: takes what is lost.
    """
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n"))
    if format == "text":
        return list(_plain_blocks(text, Reader(name=name, dropped=dropped, formulas={})))
    try:
        tree = read_tree(text, format=format)
        formulas = convert_formulas(formulas_in(tree))
        return list(_blocks(tree, Reader(name=name, dropped=dropped, formulas=formulas), depth=0))
    except ReadingError as error:
        dropped.add("unreadable", name, str(error))
    except RecursionError:
        dropped.add("too_deep", name)
    return []


def weight(text: str) -> int:
    """Characters, Chinese ones twice."""
    return sum(2 if is_han(character) else 1 for character in text)


def _blocks(nodes: list[Node], reader: Reader, *, depth: int) -> Iterator[Wording]:
    for node in nodes:
        try:
            yield from (block for block in _block(node, reader, depth=depth) if block.seen.strip() or block == rule())
        except Unusable as error:
            reader.lose(str(error))


def _block(node: Node, reader: Reader, *, depth: int) -> Iterator[Wording]:
    kind, content = node["t"], node.get("c")
    if depth > DEEPEST:
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
    """A paragraph in parts of about MOST_CHARACTERS at most, parted at sentence ends where it has them."""
    if weight(_letters(nodes)) <= MOST_CHARACTERS:
        yield nodes
        return
    part: list[Node] = []
    size, ended, spaced, last = 0, False, False, ""
    for node in nodes:
        # Chinese sentences follow each other without spaces, so that a single Str may hold a page.
        texts = [text for text in _SENTENCE_END.split(node["c"]) if text] if node["t"] == "Str" else [""]
        for text in texts:
            letters = text or _letters([node])
            # A sentence that would fill a page by itself ends anywhere between two words.
            if (ended and size + weight(letters) > MOST_CHARACTERS // 2) or (spaced and size > MOST_CHARACTERS):
                yield part
                part, size = [], 0
            part.append({"t": "Str", "c": text} if text else node)
            size += weight(letters)
            ended = last in _STOPS if letters.isspace() else letters[-1:] in _FULL_STOPS
            last, spaced = letters.strip()[-1:] or last, letters.isspace()
    if part:
        yield part


def _letters(nodes: Any) -> str:
    """All text below some nodes, roughly as long as it will be on the page."""
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


def _code(text: str, *, language: str) -> Iterator[Wording]:
    lines = text.expandtabs(4).split("\n")
    if any(len(line) > LONGEST_CODE_LINE for line in lines):
        raise Unusable("code_line_too_long")
    for first in range(0, len(lines), MOST_LINES):
        part = "\n".join(lines[first : first + MOST_LINES]).strip("\n")
        if part.strip():
            yield code_block(part, language=re.sub(r"[^\w+#-]", "", language))


def _list(items: list[list[Node]], reader: Reader, *, start: int | None, depth: int) -> Iterator[Wording]:
    done: list[Wording] = []
    first = start
    for number, item in enumerate(items):
        lists_only = all(node["t"] in ("BulletList", "OrderedList") for node in item[1:])
        one = stacked(list(_blocks(item, reader, depth=depth + 1)), between="\n" if lists_only else "\n\n")
        full = len(done) == MOST_ITEMS or sum(weight(each.seen) for each in [*done, one]) > MOST_CHARACTERS
        if done and full:
            yield listing(done, start=first)
            done, first = [], None if start is None else start + number
        done.append(one)
    if any(item.seen.strip() for item in done):
        yield listing(done, start=first)


def _table(content: list[Any], reader: Reader) -> Iterator[Wording]:
    """Tables of plain cells; those with merged or many-paragraph cells are left out."""
    columns, head, bodies, foot = content[2], content[3], content[4], content[5]
    if not 1 <= len(columns) <= MOST_COLUMNS:
        raise Unusable("table")
    caption = stacked(list(_blocks(content[1][1], reader, depth=DEEPEST)))
    if caption.seen.strip():
        yield caption
    rows = [_cells(row, reader, columns=len(columns)) for body in bodies for row in (*body[2], *body[3])]
    rows += [_cells(row, reader, columns=len(columns)) for row in foot[1]]
    rows = [*(_cells(row, reader, columns=len(columns)) for row in head[1]), *rows]
    rows = [row for row in rows if any(cell.seen.strip() for cell in row)]
    if not rows:
        raise Unusable("table")
    # Markdown has no table without a header, and the templates set the first row apart.
    header = rows.pop(0)
    aligned = [_ALIGNMENTS[column[0]["t"]] for column in columns]
    part: list[list[Wording]] = []
    for row in rows:
        size = sum(weight(cell.seen) for each in [*part, row] for cell in each)
        if part and (len(part) == MOST_LINES or size > MOST_CHARACTERS):
            yield table(header, part, aligned=aligned)
            part = []
        part.append(row)
    yield table(header, part, aligned=aligned)


def _cells(row: Any, reader: Reader, *, columns: int) -> list[Wording]:
    cells = []
    for _, _, high, wide, blocks in row[1]:
        if (high, wide) != (1, 1) or len(blocks) > 1 or (blocks and blocks[0]["t"] not in ("Plain", "Para")):
            raise Unusable("table")
        cells.append(inlines(blocks[0]["c"], reader.formulas) if blocks else Wording())
    if len(cells) != columns:
        raise Unusable("table")
    return cells


def _plain_blocks(text: str, reader: Reader) -> Iterator[Wording]:
    """Paragraphs of a text without marks: filled lines flow anew, all others keep their line ends."""
    for piece in _BLANK_LINES.split(text):
        lines = [line.rstrip() for line in piece.expandtabs(8).strip("\n").split("\n")]
        if not any(lines):
            continue
        # The first line may be indented otherwise than the rest.
        margins = {len(line) - len(line.lstrip()) for line in lines[1:]}
        bare = [line.strip() for line in lines]
        try:
            if len(margins) > 1 or any("   " in line for line in bare):
                yield from _code(textwrap.dedent("\n".join(lines)), language="")
            elif not all(50 <= len(line) <= 110 for line in bare[:-1]):
                for first in range(0, len(bare), MOST_LINES):
                    yield _kept_lines(bare[first : first + MOST_LINES])
            else:
                nodes = [node for word in " ".join(bare).split() for node in ({"t": "Str", "c": word}, {"t": "Space"})]
                for part in _sentences(nodes):
                    yield paragraph(inlines(part, {}))
        except Unusable as error:
            reader.lose(str(error))


def _kept_lines(lines: list[str]) -> Wording:
    typst = "#linebreak();".join(f"#{literal(line)};" for line in lines)
    text = "\n".join(lines)
    return Wording(typst, text, plain(text).seen)
