"""Free-form answers: the model answers greedily, and its text is compared with the accepted answers.

Source: DeepSeek-VL, section 4: greedy generation in free text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from megavl.data.template import Template
from megavl.evaluate.ledger import Ledger
from megavl.evaluate.task import Asked, OpenQuestion
from megavl.generate.decode import Request
from megavl.generate.json_lines import naming
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import prompt_pieces
from megavl.generate.shared_images import SharedImages
from megavl.parallel.groups import rank_from_env

_MARKS = " .,;:!?()[]{}<>*_`'\"“”‘’«»、。「」『』《》"


@dataclass(frozen=True, kw_only=True)
class FreeFormAnswer:
    """A question and the text that the model answered."""

    entry: OpenQuestion
    text: str

    @property
    def exact(self) -> bool:
        """Whether it equals an accepted answer; case, width of characters, white space and outer marks do not count."""
        return plain(self.text) in map(plain, self.entry.answers)

    @property
    def contains(self) -> bool:
        """Whether it contains an accepted answer that is not part of a longer Latin word or number."""
        before, after = r"(?<![a-z0-9])(?<!\d[.,])", r"(?![a-z0-9])(?![.,]\d)"
        wanted = (re.escape(plain(answer)) for answer in self.entry.answers)
        return any(re.search(before + answer + after, plain(self.text)) for answer in wanted)


def encode_open_questions(
    questions: Sequence[Asked],
    *,
    processor: Processor,
    max_new_tokens: int,
    template: Template = "deepseek",
    system: str | None = None,
) -> list[list[int]]:
    """Token ids of the prompts.

    Raises:
        DataError: a prompt and its answer do not fit the model's positions; with file:line.
    """
    text = processor.system(system)
    found = []
    for question in questions:
        with naming(question.location):
            pieces = prompt_pieces(question.prompt, images=len(question.images), template=template, system=text)
            found.append(processor.encode(pieces, room=max_new_tokens))
    return found


def answer_texts(
    model: Model,
    questions: Sequence[Asked],
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    name: str = "answer",
    ledger: Ledger | None = None,
) -> list[str]:
    """The model's answers to all questions, of which it is asked those that are not in the ledger.

    Args:
        model: who answers.
        ids: of the prompts, from `encode_open_questions`.
        batch_size: most answers in progress at a time.
        name: of the questions, in the ledger's keys and on the progress bar.
        ledger: answers that are there already, and where new ones are kept.

    Raises:
        DataError: an image cannot be read; with file:line.
        NumericsError: the model's logits are not finite.
        StorageError: an answer cannot be written.
    """
    ledger = ledger or Ledger()
    keys = [f"{name}/{number}" for number in range(len(questions))]
    missing = [number for number, key in enumerate(keys) if ledger.get(key) is None]

    shared = SharedImages(model.stage, model.processor.config)

    def requests() -> Iterator[Request]:
        for number in missing:
            with naming(questions[number].location):
                images = shared.read(questions[number].images)
            yield Request(ids=ids[number], images=shared.embeddings(images), max_new_tokens=max_new_tokens)

    if missing:
        length = max(len(ids[number]) for number in missing) + max_new_tokens
        answers = model.answers(requests(), batch_size=min(batch_size, len(missing)), length=length)
        bar = tqdm(answers, total=len(missing), unit="answer", desc=name, disable=rank_from_env() > 0 or None)
        for number, answer in zip(missing, bar, strict=True):
            ledger.put(keys[number], {**questions[number].described(), "answer": answer.text})
    return [str((ledger.get(key) or {})["answer"]) for key in keys]


def answer_questions(
    model: Model,
    questions: Sequence[OpenQuestion],
    ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    ledger: Ledger | None = None,
) -> list[FreeFormAnswer]:
    """Answer all questions of task files; see `answer_texts`."""
    texts = answer_texts(model, questions, ids, max_new_tokens=max_new_tokens, batch_size=batch_size, ledger=ledger)
    return [FreeFormAnswer(entry=question, text=text) for question, text in zip(questions, texts, strict=True)]


def plain(text: str) -> str:
    """The text for comparison: NFKC, no case, single spaces, no punctuation marks around it."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(_MARKS) or text
