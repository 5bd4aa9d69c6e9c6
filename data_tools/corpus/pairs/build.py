"""The work that `documents`, `notebooks` and `screens` share: read the sources, split them, write their pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.corpus.pairs.fonts import NO_CHINESE_FONT
from data_tools.corpus.pairs.records import PairCommand, PairOptions, RecordWriter, SourceResult
from data_tools.corpus.pairs.sources import Dropped, InputFormats, Source, find_sources, heldout_sources, load
from megavl.config.errors import DataError


@dataclass(frozen=True, kw_only=True)
class SourceOptions(PairOptions):
    """Options of the commands that make pairs from whole sources."""

    limit: int | None
    """Number of sources to read; None reads all."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(PairOptions):
    """Options of the commands that can use the documentation of this machine and its fonts."""

    size: int
    """Bytes of documentation."""
    debian_root: Path
    fonts: list[Path]
    side: int
    """Long side of an image in pixels."""


def build_from_sources(
    command: PairCommand,
    options: SourceOptions,
    make: Callable[[Source, str], SourceResult],
    *,
    folder: Path,
    formats: InputFormats,
    settings: Mapping[str, Any],
    has_chinese_font: bool = True,
) -> dict[str, int]:
    """Write the pairs of all sources; returns the number of records by file.

    Args:
        command: what is written into the records.
        options: options of the user.
        make: makes pairs from a source and its text, in several threads at once.
        folder: output folder.
        formats: accepted inputs.
        settings: further settings for `corpus.json`.
        has_chinese_font: whether Chinese text can be drawn.

    Raises:
        UsageError: an input is missing.
        DataError: there is no usable input, or Chinese text and no font for it.
    """
    dropped = Dropped()
    sources = find_sources(options.input, formats=formats, dropped=dropped, limit=options.limit)
    chinese = next((source for source in sources if source.script == "chinese"), None)
    if chinese is not None and not has_chinese_font:
        raise DataError(f"{chinese.name}: is written in Chinese, and {NO_CHINESE_FONT}")
    held = heldout_sources(sources, share=options.heldout_share, seed=options.seed)
    writer = RecordWriter(folder=folder, command=command, options=options, dropped=dropped)
    writer.write_all(
        sources,
        lambda source: make(source, load(source, formats=formats)),
        split_of=lambda source: "heldout" if source.key in held else "train",
    )
    return writer.finish({**settings, "heldout": options.heldout_share, f"{command.unit}s": len(sources)})
