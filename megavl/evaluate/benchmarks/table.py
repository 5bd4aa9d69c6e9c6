"""The benchmarks of the paper's Tables 6 and 7, a row each: reader with prompt, parser, comparison, and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megavl.config.evaluation import BENCHMARKS as NAMES
from megavl.evaluate.benchmarks import (
    cmmmu,
    figures,
    mathvista,
    mm_vet,
    mmbench,
    mmmu,
    ocrbench,
    pope,
    scienceqa,
    seed_bench,
)
from megavl.evaluate.benchmarks.figures import Figures
from megavl.evaluate.benchmarks.item import Item, Outcome
from megavl.evaluate.benchmarks.letters import letter_of


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """How a benchmark is read, asked and scored."""

    title: str
    read: Callable[[str], Iterator[Item | None]]
    """Items, with their prompts, of a file, a folder or a quoted pattern; None for a row that is passed over."""
    parse: Callable[[Item, str], str | None]
    """What an answer means; None if nothing can be found in it."""
    is_right: Callable[[Item, str], bool] = lambda item, prediction: prediction == item.answer
    aggregate: Callable[[Sequence[Outcome]], Figures] = figures.accuracy
    by_perplexity: bool = True
    """Whether its questions have choices that can be scored by perplexity, as during training."""
    ask_judge: Callable[[Item, str], str] | None = None
    """What a language model is asked about an answer, where the benchmark has one do so."""
    grade: Callable[[str], float | None] | None = None
    """The grade in a judge's reply; None: the reply is an answer that was extracted."""
    parse_reply: Callable[[Item, str], str | None] = lambda item, reply: None
    """What an extracted answer means; None if there is none."""
    passed_over: str = ""
    """What the rows are that are passed over."""
    points: float = 100.0
    """Of a score of 1, in the paper's unit."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """What the paper reports for its models, Tables 6 and 7, in its unit."""


def _letter(item: Item, answer: str) -> str | None:
    return letter_of(answer, item.options)


BENCHMARKS: dict[str, Benchmark] = {
    "mmbench": Benchmark(
        title="MMBench",
        read=mmbench.read,
        parse=_letter,
        aggregate=figures.circular,
        paper={"7B": 73.2, "1.3B": 64.6},
    ),
    "mmbench-cn": Benchmark(
        title="MMBench-CN",
        read=mmbench.read_cn,
        parse=_letter,
        aggregate=figures.circular,
        paper={"7B": 72.8, "1.3B": 61.3},
    ),
    "seed-bench": Benchmark(
        title="SEED-Bench", read=seed_bench.read, parse=_letter, passed_over="videos", paper={"7B": 70.4, "1.3B": 66.7}
    ),
    "mmmu": Benchmark(
        title="MMMU",
        read=mmmu.read,
        parse=mmmu.parse,
        is_right=mmmu.is_right,
        paper={"7B": 36.6, "1.3B": 32.2},
    ),
    "cmmmu": Benchmark(
        title="CMMMU",
        read=cmmmu.read,
        parse=cmmmu.parse,
        is_right=cmmmu.is_right,
        paper={"7B": 37.9, "1.3B": 27.4},
    ),
    # Not in Tables 6 and 7; Table 11 has it for ablations of the adaptor only.
    "scienceqa": Benchmark(
        title="ScienceQA", read=scienceqa.read, parse=_letter, passed_over="questions of other splits"
    ),
    "mathvista": Benchmark(
        title="MathVista",
        read=mathvista.read,
        parse=mathvista.parse,
        is_right=mathvista.is_right,
        ask_judge=mathvista.question_to_judge,
        parse_reply=mathvista.parse_reply,
        paper={"7B": 36.1, "1.3B": 31.1},
    ),
    "ocrbench": Benchmark(
        title="OCRBench",
        read=ocrbench.read,
        parse=ocrbench.parse,
        is_right=ocrbench.is_right,
        by_perplexity=False,
        points=1000.0,
        paper={"7B": 456, "1.3B": 409},
    ),
    "pope": Benchmark(
        title="POPE",
        read=pope.read,
        parse=pope.parse,
        aggregate=figures.yes_or_no,
        paper={"7B": 88.1, "1.3B": 87.6},
    ),
    "mm-vet": Benchmark(
        title="MM-Vet",
        read=mm_vet.read,
        parse=lambda item, answer: answer.strip() or None,
        aggregate=figures.graded,
        by_perplexity=False,
        ask_judge=mm_vet.question_to_judge,
        grade=mm_vet.grade_of,
        paper={"7B": 41.5, "1.3B": 34.8},
    ),
}

assert tuple(BENCHMARKS) == NAMES, "megavl/config/evaluation.py names the benchmarks of this table"
