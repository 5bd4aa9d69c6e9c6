"""Text of pictures in SVG, and the colours that they share."""

from __future__ import annotations

from xml.sax.saxutils import escape

from megavl.foreign.printing import visible

INK, GREY, FAINT = "#222222", "#767676", "#e4e4e4"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""


def text(
    x: float, y: float, content: str, *, size: int = 13, anchor: str = "start", fill: str = INK, weight: str = "normal"
) -> str:
    """A text at a point; control characters in it become visible."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{escape(visible(content, keep=''))}</text>"
    )


def short(content: str, most: int) -> str:
    """At most so many characters."""
    return content if len(content) <= most else content[: most - 1] + "…"


def frame(parts: list[str], *, width: int, height: int, title: str) -> str:
    """A whole picture on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
    )
    name = f"<title>{escape(visible(title, keep=''))}</title>"
    return "\n".join([head, name, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])
