"""What a run evaluates while it trains."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from megavl.config.bounds import NonNegative, PathText, Positive
from megavl.config.errors import UsageError
from megavl.config.model import STRICT

BENCHMARKS = (
    *("mmbench", "mmbench-cn", "seed-bench", "mmmu", "cmmmu", "scienceqa", "mathvista", "ocrbench", "pope", "mm-vet"),
)
"""Public benchmarks that are read as they are published; `megavl/evaluate/benchmarks/table.py` has a row for each."""

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of a judge's endpoint, unless another one is named."""

Normalization = Literal["token", "sum", "byte"]
"""What the log-probability of an option is divided by before options are compared: its tokens (paper, section 3.2.2),
nothing, or its UTF-8 bytes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """Questions by perplexity (paper, section 3.2.2) and losses of held-out data, through the model that trains."""

    interval: NonNegative = 0
    """Steps between two evaluations; the last step evaluates too. 0: never."""
    at_start: bool = False
    """Evaluate the weights that a new run starts from, as step 0."""
    tasks: tuple[PathText, ...] = ()
    """Task files of `megavl evaluate` with choices or texts, and benchmarks as NAME=FILE (mmbench=data/dev.tsv);
    relative to the working directory."""
    held_out: tuple[PathText, ...] = ()
    """Directories written by data_tools/preprocess.py whose loss is measured, but not trained on."""
    held_out_sequences: Positive = 64
    """Most sequences of each modality that are read of a held-out directory: its first ones."""
    system: str | None = None
    """System text of the questions; empty for none. Default: `model.system_prompt`."""
    normalize: Normalization = "token"
    """By what options are compared: token (perplexity, as in the paper), sum or byte."""


def evaluated_names(evaluation: EvaluationConfig) -> dict[str, list[str]]:
    """Names in the rows of `evaluation.jsonl`, below `tasks` and `held_out`."""
    return {
        "tasks": [benchmark_of(entry)[0] or Path(entry).stem for entry in evaluation.tasks],
        "held_out": [Path(path).name for path in evaluation.held_out],
    }


def check_evaluation(evaluation: EvaluationConfig) -> None:
    """Check that there is something to evaluate, and that results can be told apart.

    Raises:
        UsageError: naming the key.
    """
    for key, found in evaluated_names(evaluation).items():
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


def benchmark_of(entry: str) -> tuple[str, str]:
    """Name of the benchmark and path of an entry `NAME=PATH`; "" and the entry for a task file.

    Raises:
        UsageError: an unknown name, or no path.
    """
    found = re.fullmatch(r"([A-Za-z][A-Za-z0-9_.-]*)=(.*)", entry, re.DOTALL)
    if found is None:
        return "", entry
    name, path = found.groups()
    known = {_plain(one): one for one in BENCHMARKS}
    if _plain(name) not in known:
        nearest = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.6)
        if path.endswith(".jsonl") and not nearest:
            return "", entry
        hint = f"did you mean {known[nearest[0]]!r}?" if nearest else f"known: {', '.join(BENCHMARKS)}"
        raise UsageError(f"{entry}: there is no benchmark {name!r}; {hint}")
    if not path:
        raise UsageError(f"{entry}: names no file; write {known[_plain(name)]}=FILE")
    return known[_plain(name)], path


def _plain(name: str) -> str:
    return re.sub("[-_.]", "", name.lower())
