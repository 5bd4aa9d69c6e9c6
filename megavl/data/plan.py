"""Which modality each step has, as a closed form of (seed, step): no state, no message between ranks.

Arithmetic is exact (fractions), so every rank and every machine gets the same plan.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from fractions import Fraction

from megavl.config.errors import UsageError
from megavl.data.manifest import Modality

_PHASES = 1 << 20
_FINEST = 1_000_000


def keyed_number(*key: object) -> int:
    """A 64-bit number that depends on the key alone, on every machine alike."""
    digest = hashlib.sha256("/".join(map(str, key)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little")


def as_fraction(value: float) -> Fraction:
    """A share as people write it: 0.3 is 3/10."""
    return Fraction(value).limit_denominator(_FINEST)


@dataclass(frozen=True, kw_only=True)
class ModalityPlan:
    """Grouped modalities (arXiv 2403.05525, section 3.2.2): every step is wholly text or wholly multimodal.

    With C(n) the sum of the wanted multimodal share over steps 0..n-1, step n is multimodal when floor(C(n+1) + phase)
    exceeds floor(C(n) + phase), so every prefix has the right count to within one. The share rises linearly from 0 over
    the warm-up.
    """

    seed: int
    fraction: float
    """Target share of multimodal steps."""
    warmup_steps: int = 0
    """Steps until the target is reached."""
    _target: Fraction = field(init=False, repr=False)
    _phase: Fraction = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1 or self.warmup_steps < 0:
            raise UsageError(
                f"data.multimodal_fraction {self.fraction} must be from 0 to 1 and "
                f"data.modality_warmup_steps {self.warmup_steps} not negative"
            )
        object.__setattr__(self, "_target", as_fraction(self.fraction))
        phase = Fraction(keyed_number("modality phase", self.seed) % _PHASES, _PHASES)
        object.__setattr__(self, "_phase", phase)

    def wanted_before(self, step: int) -> Fraction:
        """C(step): multimodal steps wanted among the first `step` ones."""
        warm = min(step, self.warmup_steps)
        rising = Fraction(warm * (warm - 1), 2 * self.warmup_steps) if warm else Fraction(0)
        return self._target * (rising + step - warm)

    def multimodal_before(self, step: int) -> int:
        """Multimodal steps among the first `step` ones."""
        return math.floor(self.wanted_before(step) + self._phase)

    def modality(self, step: int) -> Modality:
        """Modality of a step."""
        return "multimodal" if self.multimodal_before(step + 1) > self.multimodal_before(step) else "text"
