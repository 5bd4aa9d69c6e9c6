"""Damaged image files of every format: each is stored or rejected, and what is stored trains."""

import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megavl.data.image import ImageError, check_image, decode_image
from megavl.data.loader import StepLoader
from tests.unit.data.corpus_files import make_tokenizer, open_small, run_preprocess, small_sampler, write_jsonl
from tests.unit.data_tools.format_files import rejects

SIZE = (56, 40)
MARKS = (
    b"Exif",
    b"ICC_PROFILE",
    b"iCCP",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"eXIf",
    b"EXIF",
    b"XMP ",
    b"8BIM",
    b"MPF",
    b"xap",
)
"""Where metadata begin."""


def _bases() -> dict[str, list[bytes]]:
    """Sound files by format, most of them with metadata."""
    draw = np.random.default_rng(3)
    small = Image.fromarray(draw.integers(0, 256, (7, 9, 3), np.uint8))
    image = small.resize(SIZE, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif.update({0x010E: "a picture", 0x0112: 6, 0x011A: 72.0, 0x0128: 2})
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 300)
    text.add_text("Long", "y" * 300, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    icc, xmp = draw.bytes(400), b'<x tiff:Orientation="3"/>'
    jpeg: dict[str, Any] = {"exif": exif.tobytes(), "icc_profile": icc, "xmp": xmp, "comment": b"c"}
    deep = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])
    modes = {mode: image.convert(mode) for mode in ("L", "P", "1", "RGBA", "CMYK", "LA")}
    kinds: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "JPEG": [(image, jpeg), (image, {**jpeg, "progressive": True}), (modes["L"], {}), (modes["CMYK"], jpeg)],
        "MPO": [(image, {"save_all": True, "append_images": [modes["L"].convert("RGB")]})],
        "PNG": [
            (image, {"pnginfo": text, "exif": exif.tobytes(), "icc_profile": icc}),
            *((modes[mode], {"pnginfo": text}) for mode in ("P", "1", "RGBA", "LA")),
            (Image.fromarray(deep.astype(np.uint16)), {}),
            (image, {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}),
        ],
        "WEBP": [
            (image, {"exif": exif.tobytes(), "icc_profile": icc, "xmp": xmp}),
            (modes["RGBA"], {"lossless": True, "exif": exif.tobytes()}),
            (image, {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}),
        ],
        "GIF": [(image, {"comment": b"c" * 300}), (modes["P"], {"transparency": 3, "save_all": True})],
        "BMP": [(image, {}), (modes["P"], {}), (modes["1"], {}), (modes["L"], {})],
        "TIFF": [
            *((image, {"compression": name}) for name in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
            (image, {"tiffinfo": {274: 6, 270: "x" * 99, 282: 72.0}, "icc_profile": icc}),
            (modes["1"], {"compression": "group4"}),
            (modes["P"], {}),
            (Image.fromarray((deep / 65535).astype(np.float32)), {}),
            (Image.fromarray(deep.astype(np.uint16)), {"compression": "tiff_lzw"}),
        ],
    }
    return {kind: [_saved(*each, kind=kind) for each in files] for kind, files in kinds.items()}


def _saved(image: Image.Image, options: dict[str, Any], *, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _flipped(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 3, 20))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _flipped_head(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 2, 4))):
        data[draw.randrange(4, min(160, len(data)))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.choice((draw.randrange(1, len(data)), len(data) - draw.randrange(1, 24))) :]


def _swapped(data: bytearray, draw: random.Random) -> None:
    """Exchange two chunks; in a format without chunks, two byte ranges."""
    chunks = list(_chunks(data))
    if len(chunks) < 3:
        edges = sorted(draw.sample(range(8, len(data)), 4))
        chunks, first, second = [*zip(edges, edges[1:])], 0, 2
    else:
        first, second = sorted(draw.sample(range(len(chunks)), 2))
    (a, b), (c, d) = chunks[first], chunks[second]
    data[:] = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _chunks(data: bytearray) -> Iterator[tuple[int, int]]:
    """Start and end of the chunks or segments of a PNG, JPEG or WebP."""
    if data.startswith(b"\x89PNG"):
        at, size = 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big")
    elif data.startswith(b"\xff\xd8"):
        at, size = 2, lambda at: 2 + int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 1] != 0xDA else 1 << 40
    elif data.startswith(b"RIFF"):
        at, size = 12, lambda at: 8 + -(-int.from_bytes(data[at + 4 : at + 8], "little") // 2) * 2
    else:
        return
    while at < len(data):
        end = min(len(data), at + size(at))
        yield at, end
        at = end


def _bad_metadata(data: bytearray, draw: random.Random) -> None:
    """Change bytes after the start of metadata; without any, at the end of the file."""
    found = [at for mark in MARKS if (at := data.find(mark)) >= 0]
    begin = draw.choice(found) + 4 if found else max(8, len(data) - 120)
    for _ in range(draw.choice((1, 4, 40))):
        data[min(len(data) - 1, begin + draw.randrange(90))] = draw.choice((0, 255, draw.randrange(256)))


def _longer(data: bytearray, draw: random.Random) -> None:
    at = draw.choice((len(data), draw.randrange(len(data))))
    data[at:at] = draw.randbytes(draw.choice((1, 30, 3000)))


def _zeroed(data: bytearray, draw: random.Random) -> None:
    at, size = draw.randrange(4, len(data)), draw.choice((2, 4, 60))
    data[at : at + size] = bytes([draw.choice((0, 255))]) * min(size, len(data) - at)


CHANGES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    *(_flipped, _flipped_head, _cut, _swapped, _bad_metadata, _longer, _zeroed),
)


def _files(count: int) -> Iterator[bytes]:
    """Changed files, each format and each change as often as the others."""
    draw, bases = random.Random(5), _bases()
    kinds = list(bases)
    for number in range(count):
        data = bytearray(draw.choice(bases[kinds[number % len(kinds)]]))
        for _ in range(1 + number % 3 // 2):
            if len(data) > 200:
                CHANGES[number // len(kinds) % len(CHANGES)](data, draw)
        yield bytes(data)


def _check_kinds_of_error(files: list[bytes]) -> None:
    """Nothing but ImageError is raised, and what is accepted decodes."""
    for data in files:
        outcomes = []
        for call in (check_image, lambda data: check_image(data, verify="full"), decode_image):
            try:
                call(data)
                outcomes.append("")
            except ImageError as error:
                outcomes.append(error.reason)
        assert outcomes[0] or not any(outcomes), outcomes
        assert outcomes[1] == outcomes[2]


def _check_training(out: Path, tokenizer: Path, *, workers: int, capfd: pytest.CaptureFixture[str]) -> int:
    """Every stored image decodes in the loader, and its worker lives on; returns the number of images."""
    dataset = open_small(out, tokenizer=tokenizer)
    steps = dataset.sources[0].counts["multimodal"]
    loader = StepLoader(
        dataset,
        sampler=small_sampler(dataset, batch=1, fraction=1.0),
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        num_workers=workers,
        prefetch_images=16,
        max_bad_in_row=1,
        cross_document_attention=False,
        total_steps=steps,
        worker_timeout_s=1800,
    )
    try:
        images, pids = 0, set[int]()
        for step in range(steps):
            (batch,) = loader.get(step)
            assert not batch.bad_samples
            images += len(batch.images)
            pids |= set(loader._pool.pids)
        assert len(pids) == workers
    finally:
        loader.close()
    assert "image worker" not in capfd.readouterr().err
    return images


def _fuzz(root: Path, count: int, *, capfd: pytest.CaptureFixture[str], report: Callable[..., None]) -> None:
    started = time.monotonic()
    tokenizer = make_tokenizer(root / "tokenizer")
    files = list(_files(count))
    _check_kinds_of_error(files)
    for number, data in enumerate(files):
        (root / f"{number}.bin").write_bytes(data)
    records = [{"image": f"{number}.bin", "text": "red"} for number in range(count)]
    out = root / "out"
    more = ["--verify", "scaled", "--max-bad-frac", "1"]
    assert run_preprocess([write_jsonl(root / "in.jsonl", records)], tokenizer=tokenizer, output=out, more=more) == 0
    made = json.loads((out / "report.json").read_text())
    reasons = Counter(reason for reason, _ in rejects(out))
    assert made["records"] == count and made["samples"] + reasons.total() == count
    assert all(reason.startswith("image_") for reason in reasons)
    assert made["samples"] > count // 5 and reasons.total() > count // 5
    for workers in (0, 1):
        assert _check_training(out, tokenizer, workers=workers, capfd=capfd) == made["images"]
    rows = sorted(reasons.items(), key=lambda item: -item[1])
    report(("stored", made["samples"]), *rows, ("seconds", time.monotonic() - started))


def test_150_damaged_files_are_stored_or_rejected(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], report_table: Callable[..., None]
) -> None:
    _fuzz(tmp_path, 150, capfd=capfd, report=report_table)


@pytest.mark.slow
def test_3000_damaged_files_are_stored_or_rejected(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], report_table: Callable[..., None]
) -> None:
    _fuzz(tmp_path, 3000, capfd=capfd, report=report_table)
