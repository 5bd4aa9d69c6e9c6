"""All entries of tasks, each asked in its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.model import ModelConfig
from megavl.data.template import Template
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.bits_per_byte import encode_passages, read_passages
from megavl.evaluate.free_form import encode_open_questions, write_answers
from megavl.evaluate.multiple_choice import evaluate_choices
from megavl.evaluate.report import Report
from megavl.evaluate.task import OpenQuestion, Passage, Question, Task
from megavl.model.vl_model import DeepseekVL


def evaluate(
    model: DeepseekVL,
    tasks: Sequence[Task],
    *,
    tokenizer: Tokenizer,
    config: ModelConfig,
    template: Template = "deepseek",
    system: str = SYSTEM_PROMPT,
    blind: bool = False,
    seed: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = 8,
) -> Report:
    """Ask everything; what does not fit the model is found before anything is asked.

    Args:
        model: a one-rank model in eval mode.
        tasks: from `read_tasks`.
        tokenizer: the model's.
        config: sizes of the model.
        template: format of prompts, see `prompt_pieces`; texts are read after BOS, as documents are trained.
        system: system text of the chat format; empty for none.
        blind: ask questions with choices again with the images of other ones.
        seed: seed of that pairing.
        max_new_tokens: most tokens of a written answer.
        batch_size: most written answers under way at a time.

    Raises:
        DataError: an entry does not fit the model, an image cannot be read, or no blind pairing exists.
        NumericsError: a perplexity or logits are not finite.
    """
    choices = [entry for entry in tasks if isinstance(entry, Question)]
    open_questions = [entry for entry in tasks if isinstance(entry, OpenQuestion)]
    passages = [entry for entry in tasks if isinstance(entry, Passage)]
    ids = encode_open_questions(
        open_questions,
        tokenizer=tokenizer,
        config=config,
        max_new_tokens=max_new_tokens,
        template=template,
        system=system,
    )
    windows = encode_passages(passages, tokenizer=tokenizer, config=config)
    report = Report()
    if choices or blind:
        report = evaluate_choices(
            model,
            choices,
            tokenizer=tokenizer,
            config=config,
            template=template,
            system=system,
            blind=blind,
            seed=seed,
        )
    written = write_answers(
        model,
        open_questions,
        ids,
        tokenizer=tokenizer,
        config=config,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    read = read_passages(model, passages, windows, config=config)
    return replace(report, written=tuple(written), read=tuple(read))
