"""Show packed sequences: `python data_tools/view.py DIR [--sample I ...] [--html out.html]`.

Prints to the terminal, or writes one HTML page with thumbnails. The text is coloured by sample and by loss mask. Each
sample names the file and line that it came from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.viewer.packed_page import page
from data_tools.viewer.packed_view import PackReader, PackView, Piece
from megavl.config.errors import DataError, MegaVLError, UsageError
from megavl.data.manifest import DatasetManifest, read_manifest
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.files.new_file import write_file
from megavl.foreign.printing import VisibleParser, say, say_error, visible

_BAR = 60
_COLOURS = (34, 33, 32, 35, 36, 31)
"""Terminal colours that segments take in turn."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = VisibleParser(prog="view.py", description="Show packed sequences of a dataset.")
    parser.add_argument("dataset", help="folder written by preprocess.py")
    parser.add_argument("--sample", type=int, nargs="+", metavar="I", help="numbers of sequences, text first")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="number of sequences without --sample")
    parser.add_argument("--html", metavar="FILE", help="write a page instead of printing")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the path at which the dataset was made")
    options = parser.parse_args(arguments)
    try:
        return _show(options)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of the pipe has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _show(options: argparse.Namespace) -> int:
    folder = Path(options.dataset)
    manifest = read_manifest(folder / "manifest.json", kind=DatasetManifest)
    tokenizer = _tokenizer(folder, manifest, given=options.tokenizer)
    reader = PackReader(folder, tokenizer=tokenizer)
    total = manifest.text_packs + manifest.multimodal_packs
    numbers = options.sample or _spread(manifest.text_packs, total=total, count=max(1, options.count))
    for number in numbers:
        if not 0 <= number < total:
            raise UsageError(f"--sample {number}: {folder} has sequences 0 to {total - 1}, text first")
    facts = _facts(manifest, total=total, tokenizer=tokenizer)
    views = (reader.view(number) for number in numbers)
    if options.html:
        content = page(list(views), title=str(folder), facts=facts)
        write_file(Path(options.html), content.encode("utf-8"))
        say(f"wrote {options.html}: sequences {', '.join(map(str, numbers))}")
        return 0
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for name, value in facts:
        say(f"{name}: {value}")
    for view in views:
        # Not `say`, which would show the colours as text; `_lines` has made the rest visible.
        print("\n".join(_lines(view, colour=colour)))
    return 0


def _tokenizer(folder: Path, manifest: DatasetManifest, *, given: str | None) -> Tokenizer | None:
    """The tokenizer that made the dataset; None when no path is given and the recorded path no longer has it."""
    path = given or _recorded(folder)
    try:
        tokenizer = None if path is None else open_tokenizer(path)
    except DataError:
        if given:
            raise
        tokenizer = None
    if tokenizer is not None and tokenizer.sha256 == manifest.tokenizer.sha256:
        return tokenizer
    if given and tokenizer is not None:
        raise DataError(
            f"--tokenizer {given}: has sha256 {tokenizer.sha256}, but {folder} was made with one of "
            f"{manifest.tokenizer.sha256}; give that one"
        )
    where = "was not recorded" if path is None else f"is no longer at {path}"
    say(f"the tokenizer {where}: ids are shown; name it with --tokenizer to see text", to_errors=True)
    return None


def _recorded(folder: Path) -> str | None:
    try:
        content: Any = json.loads((folder / "report.json").read_bytes())
    except (OSError, ValueError):
        return None
    path = content.get("tokenizer") if isinstance(content, dict) else None
    return path if isinstance(path, str) else None


def _spread(texts: int, *, total: int, count: int) -> list[int]:
    """Numbers of sequences, spread evenly over both modalities."""
    chosen: list[int] = []
    for first, end in ((0, texts), (texts, total)):
        share = min(end - first, count if end - first == total else (count + 1) // 2)
        chosen += [first + number * (end - first) // share for number in range(share)]
    return chosen[:count]


def _facts(manifest: DatasetManifest, *, total: int, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    shards = manifest.shards
    return [
        ("fingerprint", manifest.fingerprint[:16]),
        ("sequences", f"{total:,} ({manifest.text_packs:,} text, {manifest.multimodal_packs:,} multimodal)"),
        ("samples", f"{sum(shard.samples for shard in shards):,} in {len(shards):,} shards"),
        ("tokens", f"{sum(shard.tokens for shard in shards):,}"),
        ("images", f"{sum(shard.images for shard in shards):,} of {manifest.geometry.tokens} tokens"),
        ("limits", f"{manifest.pack.seq_length:,} tokens and {manifest.pack.max_images} images per sequence"),
        ("tokenizer", "not found: ids are shown" if tokenizer is None else str(tokenizer.path)),
    ]


def _lines(view: PackView, *, colour: bool) -> Iterator[str]:
    full = round(_BAR * view.tokens / view.seq_length)
    yield ""
    yield (
        f"=== sequence {view.number} ({view.modality}) [{'#' * full}{'.' * (_BAR - full)}] "
        f"{view.tokens}/{view.seq_length} tokens, {100 * view.tokens / view.seq_length:.2f}%, "
        f"{view.supervised} supervised, {view.images} images"
    )
    for number, segment in enumerate(view.segments):
        yield (
            f"--- {number + 1}/{len(view.segments)} {visible(segment.origin)}: {segment.tokens} tokens, "
            f"{segment.supervised} supervised{'; ' + visible(segment.damage) if segment.damage else ''}"
        )
        paint = _COLOURS[number % len(_COLOURS)] if colour else 0
        yield "".join(_piece(piece, paint=paint) for piece in segment.pieces)


def _piece(piece: Piece, *, paint: int) -> str:
    """Supervised text is bold, the rest faint; without colours, only special tokens are marked."""
    if piece.picture is not None:
        text = f"<{visible(piece.picture.title)}, {piece.tokens} tokens>"
    else:
        text = f"<{piece.text or 'image'}>" if piece.special else visible(piece.text)
    return f"\033[{1 if piece.supervised else 2};{paint}m{text}\033[0m" if paint else text


if __name__ == "__main__":
    sys.exit(main())
