"""Checks an archive of `torch.save` before torch reads it.

torch inflates a compressed member to any size, and reads past the end of a member that is smaller than the pickle
says. So members are stored as they are, lie inside the file, and hold all the numbers that the pickle refers to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, NoReturn

import torch

from megavl.checkpoint.pickle_guard import MAX_BYTES, CheckedPickle, Names, check_pickle, names_of
from megavl.config.errors import CheckpointError

MAX_DIRECTORY = 8 << 20
"""Largest directory of members, bytes; 100,000 tensors take 8 MB."""
_LEGACY_PICKLES = 5
_BEGIN, _END, _END64, _LOCATOR64, _ENTRY = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02"
_END_SIZE, _END64_SIZE, _LOCATOR64_SIZE, _ENTRY_SIZE, _LOCAL_SIZE = 22, 56, 20, 46, 30
_FUNCTIONS = {
    "torch._utils": (
        "_rebuild_tensor_v2",
        "_rebuild_tensor",
        "_rebuild_parameter",
        "_rebuild_tensor_v3",
        "_rebuild_sparse_tensor",
    ),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "collections": ("OrderedDict",),
}
_TYPES = sorted({str(kind).removeprefix("torch.") for kind in vars(torch).values() if isinstance(kind, torch.dtype)})
_STORAGES = {
    **dict.fromkeys(("UntypedStorage", "ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}
"""Bytes of one number by the name of its storage class."""
TENSORS = Names(
    known=names_of(
        [
            *_FUNCTIONS.items(),
            ("torch", [*_TYPES, *_STORAGES, "Tensor"]),
            ("torch.nn.parameter", ["Parameter"]),
            ("torch.storage", ["UntypedStorage"]),
        ]
    ),
    called=frozenset(name for names in _FUNCTIONS.values() for name in names),
    made=frozenset(),
)
"""What tensors and plain containers need."""


@dataclass(frozen=True)
class _Member:
    start: int
    """Of its local header; from the start of the archive, bytes."""
    size: int


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """A byte range of an open file."""

    file: IO[bytes]
    start: int
    size: int
    source: str
    """Its name in messages."""

    def read(self, start: int, size: int) -> bytes:
        """Bytes from `start` in the range.

        Raises:
            CheckpointError: some of them lie outside.
        """
        if start >= 0 and start + size <= self.size:
            self.file.seek(self.start + start)
            raw = self.file.read(size)
            if len(raw) == size:
                return raw
        raise CheckpointError(f"{self.source}: not readable, it is no complete archive of torch.save")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A checked archive."""

    part: FilePart
    pickle: CheckedPickle
    members: dict[str, _Member]
    folder: str
    """Of all members, with a slash at the end."""

    def plain_tensor(self, *, sizes: tuple[int, ...], dtype: torch.dtype) -> int | None:
        """Where the numbers of a contiguous tensor begin, if the archive is one: bytes from its start.

        None: it holds something else, or a tensor in another form, which torch has to read.
        """
        if not self.pickle.holds_one_tensor() or (view := self.pickle.views[0]) is None:
            return None
        (storage,), strides, step = self.pickle.storages, view.strides, 1
        kind = torch.storage._dtype_to_storage_type_map().get(dtype)
        if view.offset or view.sizes != sizes or len(strides) != len(sizes) or storage.kind != kind:
            return None
        for size, stride in zip(reversed(sizes), reversed(strides)):
            if size != 1 and stride != step:
                return None
            step *= size
        if storage.numel != step:
            return None
        member = self.members[f"{self.folder}data/{storage.key}"]
        return _content_start(self.part, member)


def check_archive(part: FilePart) -> Archive:
    """Check an archive of tensors and plain values.

    Raises:
        CheckpointError: no archive, damaged, hostile, or too large to be read.
    """
    source = part.source
    if part.read(0, min(4, part.size)) != _BEGIN:
        _refuse_pickle(part)
    members = _members(part)
    pickles = {name: member for name, member in members.items() if name.count("/") == 1 and name.endswith("/data.pkl")}
    if len(pickles) != 1:
        raise CheckpointError(f"{source}: not readable, the archive holds {len(pickles)} pickles")
    ((name, member),) = pickles.items()
    folder, checked = name.removesuffix("data.pkl"), check_pickle(_content(part, member), names=TENSORS, source=source)
    for storage in checked.storages:
        stored = members.get(f"{folder}data/{storage.key}")
        size = storage.numel * _STORAGES[storage.kind]
        if stored is None or size > stored.size:
            held = 0 if stored is None else stored.size
            raise CheckpointError(f"{source}: tensor data {storage.key[:50]!r} has {held} bytes, {size} are needed")
    return Archive(part=part, pickle=checked, members=members, folder=folder)


def _refuse_pickle(part: FilePart) -> NoReturn:
    """Refuse what is no archive; a name that no tensor needs is told first, because it shows an attack."""
    # Before its archives, torch wrote several pickles one after the other.
    position, steps = 0, 0
    while steps < _LEGACY_PICKLES and part.read(position, min(1, part.size - position)) == b"\x80":
        raw = part.read(position, min(part.size - position, MAX_BYTES))
        position += check_pickle(raw, names=TENSORS, source=part.source).end
        steps += 1
    raise CheckpointError(f"{part.source}: not readable, it is no archive of torch.save (torch 1.6 or newer)")


def _members(part: FilePart) -> dict[str, _Member]:
    """Members by name, from the directory at the end of the file."""
    source, total = part.source, part.size
    start, size, count = _directory(part)
    raw = part.read(start, size)
    members: dict[str, _Member] = {}
    position = 0
    for _ in range(count):
        entry = raw[position : position + _ENTRY_SIZE]
        if len(entry) < _ENTRY_SIZE or not entry.startswith(_ENTRY):
            raise CheckpointError(f"{source}: not readable, its directory is damaged")
        method, packed, plain, name_size, extra_size, comment_size, offset = struct.unpack("<10xH8xIIHHH8xI", entry)
        begin = position + _ENTRY_SIZE
        name = raw[begin : begin + name_size].decode("utf-8", "replace")
        extra = raw[begin + name_size : begin + name_size + extra_size]
        plain, packed, offset = _wide(extra, [plain, packed, offset])
        if method or packed != plain:
            raise CheckpointError(f"{source}: refused, {name[:50]!r} in it is compressed; torch.save stores members")
        if name in members or offset + _LOCAL_SIZE + plain > total:
            raise CheckpointError(f"{source}: not readable, {name[:50]!r} is listed twice or lies outside the file")
        members[name] = _Member(offset, plain)
        position = begin + name_size + extra_size + comment_size
    return members


def _directory(part: FilePart) -> tuple[int, int, int]:
    """First byte, bytes and number of entries of the directory."""
    source = part.source
    end = part.size - _END_SIZE
    raw = part.read(end, _END_SIZE)
    if not raw.startswith(_END) or raw[-2:] != bytes(2):
        raise CheckpointError(f"{source}: not readable, it is no complete archive of torch.save")
    count, size, start = struct.unpack("<10xHII2x", raw)
    locator = part.read(end - _LOCATOR64_SIZE, _LOCATOR64_SIZE) if end >= _LOCATOR64_SIZE else b""
    if locator.startswith(_LOCATOR64):
        end = struct.unpack("<8xQ4x", locator)[0]
        raw = part.read(end, _END64_SIZE)
        if not raw.startswith(_END64):
            raise CheckpointError(f"{source}: not readable, its directory is damaged")
        count, size, start = struct.unpack("<32xQQQ", raw)
    if start + size != end or size > MAX_DIRECTORY:
        raise CheckpointError(
            f"{source}: refused, a directory of {size:,} bytes at {start:,}; it ends at {end:,}, and at most "
            f"{MAX_DIRECTORY:,} bytes are read"
        )
    return start, size, count


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Replace what does not fit in 32 bits by the numbers in the extra field of zip64."""
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{size // 8}Q", extra, position + 4))
            return [next(wide, value) if value == 0xFFFFFFFF else value for value in values]
        position += 4 + size
    return values


def _content(part: FilePart, member: _Member) -> bytes:
    if member.size > MAX_BYTES:
        raise CheckpointError(f"{part.source}: a pickle of {member.size:,} bytes, at most {MAX_BYTES:,} are read")
    return part.read(_content_start(part, member), member.size)


def _content_start(part: FilePart, member: _Member) -> int:
    header = part.read(member.start, _LOCAL_SIZE)
    name_size, extra_size = struct.unpack("<26xHH", header)
    start = int(member.start + _LOCAL_SIZE + name_size + extra_size)
    if not header.startswith(_BEGIN) or start + member.size > part.size:
        raise CheckpointError(f"{part.source}: not readable, a member of the archive is not where its list says")
    return start
