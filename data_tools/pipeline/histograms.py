"""Histograms of a report: tokens and images per sample, and the fill of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_FILL = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)
"""Upper borders of the bins, as shares of a sequence."""
_BAR = 30
_TITLES = {"sample_tokens": "tokens of a sample", "sample_images": "images of a sample", "fill": "fill of a sequence"}

Numbers = npt.NDArray[np.integer[Any]]
Histogram = list[dict[str, Any]]


def histograms(
    *,
    lengths: Numbers,
    images: Numbers,
    samples: Numbers,
    fills: npt.NDArray[np.float64],
    sequences: Numbers,
    seq_length: int,
) -> dict[str, Histogram]:
    """Counts per bin; a bin includes its upper border and excludes its lower one.

    Args:
        lengths: tokens of a sample, one entry per kind of sample.
        images: images of a sample, likewise.
        samples: number of samples of each kind.
        fills: filled shares of sequences.
        sequences: number of sequences with each share.
        seq_length: tokens of a sequence.
    """
    borders = [32]
    while borders[-1] * 2 < seq_length:
        borders.append(borders[-1] * 2)
    return {
        "sample_tokens": _counts(lengths, samples, [*(b for b in borders if b < seq_length), seq_length]),
        "sample_images": _counts(images, samples, list(range(int(images.max(initial=0)) + 1))),
        "fill": _counts(fills, sequences, _FILL),
    }


def histogram_lines(found: Mapping[str, Histogram]) -> Iterator[str]:
    """Lines for the terminal, without the empty bins at either end."""
    for name, title in _TITLES.items():
        bins = found[name]
        filled = [number for number, row in enumerate(bins) if row["count"]]
        if not filled or name == "sample_images" and len(filled) == 1 and not filled[0]:
            continue
        yield f"{title}:"
        most = max(row["count"] for row in bins)
        for row in bins[filled[0] : filled[-1] + 1]:
            label = f"{row['up_to']:.1%}" if name == "fill" else f"{row['up_to']:,}"
            label = label if name == "sample_images" else f"up to {label}"
            yield f"  {label:>12} {row['count']:>12,} {'#' * -(-_BAR * row['count'] // most)}"


def _counts(values: npt.NDArray[Any], times: Numbers, borders: Sequence[float]) -> Histogram:
    bins = np.searchsorted(borders, values, side="left")
    counts = np.bincount(bins, weights=times, minlength=len(borders)).astype(np.int64)
    return [{"up_to": border, "count": count} for border, count in zip(borders, counts.tolist())]
