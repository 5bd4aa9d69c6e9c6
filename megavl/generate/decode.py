"""One sequence through the model: the prompt in one pass, then token by token with cached keys and values.

Legend: T tokens, I images, C canvas side in pixels, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from megavl.generate.sampling import Sampling, choose
from megavl.model.vl_model import DeepseekVL

GREEDY = Sampling()


class CachedSequence:
    """A sequence that grows; every call of `extend` adds its tokens."""

    def __init__(self, model: DeepseekVL, *, max_length: int) -> None:
        """Reserve a cache of `max_length` tokens; `model` is a one-rank model in eval mode."""
        assert not model.training, "the cache is used in eval mode only"
        self.model = model
        self._cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=max_length)

    @torch.no_grad()
    def extend(self, ids: Sequence[int], *, images: torch.Tensor | None = None) -> torch.Tensor:
        """Add tokens.

        Args:
            ids: the whole prompt in the first call, one token in every later one.
            images: uint8 (I, 3, C, C) for the image positions among `ids`.

        Returns:
            (V,) logits of the token that follows.
        """
        weight = next(self.model.parameters())
        tokens = torch.tensor([list(ids)], dtype=torch.int64, device=weight.device)
        if images is None:
            images = torch.zeros((0, 3, 1, 1), dtype=torch.uint8)
        logits = self.model(tokens=tokens, images=images.to(weight.device), packed=None, cache=self._cache)
        self._cache.increment_sequence_len_offset(len(ids))
        self._cache.enable_decode_mode()
        last: torch.Tensor = logits[0, -1]
        return last


def generate(
    model: DeepseekVL,
    ids: Sequence[int],
    *,
    images: torch.Tensor,
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """Tokens that follow a prompt, one by one; the end-of-sentence token is the last one when the model gives it.

    Args:
        model: a one-rank model in eval mode.
        ids: prompt.
        images: uint8 (I, 3, C, C) in the order of their places.
        eos_id: id that ends the answer.
        max_new_tokens: most tokens to give.
        sampling: how tokens are chosen.

    Raises:
        NumericsError: the model's logits are not finite.
    """
    sequence = CachedSequence(model, max_length=len(ids) + max_new_tokens)
    generator = sampling.generator()
    logits = sequence.extend(ids, images=images)
    for count in range(1, max_new_tokens + 1):
        token = choose(logits, sampling=sampling, generator=generator)
        yield token
        if token == eos_id or count == max_new_tokens:
            return
        logits = sequence.extend([token])
