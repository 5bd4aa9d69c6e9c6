"""Packed sequences as one HTML page without scripts; it loads nothing, and all text is escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.viewer.packed_view import PackView, Piece, Segment
from megavl.foreign.printing import visible

COLOURS = 8
"""Number of colours that segments take in turn."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = Path(__file__).with_name("packed_page.css")


def page(views: Sequence[PackView], *, title: str, facts: Sequence[tuple[str, str]]) -> str:
    """A self-contained page; `facts` are names and values about the dataset."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>",
            '<input type="radio" name="by" id="by-segment" checked><input type="radio" name="by" id="by-loss">',
            f"<header><h1>{_text(title)}</h1>",
            "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>",
            _legend(),
            "</header><main>",
            *(_sequence(view) for view in views),
            "</main></body></html>\n",
        ]
    )


def _legend() -> str:
    return (
        '<div class="legend"><span class="choice"><label for="by-segment">Colour by segment</label>'
        '<label for="by-loss">by loss mask</label></span>'
        '<span><i class="key tok on">supervised</i> counts in the loss</span>'
        '<span><i class="key tok off">context</i> does not</span>'
        '<span><i class="special">EOS</i> special token</span>'
        '<span><i class="key pad"></i> padding</span></div>'
    )


def _sequence(view: PackView) -> str:
    fill = view.tokens / view.seq_length
    head = (
        f'<h2 id="sequence-{view.number}">Sequence {view.number} <small>{view.modality}</small></h2>'
        f'<p class="counts">{view.tokens:,} of {view.seq_length:,} tokens ({100 * fill:.2f}%), '
        f"{view.supervised:,} supervised, {_plural(len(view.segments), 'segment')}, {_plural(view.images, 'image')}</p>"
    )
    parts = "".join(
        f'<i class="c{n % COLOURS}" style="width:{100 * segment.tokens / view.seq_length:.4f}%" '
        f'title="{_text(segment.origin)}: {segment.tokens:,} tokens"></i>'
        for n, segment in enumerate(view.segments)
    )
    segments = "".join(_segment(segment, number=n) for n, segment in enumerate(view.segments))
    return f'<section>{head}<div class="bar">{parts}</div><div class="segments">{segments}</div></section>'


def _segment(segment: Segment, *, number: int) -> str:
    body = "".join(_pieces(segment.pieces))
    damage = f'<p class="damage">{_text(segment.damage)}</p>' if segment.damage else ""
    return (
        f'<article class="c{number % COLOURS}"><h3><b>{number + 1}</b> <code>{_text(segment.origin)}</code> '
        f"<small>{segment.tokens:,} tokens, {segment.supervised:,} supervised</small></h3>{damage}"
        f'<div class="text">{body}</div></article>'
    )


def _pieces(pieces: Sequence[Piece]) -> Iterator[str]:
    for count, piece in enumerate(pieces):
        mask = "on" if piece.supervised else "off"
        if piece.picture is not None:
            yield _figure(piece.picture, tokens=piece.tokens)
            continue
        hint = f"{piece.start}: {' '.join(map(str, piece.ids))}"
        if piece.special:
            yield f'<i class="special {mask}" title="{hint}">{_text(piece.text or "image")}</i>'
            continue
        shown = _text(piece.text).replace("\n", "<u>↵</u>\n").replace("\t", "<u>→</u>\t")
        yield f'<span class="tok {mask} n{count % 2}" title="{hint}">{shown}</span>'


def _figure(picture: Any, *, tokens: int) -> str:
    caption = f"<figcaption>{_text(picture.title)}<br>{tokens} tokens</figcaption>"
    if not picture.thumbnail:
        return f'<figure class="lost">{caption}</figure>'
    data = base64.b64encode(picture.thumbnail).decode("ascii")
    return f'<figure><img alt="" src="data:image/jpeg;base64,{data}">{caption}</figure>'


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _text(value: str) -> str:
    return html.escape(visible(value), quote=True)
