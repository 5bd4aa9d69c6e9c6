"""Questions that the model answers in writing, greedily, and how its answers are compared.

Source: DeepSeek-VL, section 4: greedy generation in free text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.config.model import ModelConfig
from megavl.data.template import Template
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.task import OpenQuestion
from megavl.generate.decode import Request
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import prompt_pieces
from megavl.model.vl_model import DeepseekVL

_MARKS = " .,;:!?()[]{}<>*_`'\"“”‘’«»、。「」『』《》"


@dataclass(frozen=True, kw_only=True)
class Written:
    """A question and what the model wrote."""

    entry: OpenQuestion
    text: str

    @property
    def exact(self) -> bool:
        """Whether it is one of the right answers, but for case, width of characters, white space and outer marks."""
        return plain(self.text) in map(plain, self.entry.answers)

    @property
    def contains(self) -> bool:
        """Whether one of the right answers stands in it, not inside of a longer Latin word or number."""
        before, behind = r"(?<![a-z0-9])(?<!\d[.,])", r"(?![a-z0-9])(?![.,]\d)"
        wanted = (re.escape(plain(answer)) for answer in self.entry.answers)
        return any(re.search(before + answer + behind, plain(self.text)) for answer in wanted)


def encode_open_questions(
    questions: Sequence[OpenQuestion],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    max_new_tokens: int,
    template: Template = "deepseek",
    system: str = SYSTEM_PROMPT,
) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
        DataError: a prompt and its answer do not fit the model's positions; with file:line.
    """
    processor, found = Processor(config, tokenizer), []
    for question in questions:
        try:
            pieces = prompt_pieces(question.prompt, images=len(question.images), template=template, system=system)
            found.append(processor.encode(pieces, room=max_new_tokens))
        except DataError as error:
            raise DataError(f"{question.place}: {error}") from error
    return found


def write_answers(
    model: DeepseekVL,
    questions: Sequence[OpenQuestion],
    ids: Sequence[Sequence[int]],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    max_new_tokens: int,
    batch_size: int = 8,
) -> list[Written]:
    """Ask all questions.

    Args:
        model: a one-rank model in eval mode.
        questions: from `read_tasks`.
        ids: from `encode_open_questions`.
        tokenizer: the model's.
        config: sizes of the model.
        max_new_tokens: most tokens of an answer.
        batch_size: most answers under way at a time.

    Raises:
        DataError: an image cannot be read; with file:line.
        NumericsError: the model's logits are not finite.
    """
    if not questions:
        return []
    processor = Processor(config, tokenizer)

    def requests() -> Iterator[Request]:
        for question, tokens in zip(questions, ids, strict=True):
            try:
                images = processor.read_images(question.images)
            except DataError as error:
                raise DataError(f"{question.place}: {error}") from error
            yield Request(ids=tokens, images=images, max_new_tokens=max_new_tokens)

    length = max(map(len, ids)) + max_new_tokens
    answers = Model(model, processor).answers(requests(), batch_size=min(batch_size, len(questions)), length=length)
    bar = tqdm(answers, total=len(questions), unit="answer", desc="write", disable=None)
    return [Written(entry=question, text=answer.text) for question, answer in zip(questions, bar, strict=True)]


def plain(text: str) -> str:
    """For comparison: compatible characters made equal, no case, single spaces, no marks or spaces around."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(_MARKS) or text
