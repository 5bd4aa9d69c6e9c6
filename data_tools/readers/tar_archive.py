"""WebDataset tars: headers are read one by one, contents only when they are needed. Nothing is extracted.

The reader is strict, so that a hostile archive costs neither memory nor endless loops. Sizes are never negative, an
extended header never exceeds 1 MiB, and no member passes the end of the file. Archives that were joined end to end are
read to the last member. The standard library's `tarfile` does not serve: it ends silently at a damaged header, reads
extended headers of any declared size, and stops between joined archives.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.readers.record import IMAGE_SUFFIXES, MAX_RECORD, Entry, Picture, RecordError, Span
from data_tools.readers.references import DRAWINGS, KIND_OF_SUFFIX, NAME_OF_KIND, Kind
from data_tools.readers.splits import Split, group
from megavl.config.errors import DataError, UsageError
from megavl.data.inline_image import MAX_IMAGE
from megavl.foreign.reading import regular_descriptor

_KIND_OF_SUFFIX: Mapping[str, Kind] = {**dict.fromkeys(DRAWINGS, "image"), **KIND_OF_SUFFIX}
_KNOWN = {*_KIND_OF_SUFFIX, "txt", "json"}
"""Ends of the names of members that are used, or refused; others are no part of a record."""
_BLOCK = 512
_ZEROS = 1 << 20
_MAX_EXTENDED = 1 << 20
"""Bytes of a header that holds a long name; ordinary ones have a few hundred."""
_EXTENDED = (b"L", b"K", b"x", b"X", b"g")
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """One member of an archive, or the damage found instead."""

    number: int
    """From 1, as `tar --list` shows them."""
    name: bytes
    begin: int
    """First byte of its headers."""
    start: int
    """First byte of its content."""
    size: int
    directory: bool = False
    problem: RecordError | None = None
    """Why it cannot be used."""


@dataclass(kw_only=True)
class _Key:
    """Adjacent members with the same key."""

    number: int
    key: bytes
    begin: int
    files: dict[str, Member] = field(default_factory=dict)
    problem: RecordError | None = None


def is_tar(start: bytes) -> bool:
    """Whether a file that begins with these bytes (at least 512) is a tar archive."""
    return len(start) >= _BLOCK and _checksum_holds(start[:_BLOCK])


def divide_tar(path: str | Path, *, size: int, limit: int | None = None) -> list[Split]:
    """Divide an archive into splits of about `size` bytes, between two keys; `limit` keys at most.

    Raises:
        UsageError: the file cannot be read.
    """
    handle = _open(path)
    try:
        total = os.fstat(handle).st_size
        hashes, numbers, begins = array("Q"), array("q"), array("q")
        for keyed in _keys(members(handle, start=0, end=total)):
            # Damage has no key, so no later member can share it.
            digest = hashlib.blake2b(keyed.key or b"\0%d" % keyed.number, digest_size=8).digest()
            hashes.append(int.from_bytes(digest, "little"))
            numbers.append(keyed.number)
            begins.append(keyed.begin)
    finally:
        os.close(handle)
    _, index, count = np.unique(np.array(hashes, np.uint64), return_inverse=True, return_counts=True)
    scattered = np.array(numbers, np.int64)[count[index] > 1]
    ends = chain(islice(begins, 1, None), [total])
    chunks = ((begin, end, number, 1) for begin, end, number in zip(begins, ends, numbers))
    splits = group(chunks, path=path, position_kind="member", size=size, limit=limit)
    borders = np.searchsorted(scattered, [split.first_position for split in splits] + [sys.maxsize])
    return [
        replace(split, scattered=tuple(scattered[first:last].tolist()))
        for split, first, last in zip(splits, borders, borders[1:])
    ]


def tar_entries(split: Split) -> Iterator[Entry]:
    """The records of a split: each key with the contents of its members.

    Raises:
        DataError: the file has shrunk since it was divided.
    """
    scattered = set(split.scattered)
    handle = _open(split.path)
    try:
        found = members(handle, start=split.start, end=split.end, number=split.first_position)
        for key in _keys(found):
            problem = key.problem
            if key.number in scattered:
                problem = RecordError(
                    f"key {_shown(key.key)}: its members are not adjacent; write the archive with tar --sort=name",
                    "tar_unsorted",
                )
            entry = Entry(key.number, problem, 0) if problem is not None else _read(handle, key, path=split.path)
            if isinstance(entry.content, RecordError):
                kinds = (_KIND_OF_SUFFIX.get(_last(suffix)) for suffix in key.files)
                entry.content.held = Counter(NAME_OF_KIND[kind] for kind in kinds if kind)
            yield entry
    finally:
        os.close(handle)


def members(handle: int, *, start: int, end: int, number: int = 1) -> Iterator[Member]:
    """All members between two bytes of an archive, up to the first damage; a header must begin at `start`."""
    total = os.fstat(handle).st_size
    position = begin = start
    name, size, sparse = b"", -1, False
    while position < end:
        header = os.pread(handle, _BLOCK, position)
        if header and not any(header) and begin == position:
            position = begin = _after_zeros(handle, position)
            continue
        if problem := _damage(header):
            yield Member(number, b"", begin, position, 0, problem=problem)
            return
        flag, declared = header[156:157], _size(header) or 0
        position += _BLOCK
        if flag in _EXTENDED:
            content = os.pread(handle, declared, position) if declared <= _MAX_EXTENDED else b""
            records = _pax(content) if flag in (b"x", b"X") else {}
            if len(content) < declared or records is None:
                problem = _lost("an extended header is damaged or cut off")
                yield Member(number, b"", begin, position, 0, problem=problem)
                return
            name = content.split(b"\0")[0] if flag == b"L" else records.get(b"path", name)
            size = _pax_size(records.get(b"size"), otherwise=size)
            sparse = sparse or any(key.startswith(b"GNU.sparse") for key in records)
            position += _padded(declared)
            continue
        if flag == b"S":
            position = _after_sparse_map(handle, header, position)
        name = name or _name(header)
        # Links, devices and directories have no content, whatever their headers say.
        size = 0 if flag in (b"1", b"2", b"3", b"4", b"5", b"6") else declared if size < 0 else size
        directory = flag == b"5" or (flag in (b"0", b"\0") and name.endswith(b"/"))
        problem = None if directory else _refusal(name, flag=b"S" if sparse else flag)
        if position + size > total:
            text = f"{_shown(name)}: declares {size} bytes, which the file does not hold; it is cut off, get it again"
            problem = RecordError(text, "tar_truncated")
        yield Member(number, name, begin, position, size, directory, problem)
        number, position = number + 1, position + _padded(size)
        begin, name, size, sparse = position, b"", -1, False
    if position > begin:
        yield Member(number, b"", begin, position, 0, problem=_damage(b""))


def _keys(found: Iterator[Member]) -> Iterator[_Key]:
    """Adjacent files with the same key, without members that have none (`README`, `.hidden`, directories)."""
    current: _Key | None = None
    for member in found:
        key, suffix = _split(member.name)
        problem = member.problem
        if member.directory or not (key or problem):
            continue
        if current is None or current.key != key or not key:
            if current is not None:
                yield current
            current = _Key(number=member.number, key=key, begin=member.begin)
        if problem is None and suffix in current.files:
            problem = RecordError(f"{_shown(member.name)}: occurs twice", "tar_unsorted")
        current.problem = current.problem or problem
        if _last(suffix) in _KNOWN:
            current.files[suffix] = member
    if current is not None:
        yield current


def _refusal(name: bytes, *, flag: bytes) -> RecordError | None:
    shown = _shown(name)
    if flag in (b"1", b"2"):
        return RecordError(f"{shown}: is a link; store the file itself", "tar_link")
    if flag not in (b"0", b"\0", b"7"):
        return RecordError(f"{shown}: is a device, a sparse file or of unknown kind", "tar_special")
    if name.startswith(b"/") or b".." in name.split(b"/"):
        return RecordError(f"{shown}: leads out of the archive", "tar_path")
    return None


def _read(handle: int, key: _Key, *, path: str) -> Entry:
    """The images of a key, in the order of their numbers, and its text or record."""
    shown = _shown(key.key)
    images: list[Picture] = []
    texts: dict[str, bytes | None] = {"txt": None, "json": None}
    size = 0
    # Beside images a drawing or document is what they were made from.
    drawn = any(_last(suffix) in IMAGE_SUFFIXES for suffix in key.files)
    files = [suffix for suffix in key.files if not (drawn and _last(suffix) in DRAWINGS)]
    for suffix in sorted(files, key=_natural if _numbered(files) else lambda _: 0):
        member, last = key.files[suffix], _last(suffix)
        if last in _KNOWN and last not in (*IMAGE_SUFFIXES, *texts):
            kinds = ", ".join(IMAGE_SUFFIXES)
            problem = RecordError(f"{_shown(member.name)}: only text and {kinds} are trained", "unsupported_media")
            return Entry(key.number, problem, 0)
        image = last in IMAGE_SUFFIXES
        if member.size > (MAX_IMAGE if image else MAX_RECORD):
            reason = "image_too_large" if image else "record_too_long"
            return Entry(key.number, RecordError(f"{_shown(member.name)}: {member.size} bytes", reason), 0)
        if image:
            # Read later, one at a time, so that it is still in the processor's cache when it is decoded.
            images.append(Picture(name=_shown(member.name), data=Span(path, member.start, member.size)))
            continue
        if texts[last] is not None:
            problem = RecordError(
                f"key {shown}: several members end in .{last} ({', '.join(key.files)}); a key ends at the first dot of "
                "a file name, so rename files whose names have further dots",
                "tar_names",
            )
            return Entry(key.number, problem, 0)
        data = os.pread(handle, member.size, member.start)
        while len(data) < member.size and (more := os.pread(handle, member.size - len(data), member.start + len(data))):
            data += more
        if len(data) < member.size:
            raise DataError(f"{path}: has shrunk while it was read; leave the inputs alone and start again")
        size += len(data)
        texts[last] = data
    return Entry(key.number, {"key": shown, "images": tuple(images), **texts}, size)


def _open(path: str | Path) -> int:
    try:
        return regular_descriptor(path)
    except OSError as error:
        raise UsageError(f"--input {path}: cannot read ({error.strerror}); give a tar archive") from error


def _split(name: bytes) -> tuple[bytes, str]:
    """Key and suffix as WebDataset divides them: at the first dot of the file name."""
    folder, slash, file = name.rpartition(b"/")
    stem, dot, suffix = file.partition(b".")
    if not stem or not dot:
        return b"", ""
    return folder + slash + stem, suffix.decode("utf-8", "backslashreplace").lower()


def _last(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _numbered(suffixes: Iterable[str]) -> bool:
    """Whether the images of a key differ by a number alone, as in `img0.jpg` and `img10.jpg`."""
    images = [suffix.rpartition(".")[0] for suffix in suffixes if _last(suffix) in IMAGE_SUFFIXES]
    return len(set(images)) == len(images) > 1 and len({re.sub(r"\d+", "", stem) for stem in images}) == 1


def _natural(suffix: str) -> list[tuple[bool, int, str]]:
    stem = suffix.rpartition(".")[0]
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", stem)]


def _shown(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")[:200]


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checksum_holds(header: bytes) -> bool:
    stated = _octal(header[148:156])
    return stated is not None and stated == sum(header[:148]) + 8 * 32 + sum(header[156:])


def _damage(header: bytes) -> RecordError | None:
    if len(header) < _BLOCK:
        return _lost("the file ends inside a header; get it again", "tar_truncated")
    if not _checksum_holds(header):
        return _lost("a member's header is damaged")
    return _lost("a member declares a size that is no number") if _size(header) is None else None


def _lost(text: str, reason: str = "tar_damaged") -> RecordError:
    return RecordError(f"{text}; all that follows in the file is lost", reason)


def _octal(digits: bytes) -> int | None:
    digits = digits.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _size(header: bytes) -> int | None:
    raw = header[124:136]
    if raw[0] == 0x80:
        return int.from_bytes(raw[1:], "big")
    return None if raw[0] & 0x80 else _octal(raw)


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    # Only POSIX archives have a prefix; GNU's own format keeps other things there.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _pax(content: bytes) -> dict[bytes, bytes] | None:
    """Records of an extended header; None when it is damaged."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            return None
        records[match[2]] = content[match.end() : end - 1]
        position = end
    return records


def _pax_size(value: bytes | None, *, otherwise: int) -> int:
    # A size that is no number becomes one that no file holds.
    if value is None:
        return otherwise
    return int(value) if re.fullmatch(rb"\d{1,18}", value) else 1 << 62


def _after_zeros(handle: int, position: int) -> int:
    """The next block that is not zero, or the end of the file."""
    while block := os.pread(handle, _ZEROS, position):
        rest = block.lstrip(b"\0")
        if rest:
            return position + (len(block) - len(rest)) // _BLOCK * _BLOCK
        position += len(block)
    return position


def _after_sparse_map(handle: int, header: bytes, position: int) -> int:
    more = header[482]
    while more and len(block := os.pread(handle, _BLOCK, position)) == _BLOCK:
        more, position = block[504], position + _BLOCK
    return position
