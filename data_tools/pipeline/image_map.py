"""A map from image addresses to files: lines of address, tab, path. Each line takes 16 bytes of memory."""

from __future__ import annotations

import hashlib
from array import array
from functools import lru_cache

import numpy as np

from megavl.config.errors import DataError, UsageError
from megavl.foreign.reading import open_regular


class ImageMap:
    """Finds the file of an address."""

    def __init__(self, path: str) -> None:
        """Read the whole map once.

        Args:
            path: UTF-8 text; of two lines with the same address the first counts.

        Raises:
            UsageError: the file cannot be read.
            DataError: a line is not an address, a tab and a path.
        """
        self._path = path
        hashes, offsets = array("Q"), array("Q")
        digest, offset = hashlib.sha256(), 0
        try:
            with open_regular(path, buffered=True) as stream:
                for number, line in enumerate(stream, start=1):
                    digest.update(line)
                    address, tab, file = line.partition(b"\t")
                    if not (address and tab and file.strip()) or not _is_text(line):
                        raise DataError(
                            f"--image-map {path}:{number}: must be an address, a tab and a path in UTF-8; "
                            "correct the line"
                        )
                    hashes.append(_hash(address))
                    offsets.append(offset)
                    offset += len(line)
        except OSError as error:
            raise UsageError(f"--image-map {path}: cannot read ({error.strerror}); give a readable file") from error
        keys = np.array(hashes, np.uint64)
        order = np.argsort(keys, kind="stable")
        self._keys, self._offsets = keys[order], np.array(offsets, np.uint64)[order]
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, address: str) -> str | None:
        """The path of an address, or None."""
        wanted = address.encode("utf-8", "surrogatepass")
        key = np.uint64(_hash(wanted))
        row = int(np.searchsorted(self._keys, key))
        with open(self._path, "rb") as stream:
            while row < len(self._keys) and self._keys[row] == key:
                stream.seek(int(self._offsets[row]))
                found, _, file = stream.readline().partition(b"\t")
                if found == wanted:
                    return file.decode("utf-8").rstrip("\r\n")
                row += 1
        return None


@lru_cache(maxsize=1)
def open_image_map(path: str) -> ImageMap:
    """The map at a path, read once per process."""
    return ImageMap(path)


def _hash(address: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little")


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
