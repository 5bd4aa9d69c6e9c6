"""One stage of training, read from top to bottom."""

from __future__ import annotations

import os
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
from megavl.config.errors import (
    CheckpointError,
    DataError,
)
from megavl.config.load import dump_recipe
from megavl.config.recipe import Recipe
from megavl.data.dataset import Dataset
from megavl.data.mixture import check_epochs, recipe_mixture, render, source_plans
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.files.durable import replace_durably
from megavl.model.engine_choice import check_engines
from megavl.parallel import groups
from megavl.planner.layouts.check import checked_layout
from megavl.planner.scenario import Scenario
from megavl.train import evaluation_log, metrics
from megavl.train.evaluation import Evaluation
from megavl.train.growing_file import free_for_file, warn
from megavl.train.model_chunks import build_model_chunks
from megavl.train.open_data import recipe_dataset
from megavl.train.optimizer import build_optimizer
from megavl.train.profile.step_traces import require_traceable
from megavl.train.profile.timeline import timeline_picture
from megavl.train.progress import Progress
from megavl.train.run_plan import RunPlan, of_rank_zero, this_device
from megavl.train.saves import Saves
from megavl.train.stage_steps import StageSteps
from megavl.train.start import check_start, require_random_allowed
from megavl.train.state import RunState
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
    with _tracked(plan, progress, fingerprint=dataset.fingerprint) as trackers:
        steps = StageSteps(
            plan=plan,
            state=state,
            dataset=dataset,
            sampler=sampler,
            evaluation=evaluation,
            saves=saves,
            trackers=trackers,
            stop=stop,
            status=status,
        )
        code = steps.go_on(progress)
        status.section = "leaving"
        if trackers is not None:
            trackers.close(code=code)
    roll_call.end()
    groups.stop()
    return code


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
def _tracked(plan: RunPlan, progress: Progress, *, fingerprint: str) -> Iterator[Trackers | None]:
    """Rank 0's services, if the recipe names some. After an error they get the last rows before it."""
    if plan.position.rank or not plan.recipe.run.trackers:
        yield None
        return
    folder = Path(plan.recipe.run.dir)
    rows = {
        "train": (folder / "metrics.jsonl", metrics.scalars),
        "evaluation": (folder / "evaluation.jsonl", evaluation_log.scalars),
    }
    pictures = [(step, timeline_picture(plan.recipe.run.dir, step)) for step in sorted(plan.recipe.run.timeline_steps)]
    trackers = Trackers(plan.recipe, start_step=progress.step, rows=rows, pictures=pictures, fingerprint=fingerprint)
    try:
        yield trackers
    except BaseException as error:
        trackers.close(code=getattr(error, "exit_code", 1))
        raise
