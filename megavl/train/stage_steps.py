"""The steps of a stage: load, train, log, evaluate and save, until the last step or a signal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megavl.checkpoint.fault import inject_fault
from megavl.config.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, NumericsError, StorageError
from megavl.data.dataset import Dataset
from megavl.data.sampler import Sampler
from megavl.parallel import broadcast, groups
from megavl.planner.cost.flops import MFU_CONVENTION
from megavl.train.batch_broadcast import StepPrefetcher, StepSource, next_step
from megavl.train.evaluation import Evaluation
from megavl.train.metrics import MetricsLog, metrics_row
from megavl.train.open_data import step_loader
from megavl.train.optimizer import set_learning_rate
from megavl.train.own_work import slowest_rank
from megavl.train.profile.step_traces import StepTraces
from megavl.train.profile.timeline import StepTimelines, timeline_picture
from megavl.train.progress import Progress
from megavl.train.run_plan import RunPlan
from megavl.train.saves import Saves
from megavl.train.schedule import learning_rate
from megavl.train.state import RunState
from megavl.train.step import StepResult, train_step
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.signals import StopFlag
from megavl.train.trackers import Trackers


@dataclass(frozen=True, kw_only=True)
class StageSteps:
    """What the steps of a stage work on, on this rank."""

    plan: RunPlan
    state: RunState
    dataset: Dataset
    sampler: Sampler
    evaluation: Evaluation
    saves: Saves
    trackers: Trackers | None
    """Rank 0's services, if the recipe names some."""
    stop: StopFlag
    status: ExitStatus

    def go_on(self, progress: Progress) -> int:
        """Evaluate and train from the last step done; returns the exit code.

        Raises:
            StorageError: all steps are done and saved, but a log lacks its end.
        """
        plan, evaluation, steps = self.plan, self.evaluation, self.plan.recipe.training.steps
        evaluation.start(step=progress.step, trackers=self.trackers)
        plan.say(f"{f'resuming after step {progress.step}' if progress.step else 'starting'}: {plan.summary}")
        if plan.peak_flops:
            plan.say(MFU_CONVENTION)
        if progress.step >= steps:
            stopped = evaluation.before_first_step(self.state.model, step=progress.step, status=self.status)
            return self._code_of_stop(progress.step) if stopped else 0
        log = self._log(progress)
        with self._loader(start_step=progress.step) as source:
            # If a signal ends it, the first step is the last of this start.
            evaluation.before_first_step(self.state.model, step=progress.step, status=self.status)
            code = self._run_steps(source, progress, log=log)
        if log is not None and (trouble := log.close()) and code == 0:
            raise StorageError(
                f"all steps are done and saved, but these files lack their end: {trouble}; free or repair the storage"
            )
        return code

    def _run_steps(self, source: StepSource | None, progress: Progress, *, log: MetricsLog | None) -> int:
        """Run all remaining steps; the exit code says whether a signal stopped the run before its last."""
        plan, model, status = self.plan, self.state.model, self.status
        recipe, training, optimizer = plan.recipe, plan.recipe.training, plan.recipe.optimizer
        recorders = (StepTimelines(plan, model), StepTraces(plan))
        while progress.step < training.steps:
            step = progress.step + 1
            status.step, status.section = step, "loading data"
            for recorder in recorders:
                recorder.begin(step)
            inject_fault("load_data", rank=plan.position.rank, step=step)
            model.own_work.begin()
            began = time.perf_counter()
            with model.timed("loading"):
                data = next_step(source, progress.step, split_all=recipe.parallel.vision == "split_all")
            rate = learning_rate(optimizer, step=step, steps=training.steps)
            set_learning_rate(self.state.optimizer, lr=rate, weight_decay=optimizer.weight_decay)
            status.section = "training"
            inject_fault("training", rank=plan.position.rank, step=step)
            result = train_step(
                model, self.state.optimizer, data, stop_flag=self.stop.raised, sources=len(recipe.data.mixture)
            )
            progress = progress.after(skipped=result.skipped)
            seconds = time.perf_counter() - began
            slowest = slowest_rank(model.own_work)
            if log is not None:
                row = metrics_row(plan, result, modality=data[0].modality, progress=progress, lr=rate, seconds=seconds)
                log.write(row | slowest)
            for recorder in recorders:
                recorder.end(modality=data[0].modality, seconds=seconds)
            if log is not None and step in recipe.run.timeline_steps:
                log.picture(timeline_picture(recipe.run.dir, step), step=step)
            self.saves.finish_if_written()
            if result.skipped:
                sample_ids = tuple(number for batch in data for number in batch.sample_ids)
                self._handle_bad_step(progress, result, sample_ids=sample_ids)
            last = step == training.steps
            # Before the save: a run that resumes from it has this evaluation, or makes it first.
            stopped = result.asked_to_stop or self.evaluation.after(model, step=step, status=status)
            if last or stopped or step % recipe.checkpoint.interval == 0:
                self.saves.save(progress, must=last or stopped)
            # After the last step, its evaluation may be left to do.
            if stopped and (not last or self.evaluation.is_due(step)):
                return self._code_of_stop(step)
        return 0

    def _code_of_stop(self, step: int) -> int:
        """Say that a signal stopped the run after a step that is saved; returns the exit code. Collective."""
        interrupted = groups.on_any_rank(self.stop.interrupted)
        how = "Ctrl-C" if interrupted else "a signal"
        self.plan.say(f"stopped by {how} after step {step}; saved, start again to go on")
        return EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED

    @contextmanager
    def _loader(self, *, start_step: int) -> Iterator[StepSource | None]:
        """Batches of the steps, on the ranks that read data."""
        if not broadcast.is_source():
            yield None
            return
        decoding = self.plan.decoding
        workers = decoding.workers
        if self.plan.recipe.data.num_workers == "auto":
            workers = min(workers, _own_cores())
        loader = step_loader(
            self.plan.recipe,
            self.dataset,
            self.sampler,
            position=self.plan.position,
            workers=workers,
            prefetched=decoding.prefetched,
            start_step=start_step,
        )
        if torch.cuda.is_available():
            prefetcher = StepPrefetcher(loader, steps=self.plan.recipe.training.steps)
            yield prefetcher
            # Not where a step failed: the thread may wait for a slow disk, and the process is about to leave.
            prefetcher.close()
            loader.close()
            return
        try:
            yield loader
        finally:
            loader.close()

    def _log(self, progress: Progress) -> MetricsLog | None:
        """Rank 0's log."""
        if self.plan.position.rank:
            return None
        run, steps = self.plan.recipe.run, self.plan.recipe.training.steps
        return MetricsLog(run.dir, steps=steps, start_step=progress.step, tensorboard=run.board, trackers=self.trackers)

    def _handle_bad_step(self, progress: Progress, result: StepResult, *, sample_ids: tuple[int, ...]) -> None:
        recipe = self.plan.recipe
        self.plan.say(f"step {progress.step} skipped: loss {result.loss} or its gradient is not finite; {sample_ids=}")
        if progress.bad_steps >= recipe.training.max_bad_steps:
            # It is from before these steps, and may be the newest checkpoint.
            self.saves.finish()
            raise NumericsError(
                f"{progress.bad_steps} steps in a row up to {progress.step} had a loss or gradient that is not finite; "
                f"the newest checkpoint in {recipe.checkpoint_dir} is from before them; lower optimizer.lr or "
                "check data"
            )


def _own_cores() -> int:
    """Cores for this rank, shared evenly among the ranks of this machine."""
    cores, ranks = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Only Linux binds processes to cores.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(allowed, cores // ranks))
