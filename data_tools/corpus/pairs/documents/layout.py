"""Layout of a document: page, columns, fonts and styles, chosen at random from one of several templates.

Pages have 72 points and 72 pixels per inch, so a size in points is the size in pixels of the image.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_tools.corpus.pairs.fonts import Family, Fonts

Colour = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Template:
    """Range of layouts of one type of document."""

    shapes: tuple[float, ...]
    """Ratios of page width to height."""
    columns: tuple[int, ...] = (1,)
    characters: tuple[int, int]
    """Minimum and maximum of the long side divided by the font size: 64 gives 16 pixels on a page of 1024."""
    margin: tuple[float, float]
    """Minimum and maximum, as a share of the long side."""
    leading: tuple[float, float]
    """Space between lines in em."""
    justify: bool = False
    indent: bool = False
    """Indent first lines, and leave no gap between paragraphs."""
    tinted: bool = True
    """The paper may have a colour other than white."""
    styles: str
    """Further typst code."""


A4, LETTER, SLIDE = 0.707, 0.773, 1.333

TEMPLATES: Mapping[str, Template] = {
    "article": Template(
        shapes=(A4, LETTER),
        characters=(52, 68),
        margin=(0.06, 0.1),
        leading=(0.55, 0.75),
        justify=True,
        tinted=False,
        styles="#show heading.where(level: 1): set align(center)\n"
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
        styles="#show heading: smallcaps\n#set table(stroke: none)\n"
        "#show table.cell.where(y: 0): set text(weight: 700)",
    ),
    "book": Template(
        shapes=(0.65, A4),
        characters=(40, 52),
        margin=(0.07, 0.12),
        leading=(0.7, 0.95),
        justify=True,
        indent=True,
        styles="#set table(stroke: 0.5pt)",
    ),
    "report": Template(
        shapes=(A4, LETTER, 1.0),
        characters=(48, 64),
        margin=(0.06, 0.12),
        leading=(0.6, 0.85),
        styles="#show heading: set text(fill: ACCENT)\n"
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
        styles="#show heading: it => "
        "block(stroke: (bottom: 1pt + ACCENT), inset: (bottom: 0.3em), width: 100%, it)\n"
        "#set table(stroke: 0.4pt)",
    ),
    "slide": Template(
        shapes=(SLIDE,),
        characters=(34, 44),
        margin=(0.05, 0.08),
        leading=(0.6, 0.8),
        styles="#show heading: set text(fill: ACCENT, size: 1.15em)\n#set table(stroke: (y: 0.5pt))",
    ),
}

MIN_FONT_SIZE = 12
"""Pixels; smaller letters cannot be read."""
MIN_CODE_SCALE = 0.75
"""Smallest size of wide code, relative to its normal size."""
CHINESE_SCALE = 1.2
"""Chinese characters need a larger font, because they have more strokes."""

_ACCENTS: tuple[Colour, ...] = ((20, 60, 130), (120, 25, 35), (15, 95, 70), (95, 50, 120), (140, 75, 10), (40, 40, 40))
_PAPERS: tuple[Colour, ...] = ((255, 255, 255), (250, 246, 235), (240, 244, 250), (244, 250, 240), (236, 236, 236))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The layout of one document; all sizes are in pixels."""

    template: str
    width: int
    height: int
    columns: int
    margin: int
    gutter: int
    """Between two columns."""
    size: int
    """Font size."""
    body: Family
    mono: Family
    chinese: Family | None
    preamble: str
    """Typst code with BODY, MONO and CHINESE in the positions of the font names."""

    @property
    def families(self) -> dict[str, Family]:
        """Families by their placeholder in the preamble."""
        families = {"BODY": self.body, "MONO": self.mono}
        return families if self.chinese is None else {**families, "CHINESE": self.chinese}

    @property
    def characters(self) -> frozenset[int]:
        """Code points that have a glyph."""
        return frozenset().union(*(family.characters for family in self.families.values()))

    @property
    def record_keys(self) -> dict[str, Any]:
        """Keys that describe the layout in a record."""
        return {"template": self.template, "columns": self.columns, "font": self.body.name, "font_size": self.size}

    @property
    def empty(self) -> list[tuple[int, int, int, int]]:
        """Boxes (left, top, right, bottom) that must stay empty: the outer half of each margin, and the gutter."""
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


def choose_layout(rng: random.Random, fonts: Fonts, *, side: int, chinese: bool) -> Layout:
    """Choose a layout at random.

    Args:
        rng: decides every choice.
        fonts: fonts of this machine.
        side: long side of a page in pixels.
        chinese: whether the text is Chinese; `fonts` must then have a Chinese font.
    """
    name = rng.choice(list(TEMPLATES))
    template = TEMPLATES[name]
    shape = rng.choice(template.shapes)
    width, height = (side, round(side / shape)) if shape > 1 else (round(side * shape), side)
    columns = rng.choice(template.columns)
    size = max(MIN_FONT_SIZE, round(side / rng.uniform(*template.characters) * (CHINESE_SCALE if chinese else 1)))
    margin = round(side * rng.uniform(*template.margin))
    family = rng.choice(fonts.chinese) if fonts.chinese else None
    layout = Layout(
        template=name,
        width=width,
        height=height,
        columns=columns,
        margin=margin,
        gutter=2 * size,
        size=size,
        body=rng.choice(fonts.text),
        mono=rng.choice(fonts.mono),
        chinese=family,
        preamble="",
    )
    return Layout(**{**vars(layout), "preamble": _preamble(rng, template, layout, chinese=chinese)})


def _preamble(rng: random.Random, template: Template, layout: Layout, *, chinese: bool) -> str:
    paper = rng.choice(_PAPERS) if template.tinted else (255, 255, 255)
    shade = rng.randint(0, 60)
    language = '"zh"' if chinese else '"en"'
    chain = "(BODY, CHINESE, MONO)" if layout.chinese else "(BODY, MONO)"
    mono = "(MONO, BODY, CHINESE)" if layout.chinese else "(MONO, BODY)"
    leading = rng.uniform(*template.leading)
    gap = leading if template.indent else leading + rng.uniform(0.4, 0.8)
    return "\n".join(
        [
            f"#let ACCENT = rgb{rng.choice(_ACCENTS)}",
            f"#set page(width: {layout.width}pt, height: {layout.height}pt, margin: {layout.margin}pt, "
            f"columns: {layout.columns}, fill: rgb{paper})",
            f"#set columns(gutter: {layout.gutter}pt)",
            f"#set text(font: {chain}, size: {layout.size}pt, fill: rgb{(shade, shade, shade)}, fallback: false, "
            f"lang: {language}, hyphenate: {'true' if template.justify else 'false'})",
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
            # Lines of code never wrap but shrink a little. A line that is still too long reaches into the margin, where
            # the check of empty boxes finds it.
            "#show raw.where(block: true): it => layout(room => {"
            f" set text(size: calc.clamp(room.width / calc.max(1pt, measure(it).width), {MIN_CODE_SCALE}, 1) * 1em);"
            " show raw.line: line => context box(width: measure(line.body).width, line.body);"
            " it })",
            '#show math.equation: set text(font: ("New Computer Modern Math", BODY), fallback: true)',
            template.styles,
            "#let piece(number, body) = block(breakable: false, width: 100%)["
            "#context [#metadata((number, here().page()))<piece>]#body]",
        ]
    )
