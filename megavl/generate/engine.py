"""All pipeline stages as one engine: tokens in, logits out, for any layout of ranks.

Every rank makes the same calls with the same tokens in the same order. A stage receives the hidden states of the
previous stage. The last stage chooses a token and broadcasts it to all.

Legend: N tokens of a step, R rows (sequences), I images, P tokens per image, C canvas side in pixels, H hidden, V
vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megavl.config.errors import NumericsError
from megavl.config.expected_warnings import expected_warnings_ignored
from megavl.generate.likelihood import empty_table, likelihood_table

with expected_warnings_ignored():
    from megatron.core import parallel_state as mpu
    from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_, send_to_next_pipeline_rank

    from megavl.model.cache import KeyValueCache, Step
    from megavl.model.vl_model import DeepseekVL
    from megavl.parallel import cpu_runtime

_NOT_FINITE = -1
"""Broadcast instead of a token when logits are not finite, so that all ranks end alike."""

_SCORED_TOGETHER = 256
"""Positions whose logits are in memory at a time."""


class Engine:
    """Cached sequences, one per row; `extend` starts a sequence in a row."""

    def __init__(self, model: DeepseekVL, *, rows: int = 1) -> None:
        """An empty cache over this rank's stage, which is in eval mode."""
        self.model = model
        self.cache: KeyValueCache = model.new_cache(rows=rows)
        self._device = next(model.parameters()).device
        self._dtype = model.config.params_dtype
        ranks = dist.get_process_group_ranks(mpu.get_model_parallel_group())
        self._alone = len(ranks) == 1
        self._chooser = ranks[-mpu.get_tensor_model_parallel_world_size()]

    def extend(self, row: int, ids: Sequence[int], *, images: torch.Tensor | None = None) -> torch.Tensor | None:
        """Add tokens to one sequence.

        Args:
            ids: one token or more.
            images: uint8 (I, 3, C, C) for the image positions among `ids`, or their embeddings (I, P, H); needed on the
                first stage only.

        Returns:
            (1, V) logits of the token that follows; None on other stages than the last.
        """
        return self._logits(self.cache.extend(row, len(ids)), ids, images=images)

    @torch.inference_mode()
    def extend_scored(
        self, row: int, ids: Sequence[int], *, images: torch.Tensor | None = None, top: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Add a prompt as `extend` does, and score its tokens after the first.

        Returns:
            Logits (1, V) of the token that follows, and the `likelihood_table` of the prompt (N - 1, 1 + 2 top); None
            and None on other stages than the last.
        """
        hidden = self._run(self.cache.extend(row, len(ids)), ids, images=images)
        if hidden is None:
            return None, None
        labels = torch.tensor(list(ids[1:]), dtype=torch.int64, device=self._device)
        tables = [
            likelihood_table(self.model.head(before), after, top=top)
            for before, after in zip(hidden[:-1].split(_SCORED_TOGETHER), labels.split(_SCORED_TOGETHER))
            if len(after)
        ]
        table = torch.cat(tables) if tables else empty_table(top)
        return self.model.head(hidden[-1:]), table

    def append(self, tokens: Sequence[int]) -> torch.Tensor | None:
        """Add one token to each of the first R sequences.

        Returns:
            (R, V) logits of the tokens that follow; None on other stages than the last.
        """
        return self._logits(self.cache.append(len(tokens)), tokens, images=None)

    def agree(self, choose: Callable[[], list[int]], *, count: int) -> list[int]:
        """`count` tokens that one rank of the last stage chooses, on every rank.

        Raises:
            NumericsError: on every rank, when the chooser met logits that are not finite.
        """
        if self._alone:
            return choose()
        message = torch.full((count,), _NOT_FINITE, dtype=torch.int64, device=self._device)
        error: NumericsError | None = None
        if dist.get_rank() == self._chooser:
            try:
                message.copy_(torch.tensor(choose()))
            except NumericsError as caught:
                error = caught
        dist.broadcast(message, src=self._chooser, group=mpu.get_model_parallel_group())
        tokens: list[int] = message.tolist()
        if _NOT_FINITE in tokens:
            raise error or NumericsError("the last stage met logits that are not finite")
        return tokens

    def share(self, table: torch.Tensor | None, *, shape: tuple[int, int]) -> torch.Tensor:
        """A float64 table of the rank that chooses, on every rank and on its host."""
        if self._alone:
            assert table is not None, "the chooser is on the last stage"
            return table
        message = torch.zeros(shape, dtype=torch.float64, device=self._device)
        if dist.get_rank() == self._chooser and table is not None:
            message.copy_(table)
        dist.broadcast(message, src=self._chooser, group=mpu.get_model_parallel_group())
        return message.cpu()

    @torch.inference_mode()
    def _logits(self, step: Step, ids: Sequence[int], *, images: torch.Tensor | None) -> torch.Tensor | None:
        hidden = self._run(step, ids, images=images)
        return None if hidden is None else self.model.head(step.last(hidden))

    def _run(self, step: Step, ids: Sequence[int], *, images: torch.Tensor | None) -> torch.Tensor | None:
        """Hidden states (N, 1, H) on the last stage."""
        model = self.model
        if not model.pre_process:
            shape = (step.tokens, 1, model.config.hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
            recv_from_prev_pipeline_rank_(hidden)
            model.set_input_tensor(hidden)
        tokens = torch.tensor(list(ids), dtype=torch.int64, device=self._device)
        image_rows = tokens[:0]
        if images is not None and model.pre_process:
            images = images.to(self._device)
            image_rows = tokens.new_tensor([row for row, token in enumerate(ids) if token == model.image_token_id])
        with cpu_runtime.without_redirection():
            out = model.forward_cached(step, tokens=tokens, images=images, image_rows=image_rows)
        if not model.post_process:
            send_to_next_pipeline_rank(out.contiguous())
        self.cache.advance(step)
        return out if model.post_process else None
