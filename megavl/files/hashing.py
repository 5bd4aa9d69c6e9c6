"""The sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megavl.files import activity
from megavl.foreign.reading import open_regular

_BLOCK = 4 << 20


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a regular file's content, which is read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            activity.note()
    return digest.hexdigest()
