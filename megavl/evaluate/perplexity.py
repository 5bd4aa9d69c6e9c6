"""Perplexity of the options of multiple-choice questions, many of them in one packed row.

Legend: T tokens of a row, N options, V vocabulary rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megavl.config.errors import NumericsError
from megavl.config.expected_warnings import expected_warnings_ignored
from megavl.config.presets import ImageGeometry
from megavl.data.batch import make_batch
from megavl.generate.prompt import read_canvases

with expected_warnings_ignored():
    from megavl.model.vl_model import DeepseekVL

ROW_TOKENS = 2048
"""Tokens of a row; a longer segment gets a row of its own. At 102400 vocabulary rows a row has 0.8 GB of logits."""


@dataclass(frozen=True, kw_only=True)
class EncodedOption:
    """A prompt and one of its options."""

    ids: tuple[int, ...]
    start: int
    """Position of the option's first token."""


@dataclass(frozen=True, kw_only=True)
class EncodedQuestion:
    """A question as the model reads it."""

    location: str
    """`file:line`, for messages."""
    options: tuple[EncodedOption, ...]
    images: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens that run once, and the options that are scored from them."""

    question: int
    ids: tuple[int, ...]
    options: tuple[int, ...]


def option_perplexities(
    model: DeepseekVL,
    questions: Sequence[EncodedQuestion],
    *,
    geometry: ImageGeometry,
    row_tokens: int = ROW_TOKENS,
    progress: Callable[[int], object] = lambda _: None,
) -> list[list[float]]:
    """exp(mean negative log-likelihood over the option's tokens), for each option of each question.

    Source: DeepSeek-VL, section 3.2.2.

    Args:
        model: a one-rank model in eval mode.
        row_tokens: most tokens of a packed row.
        progress: told after each row the number of segments in it.

    Raises:
        NumericsError: a perplexity is not finite.
        ImageError: an image cannot be read.
    """
    found = [[math.nan] * len(question.options) for question in questions]
    pieces = [segment for number, question in enumerate(questions) for segment in option_segments(number, question)]
    for row in _rows(pieces, limit=row_tokens):
        _read_row(model, row, questions, geometry=geometry, found=found)
        progress(len(row))
    for question, values in zip(questions, found):
        if not all(map(math.isfinite, values)):
            raise NumericsError(
                f"{question.location}: perplexities {values} are not finite; the weights are damaged, or the model "
                "needs --dtype float32"
            )
    return found


def option_segments(number: int, question: EncodedQuestion) -> list[Segment]:
    """The sequences to run, so that every option can be scored.

    The last token of an option is only predicted, never fed. An option needs no sequence of its own where another one
    begins with the rest of it: all options of one token are scored from the prompt itself.
    """
    kept: dict[tuple[int, ...], list[int]] = {}
    longest_first = sorted(range(len(question.options)), key=lambda index: -len(question.options[index].ids))
    for index in longest_first:
        context = question.options[index].ids[:-1]
        host = next((ids for ids in kept if ids[: len(context)] == context), context)
        kept.setdefault(host, []).append(index)
    return [Segment(question=number, ids=ids, options=tuple(options)) for ids, options in kept.items()]


def _rows(pieces: Sequence[Segment], *, limit: int) -> Iterator[list[Segment]]:
    row: list[Segment] = []
    for piece in pieces:
        if row and sum(len(other.ids) for other in row) + len(piece.ids) > limit:
            yield row
            row = []
        row.append(piece)
    if row:
        yield row


@torch.no_grad()
def _read_row(
    model: DeepseekVL,
    row: Sequence[Segment],
    questions: Sequence[EncodedQuestion],
    *,
    geometry: ImageGeometry,
    found: list[list[float]],
) -> None:
    device = next(model.parameters()).device
    borders = [0]
    for piece in row:
        borders.append(borders[-1] + len(piece.ids))
    canvases = read_canvases([image for piece in row for image in questions[piece.question].images], geometry=geometry)
    batch = make_batch(
        torch.tensor([token for piece in row for token in piece.ids]),
        borders=borders,
        images=canvases,
        image_token_id=model.image_token_id,
    )
    logits = model.logits(batch.to(device))  # (T, V)
    targets: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, int, int]] = []
    for piece, begin in zip(row, borders):
        for index in piece.options:
            option = questions[piece.question].options[index]
            spans.append((piece.question, index, len(targets), len(targets) + len(option.ids) - option.start))
            targets += option.ids[option.start :]
            # A token is predicted at the position before it.
            positions += range(begin + option.start - 1, begin + len(option.ids) - 1)
    chosen = logits[torch.tensor(positions, device=device)].float()  # (tokens of all options, V)
    labels = torch.tensor(targets, device=device)
    losses = torch.nn.functional.cross_entropy(chosen, labels, reduction="none").double().cpu()
    for question, index, first, last in spans:
        found[question][index] = float(losses[first:last].mean().exp())
