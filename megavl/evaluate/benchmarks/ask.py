"""Benchmarks read, asked and scored: by generation and a parser, or by the perplexity of the choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megavl.config.errors import DataError, UsageError
from megavl.config.evaluation import Normalization, benchmark_of
from megavl.data.template import Template
from megavl.evaluate.benchmarks.item import Item, Outcome
from megavl.evaluate.benchmarks.report import BenchmarkReport, Mode
from megavl.evaluate.benchmarks.table import BENCHMARKS, Benchmark
from megavl.evaluate.endpoint import Endpoint, Prompt, Reply
from megavl.evaluate.free_form import answer_texts, encode_open_questions
from megavl.evaluate.ledger import Ledger, score_missing
from megavl.evaluate.multiple_choice import encode_questions
from megavl.evaluate.normalize import cost
from megavl.generate.pretrained import Model, Processor
from megavl.generate.score import ROW_TOKENS, Score
from megavl.generate.score_rows import ScoreRequest
from megavl.parallel.groups import rank_from_env


@dataclass(frozen=True, kw_only=True)
class BenchmarkTask:
    """A benchmark and its questions."""

    name: str
    items: tuple[Item, ...]
    passed_over: int = 0
    """Rows that are no questions of the benchmark."""

    @property
    def benchmark(self) -> Benchmark:
        """The row of the table."""
        return BENCHMARKS[self.name]

    @property
    def by_choices(self) -> tuple[Item, ...]:
        """The items that have choices."""
        return tuple(item for item in self.items if item.choices)


@dataclass(frozen=True, kw_only=True)
class EncodedBenchmark:
    """A benchmark as the model reads it."""

    task: BenchmarkTask
    mode: Mode
    ids: tuple[tuple[int, ...], ...] = ()
    """Prompts of all items, to generate."""
    requests: tuple[ScoreRequest, ...] = ()
    """Of the items with choices, to score."""


def read_benchmarks(entries: Sequence[str], *, limit: int | None = None) -> list[BenchmarkTask]:
    """Benchmarks `NAME=PATH`, every row and image checked.

    Args:
        limit: most questions taken of each, every rotation of a question included; None takes all.

    Raises:
        DataError: a file or row that cannot be used; with file and row.
        UsageError: an unknown benchmark, or a Parquet file and no pyarrow.
    """
    named = [benchmark_of(entry) for entry in entries]
    if doubled := next((name for name, _ in named if [other for other, _ in named].count(name) > 1), None):
        raise UsageError(f"--benchmark: {doubled} is named twice; evaluate its files one after the other")
    return [_read(name, where, limit=limit) for name, where in named]


def encode_benchmark(
    task: BenchmarkTask,
    *,
    processor: Processor,
    mode: Mode,
    max_new_tokens: int = 1,
    template: Template = "deepseek",
    system: str | None = None,
) -> EncodedBenchmark:
    """Token ids of all prompts.

    Raises:
        DataError: a question does not fit the model, or the benchmark has no choices to score; with file and row.
    """
    if mode == "generate":
        found = encode_open_questions(
            task.items, processor=processor, max_new_tokens=max_new_tokens, template=template, system=system
        )
        return EncodedBenchmark(task=task, mode=mode, ids=tuple(map(tuple, found)))
    if not task.by_choices:
        raise DataError(
            f"{task.benchmark.title}: its answers are free text, which cannot be scored by perplexity; let the model "
            "generate instead, with megavl evaluate"
        )
    requests = encode_questions(task.by_choices, processor=processor, template=template, system=system)
    return EncodedBenchmark(task=task, mode=mode, requests=tuple(requests))


def ask_benchmark(
    model: Model,
    encoded: EncodedBenchmark,
    *,
    max_new_tokens: int = 512,
    batch_size: int = 8,
    normalize: Normalization = "token",
    ledger: Ledger | None = None,
) -> BenchmarkReport:
    """Ask all questions and score the answers, without a judge.

    Args:
        model: who answers.
        ledger: answers that are there already, and where new ones are kept.

    Raises:
        DataError: an image cannot be read any more.
        NumericsError: a score or logits are not finite.
        StorageError: an answer cannot be written.
    """
    ledger = ledger or Ledger()
    task = encoded.task
    if encoded.mode == "perplexity":
        outcomes = _by_perplexity(model, encoded, normalize=normalize, ledger=ledger)
        return report_of(task, outcomes, mode="perplexity", notes=_left_out(task))
    texts = answer_texts(
        model,
        task.items,
        encoded.ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        name=task.name,
        ledger=ledger,
    )
    outcomes = [outcome_of(task.benchmark, item, text) for item, text in zip(task.items, texts)]
    return report_of(task, outcomes, mode="generate", notes=_judge_notes(task.benchmark, [], judge=None))


def judge_benchmark(report: BenchmarkReport, *, judge: Endpoint, ledger: Ledger) -> BenchmarkReport:
    """The report after a language model has extracted or graded the answers, where the benchmark has one do so.

    Args:
        report: of answers that the model generated.
        judge: asked once about each answer that is not in the ledger.

    Raises:
        StorageError: a reply cannot be written.
    """
    if report.benchmark.ask_judge is None or report.mode != "generate":
        return report
    task = BenchmarkTask(name=report.name, items=tuple(one.item for one in report.outcomes))
    texts = [one.text for one in report.outcomes]
    replies = _replies(task, texts, judge=judge, ledger=ledger)
    outcomes = [
        outcome_of(task.benchmark, item, text, reply=reply) for item, text, reply in zip(task.items, texts, replies)
    ]
    return report_of(task, outcomes, mode="generate", notes=_judge_notes(task.benchmark, replies, judge=judge))


def outcome_of(benchmark: Benchmark, item: Item, text: str, *, reply: Mapping[str, Any] | None = None) -> Outcome:
    """How an answer counts.

    Args:
        reply: what a judge said about it, `text` or `error`; None: no judge was asked.
    """
    # An answer that could not be judged counts by the rules.
    said = None if reply is None or "error" in reply else str(reply.get("text", ""))
    if benchmark.grade is not None:
        grade = None if said is None else benchmark.grade(said)
        return Outcome(item=item, text=text, prediction=benchmark.parse(item, text), score=grade)
    prediction = benchmark.parse(item, text) if said is None else benchmark.parse_reply(item, said)
    right = prediction is not None and benchmark.is_right(item, prediction)
    return Outcome(item=item, text=text, prediction=prediction, score=float(right))


def _read(name: str, where: str, *, limit: int | None) -> BenchmarkTask:
    if not name:
        raise UsageError(f"--benchmark: {where} is no benchmark; write NAME=FILE, such as mmbench={where}")
    benchmark, items = BENCHMARKS[name], list[Item]()
    seen: dict[str, str] = {}
    rows = tqdm(benchmark.read(where), unit="row", desc=f"read {name}", disable=rank_from_env() > 0 or None)
    passed_over, groups = 0, set[str]()
    for item in rows:
        if item is None:
            passed_over += 1
            continue
        if item.id in seen:
            raise DataError(f"{item.location}: id {item.id!r} is also that of {seen[item.id]}; ids must differ")
        seen[item.id] = item.location
        if len(groups) == limit and item.group not in groups:
            continue
        items.append(item)
        groups.add(item.group or item.id)
        # The rotations of a question may stand anywhere in the file.
        if len(groups) == limit and not item.group:
            break
    if not items:
        raise DataError(f"{where}: has no question of {benchmark.title} in it")
    return BenchmarkTask(name=name, items=tuple(items), passed_over=passed_over)


def _by_perplexity(
    model: Model, encoded: EncodedBenchmark, *, normalize: Normalization, ledger: Ledger
) -> list[Outcome]:
    items, name = encoded.task.by_choices, encoded.task.name

    def likeliest(item: Item, scores: Sequence[Score]) -> str:
        costs = [cost(one, choice, normalize=normalize) for one, choice in zip(scores, item.choices)]
        return item.choices[costs.index(min(costs))]

    total = sum(len(request.options) for request in encoded.requests)
    with tqdm(total=total, unit="option", desc=name, disable=rank_from_env() > 0 or None) as bar:
        found = score_missing(
            model,
            encoded.requests,
            keys=[f"{name}/{number}" for number in range(len(items))],
            ledger=ledger,
            describe=lambda number, scores: {**items[number].described(), "answer": likeliest(items[number], scores)},
            row_tokens=ROW_TOKENS,
            progress=bar.update,
        )
    outcomes = []
    for item, scores in zip(items, found):
        choice = likeliest(item, scores)
        outcomes.append(Outcome(item=item, text=choice, prediction=choice, score=float(choice == item.answer)))
    return outcomes


def report_of(task: BenchmarkTask, outcomes: Sequence[Outcome], *, mode: Mode, notes: Sequence[str]) -> BenchmarkReport:
    """Figures and notes of a benchmark's outcomes."""
    figures = task.benchmark.aggregate(outcomes)
    if "rows" in figures and figures["rows"] == figures["n"]:
        notes = [*notes, "the file has no rotated rows, so the score is plain accuracy and not circular"]
    if task.passed_over:
        rows = "1 row is" if task.passed_over == 1 else f"{task.passed_over} rows are"
        notes = [*notes, f"{rows} passed over: {task.benchmark.passed_over}"]
    if task.name == "pope":
        notes = [*notes, "the score is F1 of `yes`; the paper does not say which figure it reports"]
    return BenchmarkReport(name=task.name, outcomes=tuple(outcomes), mode=mode, figures=figures, notes=tuple(notes))


def _left_out(task: BenchmarkTask) -> list[str]:
    missing = len(task.items) - len(task.by_choices)
    notes = ["by the perplexity of the choices; the paper's tables are by generation"]
    return [*notes, f"{missing} questions without choices are left out"] if missing else notes


def _replies(task: BenchmarkTask, texts: Sequence[str], *, judge: Endpoint, ledger: Ledger) -> list[Mapping[str, Any]]:
    """What the judge says about each answer; its errors are not kept, so that they are asked again."""
    ask = task.benchmark.ask_judge
    assert ask is not None, "the benchmark has no question for a judge"
    keys = [f"judge/{task.name}/{number}" for number in range(len(texts))]
    missing = [number for number, key in enumerate(keys) if ledger.get(key) is None]
    errors: dict[int, Reply] = {}
    prompts = [Prompt(text=ask(task.items[number], texts[number])) for number in missing]
    replies = judge.ask_all(prompts)
    for index, reply in tqdm(replies, total=len(prompts), unit="reply", desc=f"judge {task.name}", disable=None):
        number = missing[index]
        if reply.error:
            errors[number] = reply
        else:
            ledger.put(keys[number], {"id": task.items[number].id, "text": reply.text})
    return [
        {"error": errors[number].error} if number in errors else ledger.get(key) or {}
        for number, key in enumerate(keys)
    ]


def _judge_notes(benchmark: Benchmark, replies: Sequence[Mapping[str, Any]], *, judge: Endpoint | None) -> list[str]:
    if benchmark.ask_judge is None:
        return []
    if judge is None and benchmark.grade is not None:
        return ["only a judge can grade these answers; name one with --endpoint and --judge"]
    if judge is None:
        return ["answers are extracted by rules; the paper's were extracted by a language model (--endpoint, --judge)"]
    errors = [str(reply["error"]) for reply in replies if "error" in reply]
    notes = [f"judged by {judge.model}"]
    if errors:
        by_rules = "" if benchmark.grade is not None else " and count by the rules"
        notes.append(f"{len(errors)} answers could not be judged{by_rules}, the first: {errors[0]}")
    return notes
