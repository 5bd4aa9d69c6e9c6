"""What fits into one sequence, and how longer samples are divided or truncated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megavl.data.template import Encoded


@dataclass(frozen=True, kw_only=True)
class SequenceLimits:
    """Limits of one sequence."""

    tokens: int
    images: int
    image_id: int | None
    image_tokens: int
    """Positions of one image."""
    eos_id: int | None
    """Last token of an answer."""

    def allow(self, encoded: Encoded) -> bool:
        """Whether a sample fits."""
        return len(encoded.ids) <= self.tokens and encoded.images <= self.images

    def divide(self, encoded: Encoded) -> Iterator[Encoded]:
        """Successive parts of a sample that fit; an image stays whole."""
        if self.allow(encoded):
            yield encoded
            return
        ids, start = encoded.ids, 0
        firsts = np.flatnonzero(ids == self.image_id)[:: self.image_tokens] if encoded.images else np.zeros(0, np.int64)
        while start < len(ids):
            end = min(start + self.tokens, len(ids))
            left = firsts[firsts >= start]
            if len(left) > self.images:
                end = min(end, int(left[self.images]))
            torn = left[(left < end) & (left + self.image_tokens > end)]
            if len(torn):
                end = int(torn[0])
            spans = [(max(a, start) - start, min(b, end) - start) for a, b in encoded.spans if a < end and b > start]
            yield Encoded(ids=ids[start:end], spans=tuple(spans), images=int((left < end).sum()))
            start = end

    def truncate(self, encoded: Encoded) -> Encoded | None:
        """A conversation up to its last answer that fits; None when even the first answer does not.

        Text is tokenized between special tokens, so the result equals what the shorter conversation alone would give.
        """
        for count, (_, end) in reversed(list(enumerate(encoded.spans, start=1))):
            images = int((encoded.ids[:end] == self.image_id).sum()) // self.image_tokens
            shorter = Encoded(ids=encoded.ids[:end], spans=encoded.spans[:count], images=images)
            # A span may also end at an image inside an answer.
            if self.allow(shorter) and shorter.ids[-1] == self.eos_id:
                return shorter
        return None
