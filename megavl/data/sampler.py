"""Which packs each step reads: a pure function of (seed, step), independent of layout, ranks and workers.

Each source has, per modality, an endless order: one keyed permutation per epoch, evaluated at any index without being
stored, the tail of an epoch running on into the next one. Several sources are interleaved by error diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from megavl.config.errors import DataError
from megavl.data.manifest import Modality
from megavl.data.plan import ModalityPlan, as_fraction, keyed_number

_ROUNDS = 8
_PHASES = 1 << 20
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class PackRef:
    """One packed sequence of one source."""

    source: int
    modality: Modality
    index: int
    """Among the source's packs of that modality."""


class Permutation:
    """A permutation of range(size): a Feistel network over an even number of bits, walked until it lands inside."""

    def __init__(self, size: int, *, key: int) -> None:
        """Args: number of elements, and the key that selects the permutation."""
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [keyed_number("round", key, number) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Element at a place."""
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


class Sampler:
    """Packs of every step."""

    def __init__(
        self,
        counts: Sequence[Mapping[Modality, int]],
        *,
        weights: Sequence[float],
        plan: ModalityPlan,
        global_batch_size: int,
    ) -> None:
        """Check that every modality the plan will ask for exists.

        Args:
            counts: packs per modality, for each source.
            weights: share of each source within a modality.
            plan: modality of each step; its seed also keys the order.
            global_batch_size: packs per step.

        Raises:
            DataError: the plan asks for a modality of which no source has a pack.
        """
        self.plan = plan
        self._counts = counts
        self._size = global_batch_size
        total = sum((as_fraction(weight) for weight in weights), Fraction(0))
        self._shares = [as_fraction(weight) / total for weight in weights]
        wanted: dict[Modality, bool] = {
            "multimodal": plan.fraction > 0,
            "text": plan.fraction < 1 or plan.warmup_steps > 0,
        }
        for modality in (modality for modality, needed in wanted.items() if needed):
            if not any(count[modality] for count in counts):
                raise DataError(
                    f"data.sources: no source holds {modality} sequences, which data.multimodal_fraction "
                    f"{plan.fraction} asks for; add such a source or set the fraction to {int(modality == 'text')}"
                )

    def global_batch(self, step: int) -> list[PackRef]:
        """The packs of a step, in order."""
        modality = self.plan.modality(step)
        first = self.plan.steps_before(step) * self._size
        return [self._at(modality, first + slot) for slot in range(self._size)]

    def _at(self, modality: Modality, position: int) -> PackRef:
        """The pack at a position of a modality's endless order."""
        sources = [number for number, count in enumerate(self._counts) if count[modality]]
        left = sum((self._shares[number] for number in sources), Fraction(0))
        # Split off one source at a time: each split is an error diffusion with a closed-form count.
        for number in sources[:-1]:
            share = self._shares[number] / left
            phase = Fraction(keyed_number("source phase", self.plan.seed, modality, number) % _PHASES, _PHASES)
            before = math.floor(share * position + phase)
            if math.floor(share * (position + 1) + phase) > before:
                return self._in_source(number, modality, before)
            position -= before
            left -= self._shares[number]
        return self._in_source(sources[-1], modality, position)

    def _in_source(self, source: int, modality: Modality, position: int) -> PackRef:
        count = self._counts[source][modality]
        epoch, place = divmod(position, count)
        order = _permutation(count, keyed_number("order", self.plan.seed, source, modality, epoch))
        return PackRef(source=source, modality=modality, index=order(place))


@lru_cache(maxsize=64)
def _permutation(size: int, key: int) -> Permutation:
    return Permutation(size, key=key)


def _mix(value: int) -> int:
    """Finaliser of SplitMix64."""
    value &= _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
