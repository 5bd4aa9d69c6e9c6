"""The sha256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megavl.files import activity

_BLOCK = 4 << 20


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's content; the file is read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            activity.note()
    return digest.hexdigest()
