"""One element of a document in three renditions: what typst sets, the Markdown of the record, and what a reader sees.

All three are made in one walk over pandoc's tree, so that the record says what the page shows: the address of a link,
comments, images and footnotes are in none of them. Text reaches typst only inside string literals and can therefore
never be code; formulas are what pandoc's own writer made of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from data_tools.corpus.scripts import is_han

Node = Any
"""A node of pandoc's JSON tree: {"t": type, "c": contents}."""
Formulas = Mapping[str, str]
"""Typst code of each TeX formula that pandoc could convert, by `formula_key`."""

_LABEL = re.compile(r"\\label\s*\{[^{}]*\}|\\(?:nonumber|notag)(?![a-zA-Z])")
_LINE_END = re.compile(r" *\n[ \n]*")
FORMULA = "\0"
"""Stands in `seen` for a formula, whose glyphs are not those of its source."""


class Unusable(Exception):
    """An element that cannot be shown; the message is the reason under which it is counted."""


@dataclass(frozen=True)
class Wording:
    """The three renditions of an element."""

    typst: str = ""
    markdown: str = ""
    seen: str = ""

    def __add__(self, other: Wording) -> Wording:
        return Wording(self.typst + other.typst, self.markdown + other.markdown, self.seen + other.seen)


def formula_key(math: Node) -> str:
    """A formula's kind and source."""
    return f"{math['c'][0]['t']}:{math['c'][1]}"


def formula_source(math: Node) -> str:
    """TeX of a formula without what does not show: labels, and the wish to have no number."""
    return _LABEL.sub("", math["c"][1]).strip()


def literal(text: str) -> str:
    """A typst string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


def plain(text: str) -> Wording:
    """Running text."""
    return Wording(f"#{literal(text)};", text, text) if text else Wording()


def wrapped(content: Wording, *, function: str, before: str, after: str) -> Wording:
    """An element that typst marks by a function and Markdown by signs around it."""
    if not content.seen.strip():
        return Wording()
    return Wording(f"#{function}[{content.typst}];", f"{before}{content.markdown}{after}", content.seen)


def code(text: str) -> Wording:
    """Code inside running text."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Wording(f"#raw({literal(text)});", f"{fence}{pad}{text}{pad}{fence}", text)


def inlines(nodes: list[Node], formulas: Formulas) -> Wording:
    """Running text with its marks; neighbouring words become one string.

    Raises:
        Unusable: for an element of an unknown kind or a formula that cannot be set.
    """
    result, run = Wording(), ""
    shown = [node for node in nodes if node["t"] not in _UNSEEN]
    places = [place for place, node in enumerate(shown) if node["t"] not in _SPACES]
    for node in shown[places[0] : places[-1] + 1] if places else []:
        words = _words(node)
        if words is not None:
            run = _joined(run, words)
        else:
            result, run = result + plain(run.replace("\n", " ")), ""
            result += _inline(node, formulas)
    result += plain(run.replace("\n", " "))
    return replace(result, markdown=_LINE_END.sub("\n", result.markdown).strip())


def _words(node: Node) -> str | None:
    kind = node["t"]
    if kind == "Str":
        return str(node["c"])
    if kind == "Space":
        return " "
    # A line end of the source; `_joined` decides what becomes of it.
    return "\n" if kind == "SoftBreak" else None


def _joined(run: str, words: str) -> str:
    """Text with one more word; a line end between Chinese characters is no space."""
    if words.isspace() and run[-1:].isspace():
        return run
    if run.endswith("\n"):
        run = run[:-1] if len(run) > 1 and is_han(run[-2]) and is_han(words[0]) else f"{run[:-1]} "
    return run + words


def _inline(node: Node, formulas: Formulas) -> Wording:
    kind, content = node["t"], node.get("c")
    if kind in _MARKS:
        function, before, after = _MARKS[kind]
        return wrapped(inlines(content, formulas), function=function, before=before, after=after)
    if kind in ("Underline", "SmallCaps"):
        return inlines(content, formulas)
    if kind in ("Link", "Span", "Cite"):
        return inlines(content[1], formulas)
    if kind == "Quoted":
        before, after = "‘’" if content[0]["t"] == "SingleQuote" else "“”"
        return plain(before) + inlines(content[1], formulas) + plain(after)
    if kind == "Code":
        return code(content[1])
    if kind == "Math":
        return _formula(node, formulas)
    if kind == "LineBreak":
        return Wording("#linebreak();", "\n", " ")
    raise Unusable("element")


_UNSEEN = ("Image", "Note", "RawInline")
"""Shown neither on the page nor in the record."""
_SPACES = ("Space", "SoftBreak", "LineBreak")
_MARKS: Mapping[str, tuple[str, str, str]] = {
    "Emph": ("emph", "*", "*"),
    "Strong": ("strong", "**", "**"),
    "Strikeout": ("strike", "~~", "~~"),
    "Superscript": ("super", "^{", "}"),
    "Subscript": ("sub", "_{", "}"),
}


def _formula(node: Node, formulas: Formulas) -> Wording:
    source = formula_source(node)
    typst = formulas.get(formula_key(node))
    if typst is None:
        raise Unusable("formula")
    markdown = f"\n$${source}$$\n" if node["c"][0]["t"] == "DisplayMath" else f"${source}$"
    return Wording(typst, markdown, FORMULA)


def paragraph(content: Wording) -> Wording:
    """Running text as a paragraph, which typst would not indent otherwise; a display formula stands by itself."""
    return content if "$$" in content.markdown else replace(content, typst=f"#par[{content.typst}]")


def heading(content: Wording, *, level: int) -> Wording:
    """A heading of level 1 to 6."""
    return Wording(f"#heading(level: {level})[{content.typst}]", f"{'#' * level} {content.markdown}", content.seen)


def code_block(text: str, *, language: str) -> Wording:
    """Lines of code; the language decides the colours and is not on the page."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    named = f", lang: {literal(language)}" if language else ""
    return Wording(f"#raw({literal(text)}, block: true{named})", f"{fence}\n{text}\n{fence}", text)


def rule() -> Wording:
    """A horizontal line."""
    return Wording("#line(length: 100%)", "---", "")


def quotation(content: Wording) -> Wording:
    """A quotation of whole blocks."""
    lines = "\n".join(f"> {line}".rstrip() for line in content.markdown.split("\n"))
    return Wording(f"#quote(block: true)[{content.typst}]", lines, content.seen)


def listing(items: list[Wording], *, start: int | None) -> Wording:
    """A list, numbered from `start` or with one bullet for all."""
    numbers = ["" if start is None else f"{start + index}." for index in range(len(items))]
    parts = ", ".join(f"[{item.typst}]" for item in items)
    function = "list(" if start is None else f"enum(start: {start}, "
    lines = []
    for number, item in zip(numbers, items, strict=True):
        label = f"{number or '-'} "
        lines.append(label + item.markdown.replace("\n", "\n" + " " * len(label)))
    seen = " ".join(f"{number} {item.seen}" for number, item in zip(numbers, items, strict=True))
    markdown = "\n".join(line.rstrip() for line in "\n".join(lines).split("\n"))
    return Wording(f"#{function}{parts})", markdown, seen)


def table(header: list[Wording], rows: list[list[Wording]], *, aligned: list[str]) -> Wording:
    """A table of simple cells.

    Args:
        header: one cell per column.
        rows: cells by row.
        aligned: `left`, `right`, `center` or `auto` by column.
    """
    cells = ", ".join(f"[{cell.typst}]" for row in rows for cell in row)
    head = f"table.header({', '.join(f'[{cell.typst}]' for cell in header)}), "
    # Left to itself a cell takes the alignment of the table on the page.
    sides = "".join(f"{'left' if side == 'auto' else side}, " for side in aligned)
    typst = f"#table(columns: {len(aligned)}, align: ({sides}), {head}{cells})"
    marks = {"left": ":--", "right": "--:", "center": ":-:", "auto": "---"}
    lines = [_row(header), f"|{'|'.join(marks[side] for side in aligned)}|", *(_row(row) for row in rows)]
    seen = " ".join(cell.seen for row in [header, *rows] for cell in row)
    return Wording(typst, "\n".join(lines), seen)


def _row(cells: list[Wording]) -> str:
    texts = (" ".join(cell.markdown.replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(texts)} |"


def stacked(parts: list[Wording], *, between: str = "\n\n") -> Wording:
    """Blocks one below the other."""
    join: Callable[[str, list[str]], str] = str.join
    return Wording(
        join("\n#parbreak();\n", [part.typst for part in parts]),
        join(between, [part.markdown for part in parts]),
        join(" ", [part.seen for part in parts]),
    )
