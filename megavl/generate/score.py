"""Log-probabilities of options after a prompt, through all pipeline stages, on any layout of ranks.

Rows run forward only, through megatron-core's own schedule. Each data-parallel replica takes its share of them.

Legend: T tokens of a row, R labels of a row, I images, C canvas side in pixels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megavl.config.expected_warnings import expected_warnings_ignored
from megavl.config.model import ModelConfig
from megavl.data.batch import Batch, make_batch
from megavl.generate.prompt import read_canvases
from megavl.generate.score_rows import ScoreRequest, ScoreRow, score_rows
from megavl.generate.shared_images import SharedImage, SharedImages
from megavl.parallel import cpu_runtime

with expected_warnings_ignored():
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megavl.checkpoint import collective_errors
    from megavl.model.vl_model import DeepseekVL

ROW_TOKENS = 2048
"""Tokens of a row; a longer request gets a row of its own."""
_MICRO_BATCHES = 4
"""Rows of a replica in one pass of the schedule, for each pipeline stage: their images are in memory together."""

T = TypeVar("T")
Spread = Callable[[Sequence[Batch]], Sequence[Batch]]
"""From batches with all images to what the first stage takes."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model thinks of one option after its prompt."""

    log_prob: float
    """Sum of the natural log-probabilities of the option's tokens."""
    tokens: int
    """Tokens of the option."""
    greedy: bool
    """Whether greedy decoding would say exactly this option."""

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-probability of a token)."""
        return math.exp(-self.log_prob / self.tokens) if math.isfinite(self.log_prob) else math.nan


def score(
    stages: Sequence[DeepseekVL],
    requests: Sequence[ScoreRequest],
    *,
    config: ModelConfig,
    row_tokens: int = ROW_TOKENS,
    spread: Spread | None = None,
    progress: Callable[[int], object] = lambda _: None,
    on_scores: Callable[[int, list[Score]], object] = lambda number, scores: None,
) -> list[list[Score]]:
    """Score every option of every request. Every rank makes the same call and gets the same scores.

    Args:
        stages: this rank's pipeline stages: one, or those of `parallel.virtual_pipeline`. They end as they were.
        config: of the model. Requests whose images have the same content share their embeddings, as long as those are
            remembered; with `spread` they do not.
        row_tokens: most tokens of a row.
        spread: hands the images of some batches to the ranks that encode them; default: the first stage does.
        progress: told after each pass the number of options in it.
        on_scores: told each request's number and scores after the pass that completes it, in order.

    Returns:
        For each request a score for each option. A log-probability that is not finite is returned as it is.

    Raises:
        ImageError: an image cannot be read; on every rank.
    """
    reader = next((stage for stage in stages if stage.pre_process), None)
    shared = None if reader is None or spread is not None else SharedImages(reader, config)
    # Transformer Engine's attention knows no segment that continues another.
    rows = score_rows(requests, limit=row_tokens, shared=not stages[0].config.apply_rope_fusion)
    found = [[Score(log_prob=math.nan, tokens=0, greedy=False)] * len(request.options) for request in requests]
    size = rows_of_a_pass()
    told = 0
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        values = _score(stages, part, config=config, shared=shared, spread=spread)
        for one, (losses, likeliest) in zip((one for row in part for one in row.predictions), values, strict=True):
            found[one.request][one.option] = Score(
                log_prob=-math.fsum(losses), tokens=len(one.labels), greedy=all(likeliest)
            )
        progress(sum(len(row.predictions) for row in part))
        # A request may go on in the following row.
        rest = rows[first + size :]
        complete = rest[0].predictions[0].request if rest else len(requests)
        for number in range(told, complete):
            on_scores(number, found[number])
        told = complete
    return found


def rows_of_a_pass() -> int:
    """Rows of all replicas that one call of `label_scores` should get: their images are in memory together."""
    return mpu.get_data_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size() * _MICRO_BATCHES


def own_share(rows: Sequence[T]) -> Sequence[T]:
    """The rows of a pass that this data-parallel replica scores."""
    return rows[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]


def label_scores(
    stages: Sequence[DeepseekVL],
    batches: Sequence[Batch],
    *,
    counts: Sequence[int],
    length: int,
    spread: Spread | None = None,
) -> tuple[torch.Tensor, ...]:
    """Run rows of all replicas forward only. Collective over all ranks.

    Args:
        stages: this rank's pipeline stages; they end as they were.
        batches: of this replica's share of the rows, in their order; on the host. With several pipeline stages each
            has `length` tokens.
        counts: labels of every row, of other replicas too.
        length: tokens of a batch.
        spread: see `score`.

    Returns:
        For every row float64 (2, R) on the host: the loss of each label in nats, and 1 where it is the likeliest token.
    """
    # The interleaved schedule wants a multiple of the pipeline's ranks, and every replica joins the collectives.
    missing = -len(batches) % mpu.get_pipeline_model_parallel_world_size() or int(not batches)
    batches = [*batches, *[make_batch(torch.zeros(length, dtype=torch.int64))] * missing]
    with _evaluating(stages):
        outputs = _forward_only(stages, batches if spread is None else spread(batches), length=length)
    values = torch.zeros(2, sum(counts), dtype=torch.float64, device=cpu_runtime.device())
    if outputs and mpu.get_tensor_model_parallel_rank() == 0:
        for share, output in zip(own_share(values.split(list(counts), dim=1)), outputs):
            share.copy_(output)
    if dist.get_world_size() > 1:
        # One rank has each value, so the sum is exact.
        dist.all_reduce(values)
    return values.cpu().split(list(counts), dim=1)


@contextmanager
def _evaluating(stages: Sequence[DeepseekVL]) -> Iterator[None]:
    were = [stage.training for stage in stages]
    for stage in stages:
        stage.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for stage, training in zip(stages, were):
            stage.train(training)


def _score(
    stages: Sequence[DeepseekVL],
    rows: Sequence[ScoreRow],
    *,
    config: ModelConfig,
    shared: SharedImages | None,
    spread: Spread | None,
) -> Iterator[tuple[list[float], list[float]]]:
    """Losses and whether each label is the likeliest, for each option of the rows, in their order."""
    own = own_share(rows)
    images = _images(stages, own, config=config, shared=shared, reads=spread is not None)
    length = _common_length(rows)
    batches = [
        _batch(row, length=length or row.tokens, images=of_row, image_token_id=config.image_token_id)
        for row, of_row in zip(own, images, strict=True)
    ]
    counts = [sum(len(one.labels) for one in row.predictions) for row in rows]
    found = label_scores(stages, batches, counts=counts, length=length or 1, spread=spread)
    for row, values in zip(rows, found, strict=True):
        losses, likeliest = (part.split([len(one.labels) for one in row.predictions]) for part in values)
        yield from ((loss.tolist(), marks.tolist()) for loss, marks in zip(losses, likeliest))


def _images(
    stages: Sequence[DeepseekVL],
    rows: Sequence[ScoreRow],
    *,
    config: ModelConfig,
    shared: SharedImages | None,
    reads: bool,
) -> list[torch.Tensor]:
    """Of each row on the first stage embeddings (I, P, H), or with `reads` canvases (I, 3, C, C) on every stage."""
    canvases: list[torch.Tensor] = []
    pictures: list[list[SharedImage]] = []

    def read() -> None:
        if shared is not None:
            pictures.extend(shared.read(row.images) for row in rows)
        else:
            some = (row.images if reads else () for row in rows)
            canvases.extend(read_canvases(images, geometry=config.image_geometry) for images in some)

    collective_errors.on_every_rank(read)
    if shared is None:
        return canvases
    with _evaluating(stages):
        return [shared.embeddings(of_row) for of_row in pictures]


def _common_length(rows: Sequence[ScoreRow]) -> int | None:
    """Common length of the rows; None where each may have its own."""
    ranks = mpu.get_tensor_model_parallel_world_size()
    if mpu.get_pipeline_model_parallel_world_size() == 1 and ranks == 1:
        return None
    longest = max(row.tokens for row in rows)
    return -(-longest // ranks) * ranks


def _batch(row: ScoreRow, *, length: int, images: torch.Tensor, image_token_id: int) -> Batch:
    tokens = [token for segment in row.segments for token in segment.ids]
    borders = [0]
    for segment in row.segments:
        borders.append(borders[-1] + len(segment.ids))
    parents = [segment.parent for segment in row.segments]
    if len(tokens) < length:
        borders.append(length)
        parents.append(-1)
        tokens += [0] * (length - len(tokens))
    if all(parent < 0 for parent in parents):
        parents = []
    batch = make_batch(
        torch.tensor(tokens), borders=borders, parents=parents, images=images, image_token_id=image_token_id
    )
    positions = [at for one in row.predictions for at in one.positions]
    labels = [label for one in row.predictions for label in one.labels]
    return dataclasses.replace(
        batch,
        loss_rows=torch.tensor(positions, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
    )


def _forward_only(stages: Sequence[DeepseekVL], batches: Sequence[Batch], *, length: int) -> list[torch.Tensor]:
    """(2, R) of each batch on the last stage; nothing elsewhere."""
    device = cpu_runtime.device()
    iterators = [(batch.to(device) for batch in batches) for _ in stages]
    outputs: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(stages) if len(stages) > 1 else stages[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return outputs


def _step(data: Iterator[Batch], stage: DeepseekVL) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    # A decoder of short rows would spend a third of its time on the redirection.
    with cpu_runtime.without_redirection():
        return stage.score(batch), lambda output, non_loss_data: output
