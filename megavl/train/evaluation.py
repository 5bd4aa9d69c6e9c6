"""Evaluation during training: forward passes of the model that trains, on all ranks, in its own layout.

Nothing of it reaches the training: no random numbers are drawn, no weight or moment changes, and losses of a run are
bitwise the same without it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from tqdm import tqdm

from megavl.checkpoint import collective_errors
from megavl.checkpoint.fault import inject_fault
from megavl.config.data import MixtureSource, ModalityWeights
from megavl.config.errors import DataError
from megavl.config.evaluation import Normalization, benchmark_of
from megavl.data.batch import Batch, Modality
from megavl.data.collate import collate
from megavl.data.dataset import Dataset, open_dataset
from megavl.data.image_worker import load_canvas
from megavl.data.manifest import MODALITIES
from megavl.data.table import ReadHandles
from megavl.data.tokenizer import Tokenizer
from megavl.evaluate.benchmarks.ask import encode_benchmark, read_benchmarks
from megavl.evaluate.bits_per_byte import encode_passages
from megavl.evaluate.multiple_choice import encode_questions
from megavl.evaluate.normalize import cost
from megavl.evaluate.task import OpenQuestion, Passage, Question, Task, read_tasks
from megavl.files import activity
from megavl.generate.pretrained import Processor
from megavl.generate.score import Score, label_scores, own_share, rows_of_a_pass, score
from megavl.generate.score_rows import ScoreRequest
from megavl.parallel import cpu_runtime, groups
from megavl.parallel.images import shares
from megavl.train.evaluation_log import EvaluationLog
from megavl.train.metrics import finite
from megavl.train.model_chunks import ModelChunks
from megavl.train.run_plan import RunPlan
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.trackers import Trackers


class _Stopped(Exception):
    """Some rank received a pre-emption signal; raised on all ranks together."""


@dataclass(frozen=True, kw_only=True)
class _TaskFile:
    """A task file and the requests of its entries, in order; a text may have several."""

    name: str
    entries: tuple[Task, ...]
    requests: tuple[tuple[ScoreRequest, ...], ...]
    left_out: int = 0
    """Questions of a benchmark that have no choices to score."""


class Evaluation:
    """What a run evaluates, checked and encoded before its first step."""

    def __init__(
        self, plan: RunPlan, *, tokenizer: Tokenizer, asked_to_stop: Callable[[], bool], meanwhile: Callable[[], None]
    ) -> None:
        """Read the tasks and open the held-out data, unless nothing is to be evaluated. Collective.

        Args:
            asked_to_stop: whether this rank has received a signal to stop.
            meanwhile: called again and again during an evaluation, on all ranks together.

        Raises:
            DataError: a task or a held-out directory cannot be used; on every rank.
        """
        self._plan, self._config = plan, plan.recipe.evaluation
        self._asked_to_stop, self._meanwhile = asked_to_stop, meanwhile
        self._tokenizer, self._handles = tokenizer, ReadHandles()
        self._tasks: list[_TaskFile] = []
        self._held_out: list[tuple[str, Dataset]] = []
        self._log: EvaluationLog | None = None
        if self._config.interval:
            collective_errors.on_every_rank(self._open)

    def start(self, *, step: int, trackers: Trackers | None) -> None:
        """Say after which step the run goes on; later rows of an earlier run are set aside."""
        run = self._plan.recipe.run
        if self._config.interval and self._plan.position.rank == 0:
            self._log = EvaluationLog(run.dir, start_step=step, tensorboard=run.board, trackers=trackers)

    def after(self, model: ModelChunks, *, step: int, status: ExitStatus) -> bool:
        """Evaluate and log, if it is time after this step; 0 stands for the start of a new run. Collective.

        Returns:
            Whether a signal ended the evaluation; the same on every rank.
        """
        if not self.is_due(step):
            return False
        status.section = "evaluating"
        inject_fault("evaluating", rank=self._plan.position.rank, step=step)
        try:
            row = self.run(model, step=step)
        except _Stopped:
            self._plan.say(f"a signal ended the evaluation after step {step}")
            return True
        if row is not None and self._log is not None:
            self._log.write(row)
        return False

    def is_due(self, step: int) -> bool:
        """Whether the recipe asks for an evaluation after a step."""
        config = self._config
        if step == 0 or not config.interval:
            return bool(config.interval) and config.at_start
        return step == self._plan.recipe.training.steps or step % config.interval == 0

    def before_first_step(self, model: ModelChunks, *, step: int, status: ExitStatus) -> bool:
        """Evaluate where a start begins: at step 0, or after a step whose evaluation a signal ended. Collective.

        Returns:
            As `after`.
        """

        def has_row() -> bool:
            return self._log is not None and self._log.last_step == step

        if not self.is_due(step) or (step and collective_errors.on_rank_zero(has_row)):
            return False
        return self.after(model, step=step, status=status)

    def run(self, model: ModelChunks, *, step: int) -> dict[str, Any] | None:
        """Evaluate; returns the row of evaluation.jsonl. Collective.

        None where a file could not be read any more, which may not cost the run its training.

        Raises:
            _Stopped: a signal asked to stop.
        """
        began = time.perf_counter()
        # Weights that the last step updated are gathered here for all, not by the modules on their way.
        model.gather_weights()
        total = sum(len(of_entry) for task in self._tasks for of_entry in task.requests)
        total += sum(count for _, _, _, count in self._parts())
        with tqdm(total=total, unit="row", desc="evaluate", disable=self._plan.position.rank > 0 or None) as bar:
            try:
                tasks = {task.name: self._task(model, task, bar=bar) for task in self._tasks}
                held_out: dict[str, dict[str, Any]] = {}
                for name, dataset, modality, count in self._parts():
                    part = self._losses(model, dataset, modality=modality, count=count, bar=bar)
                    held_out.setdefault(name, {})[modality] = part
            except DataError as error:
                self._plan.say(f"warning: no evaluation after step {step}: {error}; training goes on")
                return None
        seconds = round(time.perf_counter() - began, 6)
        return {"step": step, "tasks": tasks, "held_out": held_out, "seconds": seconds}

    def _open(self) -> None:
        processor = Processor(self._plan.recipe.model, self._tokenizer)
        for path in self._config.tasks:
            try:
                self._tasks.append(self._read(path, processor))
            except DataError as error:
                raise DataError(f"evaluation.tasks: {error}") from error
        self._held_out = [(Path(path).name, self._open_held_out(path)) for path in self._config.held_out]

    def _read(self, path: str, processor: Processor) -> _TaskFile:
        if benchmark_of(path)[0]:
            return self._read_benchmark(path, processor)
        entries = read_tasks([path])
        if written := next((entry for entry in entries if isinstance(entry, OpenQuestion)), None):
            raise DataError(
                f"{written.location}: answers: a free-form answer cannot be asked for during training; give choices "
                "instead, or leave it to megavl evaluate"
            )
        requests: list[tuple[ScoreRequest, ...]] = []
        for entry in entries:
            if isinstance(entry, Question):
                requests.append(tuple(encode_questions([entry], processor=processor, system=self._config.system)))
            elif isinstance(entry, Passage):
                requests.append(tuple(encode_passages([entry], processor=processor)[0]))
        return _TaskFile(name=Path(path).stem, entries=tuple(entries), requests=tuple(requests))

    def _read_benchmark(self, entry: str, processor: Processor) -> _TaskFile:
        """The questions of a benchmark that have choices, each row for itself."""
        (task,) = read_benchmarks([entry])
        encoded = encode_benchmark(task, processor=processor, mode="perplexity", system=self._config.system)
        questions = tuple(
            Question(
                id=item.id, location=item.location, prompt=item.prompt, choices=item.choices, answer=item.right_choice
            )
            for item in task.by_choices
        )
        return _TaskFile(
            name=task.name,
            entries=questions,
            requests=tuple((request,) for request in encoded.requests),
            left_out=len(task.items) - len(questions),
        )

    def _open_held_out(self, path: str) -> Dataset:
        recipe, one = self._plan.recipe, ModalityWeights(text=1.0, multimodal=1.0)
        try:
            return open_dataset(
                [MixtureSource(name=Path(path).name, path=path, weight=one, max_epochs=None)],
                tokenizer=self._tokenizer,
                seq_length=recipe.data.seq_length,
                geometry=recipe.model.image_geometry,
                vocab_size=recipe.model.llm.vocab_size,
                image_token_id=recipe.model.image_token_id,
                skip_hash=recipe.data.skip_hash,
            )
        except DataError as error:
            raise DataError(f"evaluation.held_out: {path}: {error}") from error

    def _task(self, model: ModelChunks, task: _TaskFile, *, bar: tqdm[Any]) -> dict[str, Any]:
        def told(_: int) -> None:
            self._stop_if_asked()

        flat = [request for of_entry in task.requests for request in of_entry]
        found = iter(
            score(
                [chunk.module for chunk in model.chunks],
                flat,
                config=self._plan.recipe.model,
                spread=spread_images(model),
                progress=told,
            )
        )
        bar.update(len(flat))
        scores = [[next(found) for _ in of_entry] for of_entry in task.requests]
        left_out = {"left_out": task.left_out} if task.left_out else {}
        return task_figures(task.entries, scores, normalize=self._config.normalize) | left_out

    def _parts(self) -> Iterator[tuple[str, Dataset, Modality, int]]:
        """Held-out directories by modality, with the number of sequences that are read."""
        for name, dataset in self._held_out:
            for modality in MODALITIES:
                if count := min(dataset.counts[0][modality], self._config.held_out_sequences):
                    yield name, dataset, modality, count

    def _losses(
        self, model: ModelChunks, dataset: Dataset, *, modality: Modality, count: int, bar: tqdm[Any]
    ) -> dict[str, Any]:
        """Mean loss of the first sequences, and for text the bits per byte of the tokens that count."""
        losses: list[float] = []
        labels = 0
        size = 0
        for first in range(0, count, rows_of_a_pass()):
            part = range(first, min(count, first + rows_of_a_pass()))
            batches = self._batches(dataset, modality=modality, part=part)
            found = label_scores(
                [chunk.module for chunk in model.chunks],
                own_share(batches),
                counts=[len(batch.labels) for batch in batches],
                length=dataset.seq_length,
                spread=spread_images(model),
            )
            losses += [float(values[0].sum()) for values in found]
            labels += sum(len(batch.labels) for batch in batches)
            if modality == "text":
                size += sum(len(self._tokenizer.decode(batch.labels.tolist()).encode()) for batch in batches)
            bar.update(len(part))
            self._stop_if_asked()
        total = math.fsum(losses)
        row: dict[str, Any] = {"loss": finite(total / max(1, labels)), "tokens": labels, "sequences": count}
        if modality == "text":
            row["bits_per_byte"] = finite(total / math.log(2) / max(1, size))
        return row

    def _batches(self, dataset: Dataset, *, modality: Modality, part: Sequence[int]) -> list[Batch]:
        """Some sequences; images only of this replica's share, on the ranks that encode them."""
        encodes = mpu.is_pipeline_first_stage() or self._plan.recipe.parallel.vision == "split_all"
        own = set(own_share(part)) if encodes else set()
        batches: list[Batch] = []

        def read() -> None:
            for index in part:
                sequence = dataset.read(source=0, modality=modality, index=index)
                images = [image for member in sequence.members for image in member.images] if index in own else []
                batches.append(
                    collate(
                        [sequence],
                        canvases=[load_canvas(one, geometry=dataset.geometry, handles=self._handles) for one in images],
                        canvas_size=dataset.geometry.canvas_size,
                        image_token_id=dataset.image_id,
                        modality=modality,
                        bad_samples=(),
                        cross_document_attention=self._plan.recipe.data.cross_document_attention,
                    )
                )

        collective_errors.on_every_rank(read)
        return batches

    def _stop_if_asked(self) -> None:
        activity.note()
        if groups.on_any_rank(self._asked_to_stop()):
            raise _Stopped
        self._meanwhile()


def task_figures(
    entries: Sequence[Task], scores: Sequence[Sequence[Sequence[Score]]], *, normalize: Normalization = "token"
) -> dict[str, Any]:
    """Figures of a task file: of choices the accuracy, and of texts the bits per byte.

    Args:
        scores: for each entry the scores of its requests: of a question one with its options, of a text its windows.
        normalize: by what the options of a question are compared.

    Returns:
        Where there are questions: accuracy, chance, standard_error and n. Means in nats a token of `loss`, that of the
        right option, and of `margin`, by which it is below the least loss of a wrong one. `by_kind` has the same of
        each kind, if there are several. Where there are texts: bits_per_byte and bytes. What is not finite is None.
    """
    questions = [(entry, found[0]) for entry, found in zip(entries, scores) if isinstance(entry, Question)]
    passages = [(entry, found) for entry, found in zip(entries, scores) if isinstance(entry, Passage)]
    row: dict[str, Any] = {}
    if questions:
        costs = [
            [cost(one, choice, normalize=normalize) for one, choice in zip(options, entry.choices)]
            for entry, options in questions
        ]
        asked = [(entry, options, values) for (entry, options), values in zip(questions, costs)]
        row |= _question_figures(asked)
        kinds = sorted({entry.kind for entry, _ in questions})
        if len(kinds) > 1:
            row["by_kind"] = {kind: _question_figures([one for one in asked if one[0].kind == kind]) for kind in kinds}
    if passages:
        size = sum(len(entry.text.encode()) for entry, _ in passages)
        nats = -math.fsum(window[0].log_prob for _, windows in passages for window in windows)
        row |= {"bits_per_byte": finite(nats / math.log(2) / size), "bytes": size}
    return row


def _question_figures(asked: Sequence[tuple[Question, Sequence[Score], list[float]]]) -> dict[str, Any]:
    """Figures of questions, given the scores and costs of their options; None where numbers are not finite."""
    count = len(asked)
    accuracy = sum(costs.index(min(costs)) == entry.answer for entry, _, costs in asked) / count
    losses = [[-one.log_prob / one.tokens for one in options] for _, options, _ in asked]
    right = [of_options[entry.answer] for (entry, _, _), of_options in zip(asked, losses)]
    wrong = [
        min(of_options[: entry.answer] + of_options[entry.answer + 1 :])
        for (entry, _, _), of_options in zip(asked, losses)
    ]
    sound = all(math.isfinite(value) for _, _, costs in asked for value in costs)
    found = {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "loss": sum(right) / count,
        "margin": sum(other - own for own, other in zip(right, wrong)) / count,
    }
    chance = sum(1 / len(entry.choices) for entry, _, _ in asked) / count
    return {**(found if sound else dict.fromkeys(found)), "chance": chance, "n": count}


def spread_images(model: ModelChunks) -> Callable[[Sequence[Batch]], Sequence[Batch]] | None:
    """Under `split_all`, the ranks encode shares of the images before the pipeline starts."""
    encoders = model.encoders
    if encoders is None:
        return None

    def spread(batches: Sequence[Batch]) -> Sequence[Batch]:
        group = mpu.get_model_parallel_group()
        share = shares(sum(batch.image_count for batch in batches), ranks=group.size())[group.rank()]
        parts, begin = [], 0
        for batch in batches:
            held = batch.images[max(0, share.start - begin) : max(0, share.stop - begin)]
            parts.append(dataclasses.replace(batch, images=held).to(cpu_runtime.device()))
            begin += batch.image_count
        return encoders.encode(parts)

    return spread
