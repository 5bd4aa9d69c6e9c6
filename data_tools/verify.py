"""Check every byte of a dataset: `python data_tools/verify.py DIR`."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from megavl.config.errors import DataError, MegaVLError
from megavl.config.version import VERSION
from megavl.data.dataset import Source
from megavl.data.image import ImageError, ImageInfo, check_image
from megavl.data.shard import Shard
from megavl.data.table import ReadHandles
from megavl.foreign.printing import VisibleParser, say, say_error


def verify(path: str) -> dict[str, int]:
    """Check the dataset in a folder, and count what was checked.

    All files must have their hashes, all tokens and images their crc32. The image tokens must agree with the images,
    the ids with the vocabulary, and each sample must be in exactly one sequence.

    Raises:
        DataError: names the file and the first fault.
    """
    source = Source(path, handles=ReadHandles())
    source.check(share=(0, 1))
    counts = {"shards": len(source.shards), "samples": 0, "tokens": 0, "images": 0}
    for shard in tqdm(source.shards, unit=" shards", desc="verify"):
        for length in _samples(shard):
            counts["samples"] += 1
            counts["tokens"] += length
        counts["images"] += _images(shard)
    _membership(source)
    counts["sequences"] = sum(source.counts.values())
    return counts


def _samples(shard: Shard) -> Iterator[int]:
    manifest = shard.manifest
    for number in range(manifest.samples):
        ids, row = shard.tokens.read(number), shard.samples[number]
        where = f"{shard.tokens.path}: sample {number} ({shard.origin(number)})"
        if zlib.crc32(ids.astype("<i4").tobytes()) != int(row["crc32"]):
            raise DataError(f"{where}: tokens differ from their crc32; preprocess again")
        if ids.min(initial=0) < 0 or ids.max(initial=0) >= manifest.tokenizer.vocab_size:
            raise DataError(
                f"{where}: an id is outside the vocabulary of {manifest.tokenizer.vocab_size}; preprocess again"
            )
        image_id = manifest.tokenizer.image_id
        found = 0 if image_id is None else int(np.count_nonzero(ids == image_id))
        if found != int(row["images"]) * manifest.geometry.tokens:
            raise DataError(
                f"{where}: {found} image tokens for {int(row['images'])} images of {manifest.geometry.tokens}; "
                "preprocess again"
            )
        if any(not 0 <= span["start"] < span["end"] <= len(ids) for span in shard.spans_of(number)):
            raise DataError(f"{where}: a span of {shard.spans.path} is outside the sample; preprocess again")
        yield len(ids)


def _images(shard: Shard) -> int:
    for number in range(shard.manifest.images):
        data, row = shard.images.read_bytes(number), shard.image_table[number]
        where = f"{shard.images.path}: image {number}"
        if zlib.crc32(data) != int(row["crc32"]):
            raise DataError(f"{where}: bytes differ from their crc32; preprocess again")
        try:
            info = check_image(data, verify="full", max_aspect=float("inf"))
        except ImageError as error:
            raise DataError(f"{where}: {error}; preprocess again with --verify full") from error
        width, height = int(row["width"]), int(row["height"])
        if (info.width, info.height) != (width, height):
            raise DataError(
                f"{where}: is {info.width} x {info.height}, but its table says {width} x {height}"
                f"{_older(shard, info, size=(width, height))}; preprocess again"
            )
    return shard.manifest.images


def _older(shard: Shard, info: ImageInfo, *, size: tuple[int, int]) -> str:
    """Says where an older version of the code explains the size of an image."""
    made_by = shard.manifest.code_version
    version = f" (the shard was made by version {made_by}, this is {VERSION})" if made_by != VERSION else ""
    if info.format == "TIFF" and size == (info.height, info.width):
        return (
            f", as versions up to 0.2.0 stored the sides of a TIFF that lies on its side (orientation 5 to 8){version}"
        )
    return version


def _membership(source: Source) -> None:
    """Every sample is in one sequence, with its own length; no sequence is too long."""
    lengths = [shard.tokens.lengths_of(0, len(shard.tokens)) for shard in source.shards]
    placed = [np.zeros(len(part), np.int32) for part in lengths]
    last, room = -1, source.manifest.pack.seq_length
    for _, rows in source.packs.blocks():
        for number in np.unique(rows["shard"]):
            members = rows[rows["shard"] == number]
            wrong = members[members["tokens"] != lengths[number][members["sample"]]]
            if len(wrong):
                raise DataError(
                    f"{source.packs.path}: says {int(wrong['tokens'][0])} tokens where sample "
                    f"{int(wrong['sample'][0])} of {source.shards[number].manifest.name} has another number; "
                    "preprocess again"
                )
            np.add.at(placed[number], members["sample"], 1)
        for pack, tokens in zip(rows["pack"].tolist(), rows["tokens"].tolist()):
            room = (room if pack == last else source.manifest.pack.seq_length) - tokens
            last = pack
            if room < 0:
                raise DataError(f"{source.packs.path}: sequence {pack} is too long; preprocess again")
    for counts, shard in zip(placed, source.shards):
        if (counts != 1).any():
            sample = int(np.flatnonzero(counts != 1)[0])
            raise DataError(
                f"{source.packs.path}: sample {sample} of {shard.manifest.name} stands in {int(counts[sample])} "
                "sequences; preprocess again"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = VisibleParser(prog="verify.py", description="Check every byte of a preprocessed dataset.")
    parser.add_argument("dataset", help="folder written by preprocess.py")
    options = parser.parse_args(arguments)
    try:
        counts = verify(options.dataset)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    say(f"{options.dataset}: good, " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
