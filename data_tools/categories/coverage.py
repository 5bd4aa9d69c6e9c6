"""The number of records of each category, as a text table with bars and as an SVG picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from data_tools.categories.tree import Category, Taxonomy

_BAR = 30
"""Characters of the longest bar."""
_ROW, _NAME, _LENGTH = 22, 330, 420
"""Pixels: height of a row, width of the names, length of the longest bar."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Counts of a set of records."""

    taxonomy: Taxonomy
    counts: Mapping[str, int]
    """Number of records in each category and below it, in the order of the tree."""
    tagged: int
    untagged: int

    @property
    def missing(self) -> list[str]:
        """Leaves without a record; a record that names an inner category fills none of its leaves."""
        return [leaf.id for leaf in self.taxonomy.leaves() if not self.counts[leaf.id]]

    def rows(self, *, depth: int) -> list[tuple[Category, int, float]]:
        """Categories down to level `depth`, each with its count and its share of all records with a category."""
        shown = [category for category in self.taxonomy.categories.values() if category.level <= depth]
        return [(category, count := self.counts[category.id], count / max(1, self.tagged)) for category in shown]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tagged": self.tagged,
            "untagged": self.untagged,
            "categories": dict(self.counts),
            "missing": self.missing,
        }


def cover(counts: Mapping[str, int], *, untagged: int, taxonomy: Taxonomy) -> Coverage:
    """Sum up the records of each category and of all below it; `counts` has them by the category that they name."""
    sums = dict.fromkeys(taxonomy.categories, 0)
    for id, count in counts.items():
        parts = id.split("/")
        for depth in range(1, len(parts) + 1):
            sums["/".join(parts[:depth])] += count
    return Coverage(taxonomy=taxonomy, counts=sums, tagged=sum(counts.values()), untagged=untagged)


def table(coverage: Coverage, *, depth: int) -> Iterator[str]:
    """Lines of text with id, records, share and a bar for each category down to level `depth`."""
    rows = coverage.rows(depth=depth)
    wide = max(len(category.id) for category, _, _ in rows)
    for category, count, share in rows:
        yield f"{category.id:<{wide}}  {count:>9}  {100 * share:5.1f}%  {'#' * round(_BAR * share)}".rstrip()
    leaves = len(coverage.taxonomy.leaves())
    yield (
        f"{coverage.tagged} records with a category, {coverage.untagged} without; "
        f"{leaves - len(coverage.missing)} of {leaves} leaves have records"
    )


def svg(coverage: Coverage, *, depth: int) -> str:
    """A self-contained bar chart without scripts or external fonts."""
    rows = coverage.rows(depth=depth)
    most = max((share for _, _, share in rows), default=0.0) or 1.0
    height = _ROW * (len(rows) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_NAME + _LENGTH + 130}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f"<title>{coverage.tagged} records by category</title>",
    ]
    for number, (category, count, share) in enumerate(rows):
        top = _ROW * number + _ROW / 2
        length = _LENGTH * share / most
        weight = ' font-weight="bold"' if category.level == 1 else ""
        colour = ("#1f4e79", "#4f81bd", "#a6c1e0")[min(category.level, 3) - 1]
        lines += [
            f'<text x="{16 * (category.level - 1) + 6}" y="{top + 5:g}"{weight}>{escape(category.name)}</text>',
            f'<rect x="{_NAME}" y="{top - 7:g}" width="{length:.1f}" height="14" fill="{colour}"/>',
            f'<text x="{_NAME + length + 6:.1f}" y="{top + 5:g}">{count} ({100 * share:.1f}%)</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
