"""All entries of tasks: choices, free-form answers and texts, in one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megavl.config.chat import SYSTEM_PROMPT
from megavl.data.template import Template
from megavl.evaluate.bits_per_byte import encode_passages, score_passages
from megavl.evaluate.free_form import answer_questions, encode_open_questions
from megavl.evaluate.multiple_choice import evaluate_choices
from megavl.evaluate.report import Report
from megavl.evaluate.task import OpenQuestion, Passage, Question, Task
from megavl.generate.pretrained import Model


def evaluate(
    model: Model,
    tasks: Sequence[Task],
    *,
    template: Template = "deepseek",
    system: str = SYSTEM_PROMPT,
    blind: bool = False,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> Report:
    """Score every entry. Entries that do not fit the model are found before the model runs.

    Args:
        model: who answers, on one process.
        template: format of prompts, see `prompt_pieces`; texts follow BOS, as documents are trained.
        system: system text of the chat format; empty for none.
        blind: ask questions with choices again with shuffled images.
        batch_size: most free-form answers in progress at a time.

    Raises:
        DataError: an entry does not fit the model, an image cannot be read, or images cannot be shuffled.
        NumericsError: a perplexity or logits are not finite.
    """
    choices = [entry for entry in tasks if isinstance(entry, Question)]
    questions = [entry for entry in tasks if isinstance(entry, OpenQuestion)]
    passages = [entry for entry in tasks if isinstance(entry, Passage)]
    ids = encode_open_questions(
        questions, processor=model.processor, max_new_tokens=max_new_tokens, template=template, system=system
    )
    windows = encode_passages(passages, processor=model.processor)
    report = Report()
    if choices or blind:
        report = evaluate_choices(model, choices, template=template, system=system, blind=blind, seed=seed)
    answers = answer_questions(model, questions, ids, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return replace(report, free_form=tuple(answers), passages=tuple(score_passages(model, passages, windows)))
