"""Multiple choice: the model's answer is the option of lowest perplexity after the prompt.

The paper normalises by token, which is perplexity. Sums and bytes compare the same log-probabilities otherwise.

Source: DeepSeek-VL, sections 3.2.2 and 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tqdm import tqdm

from megavl.config.evaluation import Normalization
from megavl.data.template import Template
from megavl.evaluate.image_shuffle import shuffle_images
from megavl.evaluate.ledger import Ledger, score_missing
from megavl.evaluate.normalize import cost
from megavl.evaluate.report import Answered, Report
from megavl.evaluate.task import Asked, Question
from megavl.generate.json_lines import naming
from megavl.generate.pretrained import Model, Processor
from megavl.generate.prompt import prompt_pieces
from megavl.generate.score import ROW_TOKENS, Score
from megavl.generate.score_inputs import encode_options
from megavl.generate.score_rows import ScoreRequest
from megavl.parallel.groups import rank_from_env


class Choices(Asked, Protocol):
    """The same with options to choose from."""

    @property
    def choices(self) -> Sequence[str]:
        """The options."""


def evaluate_choices(
    model: Model,
    questions: Sequence[Question],
    *,
    template: Template = "deepseek",
    system: str | None = None,
    blind: bool = False,
    seed: int = 0,
    row_tokens: int = ROW_TOKENS,
    normalize: Normalization = "token",
    ledger: Ledger | None = None,
) -> Report:
    """Score all questions.

    Args:
        model: who answers, on one process.
        template: format of the prompt, see `prompt_pieces`.
        system: system text of the chat format; empty for none, None for the model's.
        row_tokens: most tokens of a packed row.
        normalize: by what options are compared.
        ledger: scores that are there already, and where new ones are kept.

    Raises:
        DataError: a question does not fit the model, an image cannot be read, or images cannot be shuffled.
        NumericsError: a perplexity is not finite.
    """
    shuffled = shuffle_images(questions, seed=seed) if blind else [()] * len(questions)
    encoded = encode_questions(questions, processor=model.processor, template=template, system=system)
    asked = encoded + [replace(question, images=images) for question, images in zip(encoded, shuffled) if images]
    sources = [*questions, *(question for question, images in zip(questions, shuffled) if images)]
    names = [f"choice/{number}" for number in range(len(questions))]
    names += [f"blind/{number}" for number, images in enumerate(shuffled) if images]

    def describe(number: int, scores: list[Score]) -> Mapping[str, Any]:
        question = sources[number]
        costs = [cost(one, choice, normalize=normalize) for one, choice in zip(scores, question.choices)]
        return {**question.described(), "answer": question.choices[costs.index(min(costs))]}

    total = sum(len(question.options) for question in asked)
    with tqdm(total=total, unit="option", desc="evaluate", disable=rank_from_env() > 0 or None) as bar:
        found = score_missing(
            model,
            asked,
            keys=names,
            ledger=ledger or Ledger(),
            describe=describe,
            row_tokens=row_tokens,
            progress=bar.update,
        )
    blind_found = iter(found[len(questions) :])
    answers = [
        Answered(
            entry=question,
            scores=tuple(values),
            blind_scores=tuple(next(blind_found)) if images else None,
            normalize=normalize,
        )
        for question, values, images in zip(questions, found, shuffled)
    ]
    return Report(answers=tuple(answers))


def encode_questions(
    questions: Sequence[Choices],
    *,
    processor: Processor,
    template: Template = "deepseek",
    system: str | None = None,
) -> list[ScoreRequest]:
    """Prompts followed by each option, with a space before the option as in training answers.

    Prompt and option are tokenized together, so an option has the tokens that training saw.

    Raises:
        DataError: a question is longer than the model's positions, or an option has no token of its own; with
            file:line.
    """
    text = processor.system(system)
    found = []
    for question in questions:
        with naming(question.location):
            pieces = prompt_pieces(question.prompt, images=len(question.images), template=template, system=text)
            found.append(
                encode_options(
                    pieces,
                    [f" {choice.strip()}" for choice in question.choices],
                    tokenizer=processor.tokenizer,
                    config=processor.config,
                    images=question.images,
                    location=question.location,
                )
            )
    return found
