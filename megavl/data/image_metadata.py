"""Separates the pixels of an image file from its metadata, so that no EXIF, ICC, text or XMP can spoil the pixels.

Pillow reads metadata when it opens or decodes a file, and raises many kinds of errors where they are damaged or large.
It therefore gets the file without them. Only the orientation is kept, and read here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]

_SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    # The third and fourth are wrong, but written by some programs; the last two are BigTIFF.
    *((mark, "TIFF") for mark in (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0", b"MM\0+")),
)
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])")
_MAX_EXIF = 1 << 20
"""Most bytes of compressed EXIF that are looked at."""
_WEBP_FLAGS = 0x20 | 0x08 | 0x04
"""Bits of VP8X that announce ICC, EXIF and XMP."""
_TIFF_PIXELS = frozenset(
    (
        *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332),
        *(338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 0xBC01),
    )
)
"""Tags without which pixels cannot be decoded."""


class Pixels(NamedTuple):
    """An image file without its metadata."""

    data: bytes
    orientation: int
    """How it is turned, 1 (upright) to 8, as EXIF counts."""


class Damaged(Exception):
    """The parts of the file that hold pixels are incomplete or changed."""


def kind_of(data: bytes) -> Kind | None:
    """The format that the first bytes of a file show, or None for one that is not opened."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for mark, kind in _SIGNATURES if data.startswith(mark)), None)


def pixels_of(data: bytes, *, kind: Kind) -> Pixels:
    """The file without metadata, and its orientation. What cannot be parsed is left as it is.

    Raises:
        Damaged: a PNG ends inside its pixels, or their checksum does not match.
    """
    if kind == "JPEG":
        return _jpeg(data)
    if kind == "PNG":
        return _png(data)
    if kind == "WEBP":
        return _webp(data)
    if kind == "TIFF":
        return _tiff(data)
    return Pixels(data, 1)


def _jpeg(data: bytes) -> Pixels:
    """Without application segments and comments, apart from those that say how colours are stored.

    The index of further pictures in a file of a camera (MPO) is such a segment, so the first picture remains.
    """
    kept, exif, xmp = [memoryview(data)[:2]], b"", b""
    at, dropped = 2, False
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            return Pixels(data, _orientation(exif, xmp))
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        elif marker in (0xD9, 0xDA):
            # Most files have no metadata, and copying takes as long as all the rest here.
            clean = b"".join((*kept, memoryview(data)[at:])) if dropped else data
            return Pixels(clean, _orientation(exif, xmp))
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if end < at + 4 or end > len(data):
                return Pixels(data, _orientation(exif, xmp))
            if 0xE0 <= marker <= 0xEF or marker == 0xFE:
                content = data[at + 4 : end]
                if marker == 0xE1 and content.startswith(b"Exif\0"):
                    exif = exif or content
                elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/"):
                    xmp = xmp or content
                wanted = _says_colours(content)
                dropped = dropped or not wanted
            else:
                wanted = True
            if wanted:
                kept.append(memoryview(data)[at:end])
            at = end


def _says_colours(content: bytes) -> bool:
    """Whether an application segment tells libjpeg what the components are; short ones make Pillow fail."""
    return content.startswith((b"JFIF\0", b"Adobe")) and len(content) >= 12


def _png(data: bytes) -> Pixels:
    """Only the chunks that hold pixels; alpha and animation are not used either."""
    needed = {b"IHDR", b"IDAT"} | ({b"PLTE"} if data[25:26] == b"\x03" else set())
    seen = set[bytes]()
    kept, exif, xmp = [data[:8]], b"", b""
    for kind, start, end in _png_chunks(data):
        content = data[start:end]
        if kind in needed and (kind != b"PLTE" or b"IDAT" not in seen):
            if data[end : end + 4] != zlib.crc32(content, zlib.crc32(kind)).to_bytes(4, "big"):
                raise Damaged(f"chunk {kind.decode()} is cut off or changed")
            seen.add(kind)
            kept.append(data[start - 8 : end + 4])
        elif kind == b"eXIf":
            exif = exif or content
        elif kind in (b"tEXt", b"zTXt") and content.startswith(b"Raw profile type exif\0"):
            exif = exif or _raw_profile(content[22:], packed=kind == b"zTXt")
        elif kind == b"iTXt" and content.startswith(b"XML:com.adobe.xmp\0\0"):
            xmp = content
    if lost := needed - seen:
        raise Damaged(f"it has no {' and no '.join(sorted(kind.decode() for kind in lost))}")
    kept.append(b"\0\0\0\0IEND\xaeB`\x82")
    return Pixels(b"".join(kept), _orientation(exif, xmp))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, first byte and end of each chunk's content, up to the end of the image or of the file."""
    at = 8
    while at + 8 <= len(data) and data[at + 4 : at + 8] != b"IEND":
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, end
        at = end + 4


def _raw_profile(content: bytes, *, packed: bool) -> bytes:
    """EXIF that ImageMagick writes as hexadecimal text: a name, a length, and the digits."""
    try:
        if packed:
            content = zlib.decompressobj().decompress(content[1:], _MAX_EXIF)
        return bytes.fromhex("".join(content.decode("ascii").split("\n")[3:]))
    except (zlib.error, ValueError):
        return b""


def _webp(data: bytes) -> Pixels:
    kept, exif, xmp = [b"WEBP"], b"", b""
    at, end, lost = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little")), 0
    while at + 8 <= end:
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        content = data[at + 8 : at + 8 + size]
        if kind == b"EXIF":
            exif = exif or content
        elif kind == b"XMP ":
            xmp = xmp or content
        elif kind != b"ICCP":
            if kind == b"VP8X" and content:
                content = bytes([content[0] & ~_WEBP_FLAGS]) + content[1:]
            kept += [data[at : at + 8], content, b"\0" * (size % 2)]
            # A file that is cut off must go on saying so.
            lost = max(0, at + 8 + size - end)
        at += 8 + size + size % 2
    size = sum(map(len, kept)) + lost
    return Pixels(b"".join([b"RIFF", size.to_bytes(4, "little"), *kept]), _orientation(exif, xmp))


def _tiff(data: bytes) -> Pixels:
    """The first directory keeps the tags that decoding needs, and is the last one."""
    found = _directory(data)
    if found is None or found.end > len(data):
        return Pixels(data, 1)
    entries = [data[at : at + found.entry] for at in range(found.start, found.end, found.entry)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], found.order) in _TIFF_PIXELS]
    # The shorter directory stands in the same place, so no pixels move.
    directory = len(kept).to_bytes(found.counter, found.order) + b"".join(kept) + bytes(found.pointer)
    begin = found.start - found.counter
    return Pixels(data[:begin] + directory + data[begin + len(directory) :], _orientation(data, b""))


class _Directory(NamedTuple):
    """Where the first directory of a TIFF file, or of EXIF, has its entries."""

    order: Literal["little", "big"]
    start: int
    end: int
    entry: int
    """Bytes of an entry; its value begins `pointer` bytes before its end."""
    pointer: int
    counter: int
    """Bytes of the number in front of the entries."""


def _directory(data: bytes) -> _Directory | None:
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    if data[:2] not in (b"II", b"MM"):
        return None
    big = b"+" in data[2:4]
    pointer, counter, entry = (8, 8, 20) if big else (4, 2, 12)
    first = int.from_bytes(data[8:16] if big else data[4:8], order)
    start = first + counter
    end = start + entry * int.from_bytes(data[first:start], order)
    if first < 2 * pointer:
        return None
    return _Directory(order=order, start=start, end=end, entry=entry, pointer=pointer, counter=counter)


def _orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation of a TIFF directory, or else of XMP; 1 where neither tells."""
    if exif.startswith(b"Exif\0"):
        exif = exif[6:]
    if found := _directory(exif):
        for at in range(found.start, min(found.end, len(exif) - found.entry + 1), found.entry):
            if int.from_bytes(exif[at : at + 2], found.order) == _ORIENTATION:
                # Of the types of integers: 1 a byte, 3 two bytes, 4 four bytes.
                size = {1: 1, 3: 2, 4: 4}.get(int.from_bytes(exif[at + 2 : at + 4], found.order), 0)
                begin = at + found.entry - found.pointer
                value = int.from_bytes(exif[begin : begin + size], found.order)
                return value if 1 <= value <= 8 else 1
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else 1
