"""What a run evaluates while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import UsageError
from megavl.config.model import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Questions by perplexity (paper, section 3.2.2) and losses of held-out data, through the model that trains."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Steps between two evaluations; the last step evaluates too. 0: never."""
    at_start: bool = False
    """Evaluate the weights that a new run starts from, as step 0."""
    tasks: tuple[str, ...] = ()
    """Task files of `megavl evaluate` with choices or texts, relative to the working directory."""
    held_out: tuple[str, ...] = ()
    """Directories written by data_tools/preprocess.py whose loss is measured, but not trained on."""
    held_out_sequences: Annotated[int, Field(gt=0)] = 64
    """Most sequences of each modality that are read of a held-out directory: its first ones."""
    system: str = SYSTEM_PROMPT
    """System text of the questions; empty for none."""


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check that there is something to evaluate, and that results can be told apart.

    Raises:
        UsageError: naming the key.
    """
    names = {
        "tasks": [Path(path).stem for path in evaluation.tasks],
        "held_out": [Path(path).name for path in evaluation.held_out],
    }
    for key, found in names.items():
        if doubled := [name for name in found if found.count(name) > 1]:
            raise UsageError(
                f"evaluation.{key}: two entries are called {doubled[0]!r}, by which results are named; rename one"
            )
    if evaluation.interval and not (evaluation.tasks or evaluation.held_out):
        raise UsageError(
            "evaluation.interval: there is nothing to evaluate; name evaluation.tasks or evaluation.held_out, or set "
            "evaluation.interval=0"
        )
    if evaluation.at_start and not evaluation.interval:
        raise UsageError("evaluation.at_start: needs evaluation.interval above 0; set an interval, or at_start=false")
