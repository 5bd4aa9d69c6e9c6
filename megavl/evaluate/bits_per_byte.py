"""Bits per byte: how many bits the model needs for each UTF-8 byte of texts, whatever its vocabulary.

Source: Gao et al., The Pile (arXiv:2101.00027), section 3.1; DeepSeek-VL, section 4, uses it for language modelling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megavl.evaluate.ledger import Ledger, score_missing
from megavl.evaluate.task import Passage
from megavl.generate.json_lines import naming
from megavl.generate.pretrained import Model, Processor
from megavl.generate.score import ROW_TOKENS
from megavl.generate.score_inputs import text_windows
from megavl.generate.score_rows import ScoreRequest
from megavl.parallel.groups import rank_from_env


@dataclass(frozen=True, kw_only=True)
class ScoredPassage:
    """A text and the bits that the model needs for it."""

    entry: Passage
    tokens: int
    bits: float

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.entry.text.encode())


def encode_passages(passages: Sequence[Passage], *, processor: Processor) -> list[list[ScoreRequest]]:
    """Windows of each text, as documents are trained: BOS and the images, then the text.

    Raises:
        DataError: a text with images is longer than the model's positions, or yields the image token; with file:line.
    """
    found = []
    for passage in passages:
        with naming(passage.location):
            found.append(
                text_windows(
                    passage.text,
                    tokenizer=processor.tokenizer,
                    config=processor.config,
                    images=passage.images,
                    location=passage.location,
                )
            )
    return found


def score_passages(
    model: Model,
    passages: Sequence[Passage],
    windows: Sequence[Sequence[ScoreRequest]],
    *,
    row_tokens: int = ROW_TOKENS,
    ledger: Ledger | None = None,
) -> list[ScoredPassage]:
    """Score all texts.

    Args:
        model: who reads, on one process.
        row_tokens: most tokens of a packed row.
        ledger: scores that are there already, and where new ones are kept.

    Raises:
        ImageError: an image cannot be read.
        NumericsError: a perplexity is not finite.
    """
    every = [window for of_passage in windows for window in of_passage]
    owners = [passage for passage, of_passage in zip(passages, windows) for _ in of_passage]
    with tqdm(total=len(every), unit="window", desc="read", disable=rank_from_env() > 0 or not every or None) as bar:
        scores = iter(
            score_missing(
                model,
                every,
                keys=[f"text/{number}" for number in range(len(every))],
                ledger=ledger or Ledger(),
                describe=lambda number, _: owners[number].described(),
                row_tokens=row_tokens,
                progress=bar.update,
            )
        )
    found = []
    for passage, of_passage in zip(passages, windows, strict=True):
        own = [next(scores)[0] for _ in of_passage]
        bits = -math.fsum(score.log_prob for score in own) / math.log(2)
        found.append(ScoredPassage(entry=passage, tokens=sum(score.tokens for score in own), bits=bits))
    return found
