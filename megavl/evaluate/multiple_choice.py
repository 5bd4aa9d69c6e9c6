"""Multiple choice by perplexity: every option is read after the prompt, and the least surprising one is the answer.

Source: DeepSeek-VL, sections 3.2.2 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import DataError
from megavl.config.model import ModelConfig
from megavl.data.template import Piece, Template, encode_batch
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.image_shuffle import wrong_images
from megavl.evaluate.perplexity import (
    ROW_TOKENS,
    EncodedOption,
    EncodedQuestion,
    option_perplexities,
    option_segments,
)
from megavl.evaluate.report import Answered, Report
from megavl.evaluate.task import Question
from megavl.generate.prompt import prompt_pieces
from megavl.model.vl_model import DeepseekVL


def evaluate_choices(
    model: DeepseekVL,
    questions: Sequence[Question],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    template: Template = "deepseek",
    system: str = SYSTEM_PROMPT,
    blind: bool = False,
    seed: int = 0,
    row_tokens: int = ROW_TOKENS,
) -> Report:
    """Ask all questions.

    Args:
        model: a one-rank model in eval mode.
        questions: from `read_tasks`.
        tokenizer: the model's.
        config: sizes of the model.
        template: format of the prompt, see `prompt_pieces`.
        system: system text of the chat format; empty for none.
        blind: ask again with the images of other questions.
        seed: seed of that pairing.
        row_tokens: most tokens of a packed row.

    Raises:
        DataError: a question does not fit the model, an image cannot be read, or no blind pairing exists.
        NumericsError: a perplexity is not finite.
    """
    wrong = wrong_images(questions, seed=seed) if blind else [()] * len(questions)
    encoded = encode_questions(questions, tokenizer=tokenizer, config=config, template=template, system=system)
    blindly = [replace(question, images=images) for question, images in zip(encoded, wrong) if images]
    total = sum(len(option_segments(0, question)) for question in encoded + blindly)
    with tqdm(total=total, unit="prompt", desc="evaluate", disable=None) as bar:
        found = option_perplexities(
            model, encoded + blindly, geometry=config.image_geometry, row_tokens=row_tokens, progress=bar.update
        )
    blind_found = iter(found[len(questions) :])
    answers = [
        Answered(
            entry=question,
            perplexities=tuple(values),
            blind_perplexities=tuple(next(blind_found)) if images else None,
        )
        for question, values, images in zip(questions, found, wrong)
    ]
    return Report(answers=tuple(answers))


def encode_questions(
    questions: Sequence[Question],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    template: Template = "deepseek",
    system: str = SYSTEM_PROMPT,
) -> list[EncodedQuestion]:
    """Prompts with each option behind them, a space in front of the option as in training answers.

    Prompt and option are tokenized together, so an option's tokens are those that training saw.

    Raises:
        DataError: a question is longer than the model's positions, or an option has no token of its own; with
            file:line.
    """
    return [
        EncodedQuestion(
            place=question.place,
            options=_encode_options(question, tokenizer=tokenizer, config=config, template=template, system=system),
            images=question.images,
        )
        for question in questions
    ]


def _encode_options(
    question: Question, *, tokenizer: Tokenizer, config: ModelConfig, template: Template, system: str
) -> tuple[EncodedOption, ...]:
    try:
        pieces = prompt_pieces(question.prompt, images=len(question.images), template=template, system=system)
        samples = [
            [*pieces, Piece(kind="text", text=f" {choice.strip()}", supervised=True)] for choice in question.choices
        ]
        encoded = encode_batch(samples, tokenizer=tokenizer, image_tokens=config.image_tokens)
    except DataError as error:
        raise DataError(f"{question.place}: {error}") from error
    options = []
    for choice, sample in zip(question.choices, encoded):
        if len(sample.spans) != 1 or sample.spans[0][0] == 0:
            raise DataError(f"{question.place}: choices: {choice!r} has no token of its own behind the prompt")
        if len(sample.ids) > config.llm.max_position_embeddings:
            raise DataError(
                f"{question.place}: {len(sample.ids)} tokens exceed the model's {config.llm.max_position_embeddings} "
                "positions; shorten the prompt"
            )
        options.append(EncodedOption(ids=tuple(map(int, sample.ids)), start=sample.spans[0][0]))
    return tuple(options)
