"""The number of records of each category, as a text table with bars and as an SVG picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from data_tools.categories.tree import Taxonomy

_BAR = 30
"""Characters of the longest bar."""
_ROW, _NAME, _LENGTH = 22, 330, 420
"""Pixels: height of a row, width of the names, length of the longest bar."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One category."""

    id: str
    name: str
    level: int
    count: int
    """Number of records in it and below it."""
    share: float
    """Share of all records with a category."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Counts of a set of records."""

    rows: tuple[Row, ...]
    """All categories, in the order of the tree."""
    tagged: int
    untagged: int
    leaves: int
    """Number of categories without parts."""
    missing: tuple[str, ...]
    """Leaves without a record."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tagged": self.tagged,
            "untagged": self.untagged,
            "categories": {row.id: row.count for row in self.rows},
            "missing": list(self.missing),
        }


def cover(counts: Mapping[str, int], *, untagged: int, taxonomy: Taxonomy) -> Coverage:
    """Sum up the records of each category and of all below it; `counts` has them by the category that they name."""
    sums: Counter[str] = Counter()
    for id, count in counts.items():
        parts = id.split("/")
        for depth in range(1, len(parts) + 1):
            sums["/".join(parts[:depth])] += count
    tagged = sum(counts.values())
    rows = tuple(
        Row(
            id=category.id,
            name=category.name,
            level=category.level,
            count=sums[category.id],
            share=sums[category.id] / tagged if tagged else 0.0,
        )
        for category in taxonomy.categories.values()
    )
    # A record that names an inner category fills none of its leaves.
    missing = tuple(leaf.id for leaf in taxonomy.leaves() if not sums[leaf.id])
    leaves = len(taxonomy.leaves())
    return Coverage(rows=rows, tagged=tagged, untagged=untagged, leaves=leaves, missing=missing)


def table(coverage: Coverage, *, depth: int) -> Iterator[str]:
    """Lines of text with id, records, share and a bar for each category down to level `depth`."""
    shown = [row for row in coverage.rows if row.level <= depth]
    wide = max(len(row.id) for row in shown)
    for row in shown:
        bar = "#" * round(_BAR * row.share)
        yield f"{row.id:<{wide}}  {row.count:>9}  {100 * row.share:5.1f}%  {bar}".rstrip()
    yield (
        f"{coverage.tagged} records with a category, {coverage.untagged} without; "
        f"{coverage.leaves - len(coverage.missing)} of {coverage.leaves} leaves have records"
    )


def svg(coverage: Coverage, *, depth: int) -> str:
    """A self-contained bar chart without scripts or external fonts."""
    shown = [row for row in coverage.rows if row.level <= depth]
    most = max((row.share for row in shown), default=0.0) or 1.0
    height = _ROW * (len(shown) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_NAME + _LENGTH + 130}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{coverage.tagged} records by category</title>",
    ]
    for number, row in enumerate(shown):
        top = _ROW * number + _ROW / 2
        length = _LENGTH * row.share / most
        weight = ' font-weight="bold"' if row.level == 1 else ""
        colour = ("#1f4e79", "#4f81bd", "#a6c1e0")[min(row.level, 3) - 1]
        lines += [
            f'<text x="{16 * (row.level - 1) + 6}" y="{top + 5:g}"{weight}>{escape(row.name)}</text>',
            f'<rect x="{_NAME}" y="{top - 7:g}" width="{length:.1f}" height="14" fill="{colour}"/>',
            f'<text x="{_NAME + length + 6:.1f}" y="{top + 5:g}">{row.count} ({100 * row.share:.1f}%)</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
