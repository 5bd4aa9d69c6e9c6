"""How a document looks: page, columns, fonts and ornaments, drawn from one of several templates.

A page is laid out in pixels (72 points per inch and 72 pixels per inch), so sizes here are sizes in the image.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.corpus.pairs.documents.wording import literal
from data_tools.corpus.pairs.fonts import Family, FontBook

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Template:
    """What documents of one sort have in common."""

    shapes: tuple[float, ...]
    """Width of a page over its height."""
    columns: tuple[int, ...]
    characters: tuple[int, int]
    """Font sizes (em squares) that fit into the long side, fewest and most: 64 of them give 16 of 1024 pixels."""
    margin: tuple[float, float]
    """Of the long side, least and most."""
    leading: tuple[float, float]
    """Space between lines in em."""
    justify: bool
    indent: bool
    """First lines are indented and paragraphs follow without a gap."""
    tinted: bool
    """Paper and ink may be other than near white and near black."""
    ornaments: str
    """Further typst code."""


A4, LETTER, SLIDE = 0.707, 0.773, 1.333

TEMPLATES: Mapping[str, Template] = {
    "article": Template(
        shapes=(A4, LETTER),
        columns=(1,),
        characters=(52, 68),
        margin=(0.06, 0.1),
        leading=(0.55, 0.75),
        justify=True,
        indent=False,
        tinted=False,
        ornaments="#show heading.where(level: 1): set align(center)\n"
        "#set table(stroke: (x, y) => if y == 0 { (bottom: 0.8pt, top: 0.8pt) } else { (bottom: 0.3pt) })",
    ),
    "paper": Template(
        shapes=(A4, LETTER),
        columns=(2,),
        characters=(66, 76),
        margin=(0.05, 0.07),
        leading=(0.5, 0.6),
        justify=True,
        indent=True,
        tinted=False,
        ornaments="#show heading: smallcaps\n#set table(stroke: none)\n"
        "#show table.cell.where(y: 0): set text(weight: 700)",
    ),
    "book": Template(
        shapes=(0.65, A4),
        columns=(1,),
        characters=(40, 52),
        margin=(0.07, 0.12),
        leading=(0.7, 0.95),
        justify=True,
        indent=True,
        tinted=True,
        ornaments="#set table(stroke: 0.5pt)",
    ),
    "report": Template(
        shapes=(A4, LETTER, 1.0),
        columns=(1,),
        characters=(48, 64),
        margin=(0.06, 0.12),
        leading=(0.6, 0.85),
        justify=False,
        indent=False,
        tinted=True,
        ornaments="#show heading: set text(fill: ACCENT)\n"
        "#show raw.where(block: true): it => "
        "block(fill: ACCENT.lighten(90%), inset: 0.6em, radius: 0.2em, width: 100%, it)\n"
        "#set table(stroke: 0.5pt + ACCENT, fill: (x, y) => if y == 0 { ACCENT.lighten(80%) })",
    ),
    "handout": Template(
        shapes=(A4, 1.0, SLIDE),
        columns=(2,),
        characters=(58, 70),
        margin=(0.04, 0.07),
        leading=(0.55, 0.75),
        justify=False,
        indent=False,
        tinted=True,
        ornaments="#show heading: it => "
        "block(stroke: (bottom: 1pt + ACCENT), inset: (bottom: 0.3em), width: 100%, it)\n"
        "#set table(stroke: 0.4pt)",
    ),
    "slide": Template(
        shapes=(SLIDE,),
        columns=(1,),
        characters=(34, 44),
        margin=(0.05, 0.08),
        leading=(0.6, 0.8),
        justify=False,
        indent=False,
        tinted=True,
        ornaments="#show heading: set text(fill: ACCENT, size: 1.15em)\n#set table(stroke: (y: 0.5pt))",
    ),
}

SMALLEST = 12
"""Pixels of the font; smaller letters are blots."""
SMALLEST_CODE = 0.75
"""Size of wide code, as a share of the usual."""
CHINESE_SCALE = 1.2
"""Chinese characters have more strokes in the same square."""

_ACCENTS: tuple[Colour, ...] = ((20, 60, 130), (120, 25, 35), (15, 95, 70), (95, 50, 120), (140, 75, 10), (40, 40, 40))
_PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 246, 235), (240, 244, 250), (244, 250, 240), (236, 236, 236))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The look of one document."""

    template: str
    width: int
    """Pixels, like everything else here."""
    height: int
    columns: int
    margin: int
    gutter: int
    """Between two columns."""
    size: int
    """Of the font."""
    body: Family
    mono: Family
    chinese: Family | None
    preamble: str
    """typst code with BODY, MONO and CHINESE where the names of the fonts go."""

    @property
    def families(self) -> dict[str, Family]:
        """Families by the word that stands for them in the preamble."""
        families = {"BODY": self.body, "MONO": self.mono}
        return families if self.chinese is None else {**families, "CHINESE": self.chinese}

    @property
    def characters(self) -> frozenset[int]:
        """Code points that can be drawn."""
        return frozenset().union(*(family.characters for family in self.families.values()))

    @property
    def notes(self) -> dict[str, Any]:
        """For the record."""
        return {"template": self.template, "columns": self.columns, "font": self.body.name, "font_size": self.size}

    @property
    def empty(self) -> list[tuple[int, int, int, int]]:
        """Boxes (left, top, right, bottom) that no ink may touch: the outer half of each margin, and the gutter."""
        rim = max(1, self.margin // 2)
        boxes = [
            (0, 0, self.width, rim),
            (0, self.height - rim, self.width, self.height),
            (0, 0, rim, self.height),
            (self.width - rim, 0, self.width, self.height),
        ]
        if self.columns == 2:
            middle, half = self.width // 2, self.gutter // 4
            boxes.append((middle - half, 0, middle + half, self.height))
        return boxes


def draw_layout(rng: random.Random, book: FontBook, *, side: int, chinese: bool) -> Layout:
    """Choose a look.

    Args:
        rng: source of every choice.
        book: fonts of this machine.
        side: long side of a page in pixels.
        chinese: whether most of the text is Chinese; the book must have a font for it then.
    """
    name = rng.choice(list(TEMPLATES))
    template = TEMPLATES[name]
    shape = rng.choice(template.shapes)
    width, height = (side, round(side / shape)) if shape > 1 else (round(side * shape), side)
    columns = rng.choice(template.columns)
    size = max(SMALLEST, round(side / rng.uniform(*template.characters) * (CHINESE_SCALE if chinese else 1)))
    margin = round(side * rng.uniform(*template.margin))
    family = rng.choice(book.chinese) if book.chinese else None
    layout = Layout(
        template=name,
        width=width,
        height=height,
        columns=columns,
        margin=margin,
        gutter=2 * size,
        size=size,
        body=rng.choice(book.text),
        mono=rng.choice(book.mono),
        chinese=family,
        preamble="",
    )
    return Layout(**{**vars(layout), "preamble": _preamble(rng, template, layout, chinese=chinese)})


def _preamble(rng: random.Random, template: Template, layout: Layout, *, chinese: bool) -> str:
    paper = rng.choice(_PAPERS) if template.tinted else (255, 255, 255)
    shade = rng.randint(0, 60)
    chain = "(BODY, CHINESE, MONO)" if layout.chinese else "(BODY, MONO)"
    mono = "(MONO, BODY, CHINESE)" if layout.chinese else "(MONO, BODY)"
    leading = rng.uniform(*template.leading)
    gap = leading if template.indent else leading + rng.uniform(0.4, 0.8)
    # Settings that a document's own code could not undo: there is none in it.
    return "\n".join(
        [
            f"#let ACCENT = rgb{rng.choice(_ACCENTS)}",
            f"#set page(width: {layout.width}pt, height: {layout.height}pt, margin: {layout.margin}pt, "
            f"columns: {layout.columns}, fill: rgb{paper})",
            f"#set columns(gutter: {layout.gutter}pt)",
            f"#set text(font: {chain}, size: {layout.size}pt, fill: rgb{(shade, shade, shade)}, fallback: false, "
            f"lang: {literal('zh' if chinese else 'en')}, hyphenate: {'true' if template.justify else 'false'})",
            f"#set par(justify: {'true' if template.justify else 'false'}, leading: {leading:.3f}em, "
            f"spacing: {gap:.3f}em"
            + (f", first-line-indent: (amount: {rng.uniform(1, 2):.2f}em, all: true))" if template.indent else ")"),
            "#set smartquote(enabled: false)",
            "#set list(marker: [•])",
            "#set heading(numbering: none)",
            "#show list: set par(first-line-indent: 0em)",
            "#show enum: set par(first-line-indent: 0em)",
            "#show table: set par(first-line-indent: 0em, justify: false)",
            "#show table: set align(center)",
            "#show heading: set par(first-line-indent: 0em, justify: false)",
            f"#show raw: set text(font: {mono}, size: 1em)",
            "#show raw.where(block: true): set par(justify: false)",
            # Lines of code are never broken but made a little smaller; what is then still too long reaches into the
            # margin, where it is found.
            "#show raw.where(block: true): it => layout(room => {"
            f" set text(size: calc.clamp(room.width / calc.max(1pt, measure(it).width), {SMALLEST_CODE}, 1) * 1em);"
            " show raw.line: line => context box(width: measure(line.body).width, line.body);"
            " it })",
            '#show math.equation: set text(font: ("New Computer Modern Math", BODY), fallback: true)',
            template.ornaments,
            "#let piece(number, body) = block(breakable: false, width: 100%)["
            "#context [#metadata((number, here().page()))<piece>]#body]",
        ]
    )
