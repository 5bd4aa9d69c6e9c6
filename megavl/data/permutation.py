"""Permutations of a range that are evaluated at any index without being stored."""

from __future__ import annotations

from functools import lru_cache

from megavl.data.plan import keyed_number

_ROUNDS = 8
_MASK = (1 << 64) - 1


class Permutation:
    """A permutation of range(size): a Feistel network over an even number of bits, walked until it lands inside."""

    def __init__(self, size: int, *, key: int) -> None:
        """Args: number of elements, and the key that selects the permutation."""
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [keyed_number("round", key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Element at an index."""
        assert 0 <= index < self._size
        mask = (1 << self._half) - 1
        value = index
        while True:
            left, right = value >> self._half, value & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right + key) & mask)
            value = left << self._half | right
            if value < self._size:
                return value


@lru_cache(maxsize=256)
def permutation(size: int, key: int) -> Permutation:
    """The permutation of range(size) that a key selects."""
    return Permutation(size, key=key)


def _mix(value: int) -> int:
    """Finaliser of SplitMix64."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
