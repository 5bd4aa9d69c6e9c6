"""One stage of training, read from top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavl.checkpoint import collective_errors
from megavl.checkpoint.fault import inject_fault
from megavl.config.errors import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    CheckpointError,
    DataError,
    NumericsError,
    StorageError,
)
from megavl.config.load import dump_recipe
from megavl.config.recipe import Recipe
from megavl.data.dataset import Dataset
from megavl.data.mixture import check_epochs, recipe_mixture, render, source_plans
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.files.durable import replace_durably
from megavl.model.engine_choice import check_engines
from megavl.parallel import broadcast, groups
from megavl.planner.cost.flops import MFU_CONVENTION
from megavl.planner.layouts.check import checked_layout
from megavl.planner.scenario import Scenario
from megavl.train import evaluation_log, metrics
from megavl.train.batch_broadcast import StepPrefetcher, StepSource, next_step
from megavl.train.evaluation import Evaluation
from megavl.train.growing_file import free_for_file, warn
from megavl.train.metrics import MetricsLog, metrics_row
from megavl.train.model_chunks import build_model_chunks
from megavl.train.open_data import recipe_dataset, step_loader
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.own_work import slowest_rank
from megavl.train.profile.step_traces import StepTraces, require_traceable
from megavl.train.profile.timeline import StepTimelines, timeline_picture
from megavl.train.progress import Progress
from megavl.train.run_plan import RunPlan, of_rank_zero, this_device
from megavl.train.saves import Saves
from megavl.train.schedule import learning_rate
from megavl.train.start import check_start, require_random_allowed
from megavl.train.state import RunState
from megavl.train.step import StepResult, train_step
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.roll_call import RollCall
from megavl.train.supervise.signals import StopFlag
from megavl.train.trackers import Trackers, require_trackers


def train(scenario: Scenario, *, status: ExitStatus, stop: StopFlag, roll_call: RollCall) -> int:
    """Run a stage to its end, to a pre-emption, or to an error.

    Args:
        scenario: the recipe on the devices that were started, its sizes checked.
        status: told the step and section, for messages about lost peers.
        stop: asks to save and stop.
        roll_call: begins when the ranks have met.

    Returns:
        0 when all steps are done; 75 or, after Ctrl-C, 130 when a signal asked to stop and the state is saved.
    """
    recipe, world = scenario.recipe, groups.world_size_from_env()
    require_traceable(recipe.run)
    require_trackers(recipe.run)
    groups.prepare_libraries(recipe.parallel)
    device = this_device()
    check_engines(recipe)
    layers = checked_layout(scenario, device)
    _use_threads(recipe, world=world)
    status.section = "joining the process group"
    position = groups.start(recipe.parallel, seed=recipe.training.seed)
    if world > 1:
        roll_call.begin(groups.own_store(), world_size=world)
    status.claim.agree()
    stop.install()
    plan = RunPlan(scenario=scenario, device=device, layers=of_rank_zero(layers), position=position)
    _prepare_run_dir(plan)
    status.section = "opening the data"
    tokenizer, dataset, sampler, filled = _open_data(plan)
    files = _check_files(plan, dataset)
    status.section = "building the model"
    state = _build_state(plan, dataset=dataset, tokenizer=tokenizer, filled=filled)
    saves = Saves(plan, state, status=status)
    evaluation = Evaluation(
        plan, tokenizer=tokenizer, asked_to_stop=lambda: stop.raised, meanwhile=saves.finish_if_written
    )
    status.section = "loading weights"
    progress = _resume_or_start(plan, state, filled=filled)
    status.section = "checking the data"
    collective_errors.on_every_rank_for_long(files.result)
    sampler.mixture.earlier = progress.earlier_batches
    status.step = progress.step
    with _tracked(plan, progress) as trackers:
        code = _go_on(plan, state, dataset, sampler, progress, evaluation, saves, trackers, stop=stop, status=status)
        status.section = "leaving"
        if trackers is not None:
            trackers.close(code=code)
    roll_call.end()
    groups.stop()
    return code


def _go_on(
    plan: RunPlan,
    state: RunState,
    dataset: Dataset,
    sampler: Sampler,
    progress: Progress,
    evaluation: Evaluation,
    saves: Saves,
    trackers: Trackers | None,
    *,
    stop: StopFlag,
    status: ExitStatus,
) -> int:
    """Evaluate and train from the last step done; returns the exit code."""
    recipe = plan.recipe
    evaluation.start(step=progress.step, trackers=trackers)
    plan.say(f"{f'resuming after step {progress.step}' if progress.step else 'starting'}: {plan.summary}")
    if plan.peak_flops:
        plan.say(MFU_CONVENTION)
    if progress.step >= recipe.training.steps:
        stopped = evaluation.before_first_step(state.model, step=progress.step, status=status)
        return _code_of_stop(plan, stop, step=progress.step) if stopped else 0
    recorders = (StepTimelines(plan, state.model), StepTraces(plan))
    log = _log(plan, progress, trackers)
    with _loader(plan, dataset, sampler, start_step=progress.step) as source:
        # If a signal ends it, the first step is the last of this start.
        evaluation.before_first_step(state.model, step=progress.step, status=status)
        code = _run_steps(
            plan,
            state,
            source,
            progress,
            log=log,
            evaluation=evaluation,
            saves=saves,
            recorders=recorders,
            stop=stop,
            status=status,
        )
    if log is not None and (trouble := log.close()) and code == 0:
        raise StorageError(
            f"all steps are done and saved, but these files lack their end: {trouble}; free or repair the storage"
        )
    return code


def _run_steps(
    plan: RunPlan,
    state: RunState,
    source: StepSource | None,
    progress: Progress,
    *,
    log: MetricsLog | None,
    evaluation: Evaluation,
    saves: Saves,
    recorders: tuple[StepTimelines, StepTraces],
    stop: StopFlag,
    status: ExitStatus,
) -> int:
    """Run all remaining steps; returns the exit code, which says whether a signal stopped the run before its last."""
    recipe, training, optimizer = plan.recipe, plan.recipe.training, plan.recipe.optimizer
    while progress.step < training.steps:
        step = progress.step + 1
        status.step, status.section = step, "loading data"
        for recorder in recorders:
            recorder.begin(step)
        inject_fault("load_data", rank=plan.position.rank, step=step)
        state.model.own_work.begin()
        began = time.perf_counter()
        with state.model.timed("loading"):
            data = next_step(source, progress.step, split_all=recipe.parallel.vision == "split_all")
        rate = learning_rate(optimizer, step=step, steps=training.steps)
        set_learning_rate(state.optimizer, lr=rate, weight_decay=optimizer.weight_decay)
        status.section = "training"
        inject_fault("training", rank=plan.position.rank, step=step)
        result = train_step(state.model, state.optimizer, data, stop_flag=stop.raised, sources=len(recipe.data.mixture))
        progress = progress.after(skipped=result.skipped)
        seconds = time.perf_counter() - began
        slowest = slowest_rank(state.model.own_work)
        if log is not None:
            row = metrics_row(plan, result, modality=data[0].modality, progress=progress, lr=rate, seconds=seconds)
            log.write(row | slowest)
        for recorder in recorders:
            recorder.end(modality=data[0].modality, seconds=seconds)
        if log is not None and step in recipe.run.timeline_steps:
            log.picture(timeline_picture(recipe.run.dir, step), step=step)
        saves.finish_if_written()
        if result.skipped:
            sample_ids = tuple(number for batch in data for number in batch.sample_ids)
            _handle_bad_step(plan, progress, result, sample_ids=sample_ids, saves=saves)
        last = step == training.steps
        # Before the save: a run that resumes from it has this evaluation, or makes it first.
        stopped = result.asked_to_stop or evaluation.after(state.model, step=step, status=status)
        if last or stopped or step % recipe.checkpoint.interval == 0:
            saves.save(progress, must=last or stopped)
        # After the last step, its evaluation may be left to do.
        if stopped and (not last or evaluation.is_due(step)):
            return _code_of_stop(plan, stop, step=step)
    return 0


def _code_of_stop(plan: RunPlan, stop: StopFlag, *, step: int) -> int:
    """Say that a signal stopped the run after a step that is saved; returns the exit code. Collective."""
    interrupted = groups.on_any_rank(stop.interrupted)
    how = "Ctrl-C" if interrupted else "a signal"
    plan.say(f"stopped by {how} after step {step}; saved, start again to go on")
    return EXIT_INTERRUPTED if interrupted else EXIT_PREEMPTED


def _own_cores() -> int:
    """Cores for this rank, shared evenly among the ranks of this machine."""
    cores, ranks = os.cpu_count() or 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Only Linux binds processes to cores.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return max(1, min(allowed, cores // ranks))


def _use_threads(recipe: Recipe, *, world: int) -> None:
    if torch.cuda.is_available():
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    torch.set_num_threads(recipe.training.threads or max(1, (os.cpu_count() or 1) // local))


def _prepare_run_dir(plan: RunPlan) -> None:
    """Keep the resolved recipe with the run; both directories were written to when they were taken."""
    if plan.position.rank:
        return
    path = Path(plan.recipe.run.dir) / "recipe.yaml"
    try:
        free_for_file(path)
        replace_durably(path, dump_recipe(plan.recipe).encode())
    except OSError as error:
        warn(f"{path} cannot be written ({error.strerror}); training goes on without it")


def _open_data(plan: RunPlan) -> tuple[Tokenizer, Dataset, Sampler, bool]:
    """Open tokenizer and data on every rank, and plan the order of samples, which must be the same everywhere.

    What is returned last says whether a checkpoint fills all weights.
    """
    recipe, data = plan.recipe, plan.recipe.data
    tokenizer = open_tokenizer(data.tokenizer)
    dataset = recipe_dataset(recipe, tokenizer=tokenizer, check=False)
    filled = _confirm_start(plan, dataset, tokenizer)
    mixture, steps = recipe_mixture(recipe, dataset.counts), recipe.training.steps
    check_epochs(mixture, data=data, counts=dataset.counts, steps=steps)
    plans = source_plans(mixture, data=data, counts=dataset.counts, steps=steps)
    for line in render(plans, mixture=mixture, steps=steps):
        plan.say(line)
    return tokenizer, dataset, Sampler(dataset.counts, mixture=mixture), filled


def _confirm_start(plan: RunPlan, dataset: Dataset, tokenizer: Tokenizer) -> bool:
    """Refuse a start that would be another run than the checkpoint's, before anything large is read. Collective.

    Returns:
        Whether a checkpoint fills all weights.
    """
    fingerprint = dataset.fingerprint
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    if len(set(found)) > 1:
        raise DataError(f"data.sources: ranks see different data ({sorted(set(found))}); share one file system")
    check = partial(check_start, plan.recipe, fingerprint=fingerprint, tokenizer=tokenizer)
    return collective_errors.on_rank_zero(check)


def _check_files(plan: RunPlan, dataset: Dataset) -> Future[None]:
    """Hash this rank's share of the data in a thread, while the model is built and its weights are loaded."""
    pool = ThreadPoolExecutor(max_workers=1)
    share = (plan.position.rank, plan.position.world_size)
    hashing = pool.submit(dataset.check, share=share, skip_hash=plan.recipe.data.skip_hash)
    pool.shutdown(wait=False)
    return hashing


def _build_state(plan: RunPlan, *, dataset: Dataset, tokenizer: Tokenizer, filled: bool) -> RunState:
    """Model and optimizer; no random weights are drawn where a checkpoint fills all of them."""
    recipe = plan.recipe
    model = build_model_chunks(replace(plan.build, drawn=not filled))
    optimizer = build_optimizer(model, optimizer=recipe.optimizer, bf16=recipe.training.precision == "bf16")
    return RunState(
        recipe,
        model=model,
        optimizer=optimizer,
        fingerprint=dataset.fingerprint,
        tokenizer=tokenizer,
    )


def _resume_or_start(plan: RunPlan, state: RunState, *, filled: bool) -> Progress:
    """Resume, else start from other weights, else (only when told to) from random ones."""
    recipe, resumed = plan.recipe, state.restore()
    if resumed is not None:
        progress, lines = resumed
        for line in lines:
            plan.say(line)
        return progress
    if recipe.checkpoint.init is not None:
        try:
            lines = state.start_from(recipe.checkpoint.init)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.init: {error}") from error
        for line in (*lines, f"weights from {recipe.checkpoint.init}"):
            plan.say(line)
    elif filled:
        raise CheckpointError(
            f"{recipe.checkpoint_dir}: the checkpoint that this run began to start from has gone; restore it, or start "
            "again without it"
        )
    else:
        require_random_allowed(recipe)
    return Progress(step=0, bad_steps=0)


@contextmanager
def _loader(plan: RunPlan, dataset: Dataset, sampler: Sampler, *, start_step: int) -> Iterator[StepSource | None]:
    if not broadcast.is_source():
        yield None
        return
    decoding = plan.decoding
    workers = decoding.workers
    if plan.recipe.data.num_workers == "auto":
        workers = min(workers, _own_cores())
    loader = step_loader(
        plan.recipe,
        dataset,
        sampler,
        position=plan.position,
        workers=workers,
        prefetched=decoding.prefetched,
        start_step=start_step,
    )
    if torch.cuda.is_available():
        prefetcher = StepPrefetcher(loader, steps=plan.recipe.training.steps)
        yield prefetcher
        # Not where a step failed: the thread may wait for a slow disk, and the process is about to leave.
        prefetcher.close()
        loader.close()
        return
    try:
        yield loader
    finally:
        loader.close()


@contextmanager
def _tracked(plan: RunPlan, progress: Progress) -> Iterator[Trackers | None]:
    """Rank 0's services, if the recipe names some. After an error they get the last rows before it."""
    if plan.position.rank or not plan.recipe.run.trackers:
        yield None
        return
    folder = Path(plan.recipe.run.dir)
    rows = {
        "train": (folder / "metrics.jsonl", metrics.scalars),
        "evaluation": (folder / "evaluation.jsonl", evaluation_log.scalars),
    }
    trackers = Trackers(plan.recipe, start_step=progress.step, rows=rows)
    try:
        yield trackers
    except BaseException as error:
        trackers.close(code=getattr(error, "exit_code", 1))
        raise


def _log(plan: RunPlan, progress: Progress, trackers: Trackers | None) -> MetricsLog | None:
    """Rank 0's log."""
    if plan.position.rank:
        return None
    run, steps = plan.recipe.run, plan.recipe.training.steps
    return MetricsLog(run.dir, steps=steps, start_step=progress.step, tensorboard=run.tensorboard, trackers=trackers)


def _handle_bad_step(
    plan: RunPlan, progress: Progress, result: StepResult, *, sample_ids: tuple[int, ...], saves: Saves
) -> None:
    recipe = plan.recipe
    plan.say(f"step {progress.step} skipped: loss {result.loss} or its gradient is not finite; {sample_ids=}")
    if progress.bad_steps >= recipe.training.max_bad_steps:
        # It is from before these steps, and may be the newest checkpoint.
        saves.finish()
        raise NumericsError(
            f"{progress.bad_steps} steps in a row up to {progress.step} had a loss or gradient that is not finite; "
            f"the newest checkpoint in {recipe.checkpoint_dir} is from before them; lower optimizer.lr or check data"
        )
