"""Which pack each slot of each step gets: a pure function of (data, seed, step, slot), whatever the layout.

Each source has an endless order of packs for each modality: one keyed permutation after another, one for each epoch.
A permutation is evaluated at any index without being stored. `mixture.py` says which source a slot draws from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megavl.data.manifest import Modality
from megavl.data.mixture import Counts, Mixture
from megavl.data.permutation import permutation
from megavl.data.plan import ModalityPlan, keyed_number

ORDER_VERSION = 2
"""Raised when the same seed gives another order; part of every dataset fingerprint that a checkpoint stores."""


@dataclass(frozen=True, kw_only=True)
class PackRef:
    """One packed sequence of one source."""

    source: int
    modality: Modality
    index: int
    """Among the source's packs of that modality."""


class Sampler:
    """Packs of every step."""

    def __init__(self, counts: Sequence[Counts], *, mixture: Mixture) -> None:
        """Nothing is computed yet.

        Args:
            counts: packs per modality, for each source.
            mixture: source of every sequence; its seed also keys the order inside a source.
        """
        self.mixture = mixture
        self._counts = counts

    @property
    def plan(self) -> ModalityPlan:
        """Modality of every step."""
        return self.mixture.plan

    def sample(self, *, step: int, slot: int) -> PackRef:
        """The pack in a slot of a step."""
        source, modality, draw = self.mixture.draw(step=step, slot=slot)
        count = self._counts[source][modality]
        epoch, number = divmod(draw, count)
        order = permutation(count, keyed_number("order", self.plan.seed, source, modality, epoch))
        return PackRef(source=source, modality=modality, index=order(number))

    def global_batch(self, step: int) -> list[PackRef]:
        """The packs of a step, in order."""
        return [self.sample(step=step, slot=slot) for slot in range(self.mixture.global_batch_size)]
