"""One stage of training, read from top to bottom."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavl.config.errors import EXIT_PREEMPTED, CheckpointError, DataError, NumericsError, StorageError
from megavl.config.load import dump_recipe
from megavl.config.recipe import Recipe
from megavl.data.dataset import Dataset
from megavl.data.mixture import check_epochs, recipe_mixture, render, source_plans
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.parallel import broadcast, cpu_runtime, groups
from megavl.parallel.groups import Position
from megavl.planner.cost.flops import MFU_CONVENTION, mfu, step_flops
from megavl.planner.hardware.devices import Device, find_device, known_device
from megavl.planner.layouts.check import check_layout
from megavl.planner.layouts.layout import layout_string, resolve_layout
from megavl.train.batch_broadcast import StepPrefetcher, StepSource, next_step
from megavl.train.metrics import MetricsLog
from megavl.train.model_chunks import build_model_chunks
from megavl.train.open_data import recipe_dataset, step_loader
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.profile.step_profiler import StepProfiler
from megavl.train.profile.timeline import write_timeline
from megavl.train.schedule import learning_rate
from megavl.train.state import Progress, RunState
from megavl.train.step import StepResult, train_step
from megavl.train.supervise.exit_status import ExitStatus
from megavl.train.supervise.signals import StopFlag

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(recipe: Recipe, *, status: ExitStatus) -> int:
    """Run a stage to its end, to a pre-emption, or to an error.

    Args:
        recipe: checked recipe.
        status: told the step and section, for messages about lost peers.

    Returns:
        0 when all steps are done, 75 when a signal asked to stop and the state is saved.
    """
    world = groups.world_size_from_env()
    groups.prepare_libraries(recipe.parallel)
    check_layout(recipe, devices=world, device=_known_device())
    _use_threads(recipe, world=world)
    status.section = "joining the process group"
    position = groups.start(recipe.parallel, seed=recipe.training.seed)
    stop = StopFlag()
    stop.install()
    _prepare_run_dir(recipe, position=position)
    status.section = "opening the data"
    tokenizer, dataset, sampler = _open_data(recipe, position=position)
    status.section = "building the model"
    layout = _shared_layout(recipe)
    state = _build_state(recipe, dataset=dataset, tokenizer=tokenizer, layout=layout)
    status.section = "loading weights"
    progress = _start(recipe, state, position=position)
    status.step = progress.step
    _say(position, _opening_line(recipe, layout, position=position, progress=progress))
    if _peak_flops(recipe):
        _say(position, MFU_CONVENTION)
    if progress.step >= recipe.training.steps:
        groups.stop()
        return 0
    with _loader(recipe, dataset, sampler, position=position, start_step=progress.step) as source:
        stopped = _run_steps(
            recipe, state, source, progress, layout=layout, position=position, stop=stop, status=status
        )
    groups.stop()
    return EXIT_PREEMPTED if stopped else 0


def _run_steps(
    recipe: Recipe,
    state: RunState,
    source: StepSource | None,
    progress: Progress,
    *,
    layout: tuple[int, ...],
    position: Position,
    stop: StopFlag,
    status: ExitStatus,
) -> bool:
    training, optimizer = recipe.training, recipe.optimizer
    with _log(recipe, progress, position=position) as log:
        while progress.step < training.steps:
            step = progress.step + 1
            status.step, status.section = step, "loading data"
            recorder = StepProfiler(state.model, position=position) if step in recipe.run.timeline_steps else None
            began = time.perf_counter()
            with state.model.timed("loading"):
                data = next_step(source, progress.step, split_all=recipe.parallel.vision == "split_all")
            rate = learning_rate(optimizer, step=step, steps=training.steps)
            set_learning_rate(state.optimizer, lr=rate, weight_decay=optimizer.weight_decay)
            status.section = "training"
            result = train_step(state.model, state.optimizer, data, stop_flag=stop.raised)
            progress = Progress(step=step, bad_steps=progress.bad_steps + 1 if result.skipped else 0)
            seconds = time.perf_counter() - began
            if log is not None:
                log.write(
                    _row(recipe, result, modality=data[0].modality, step=step, lr=rate, seconds=seconds, at=position)
                )
            if recorder is not None:
                line = write_timeline(
                    recorder.stop(), recipe=recipe, layout=layout, step=step, modality=data[0].modality, seconds=seconds
                )
                _say(position, line)
            if result.skipped:
                sample_ids = tuple(number for batch in data for number in batch.sample_ids)
                _handle_bad_step(recipe, progress, result, sample_ids=sample_ids, position=position)
            last = step == training.steps
            if last or result.asked_to_stop or step % recipe.checkpoint.interval == 0:
                status.section = "saving"
                _save(state, progress, position=position, must=last or result.asked_to_stop)
            if result.asked_to_stop and not last:
                _say(position, f"stopped by a signal after step {step}; saved, start again to go on")
                return True
    return False


def _use_threads(recipe: Recipe, *, world: int) -> None:
    if torch.cuda.is_available():
        return
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    torch.set_num_threads(recipe.training.threads or max(1, (os.cpu_count() or 1) // local))


def _prepare_run_dir(recipe: Recipe, *, position: Position) -> None:
    problem = [""]
    if position.rank == 0:
        try:
            Path(recipe.run.dir).mkdir(parents=True, exist_ok=True)
            Path(recipe.checkpoint_dir).mkdir(parents=True, exist_ok=True)
            (Path(recipe.run.dir) / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        except OSError as error:
            problem[0] = f"run.dir: cannot write to {recipe.run.dir}: {error}; choose a writable directory"
    dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise StorageError(problem[0])


def _open_data(recipe: Recipe, *, position: Position) -> tuple[Tokenizer, Dataset, Sampler]:
    """Open tokenizer and data on every rank, and plan the order of samples, which must be the same everywhere."""
    data = recipe.data
    tokenizer = open_tokenizer(data.tokenizer)
    share = (dist.get_rank(), dist.get_world_size())
    dataset = recipe_dataset(recipe, tokenizer=tokenizer, skip_hash=data.skip_hash, share=share)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, dataset.fingerprint)
    if len(set(found)) > 1:
        raise DataError(f"data.sources: ranks see different data ({sorted(set(found))}); share one file system")
    mixture, steps = recipe_mixture(recipe, dataset.counts), recipe.training.steps
    check_epochs(mixture, data=data, counts=dataset.counts, steps=steps)
    plans = source_plans(mixture, data=data, counts=dataset.counts, steps=steps)
    _say(position, "\n".join(render(plans, mixture=mixture, steps=steps)))
    return tokenizer, dataset, Sampler(dataset.counts, mixture=mixture)


def _build_state(recipe: Recipe, *, dataset: Dataset, tokenizer: Tokenizer, layout: tuple[int, ...]) -> RunState:
    training = recipe.training
    model = build_model_chunks(
        recipe.model,
        parallel=recipe.parallel,
        recompute=recipe.recompute,
        layout=layout_string(layout),
        dtype=_DTYPES[training.precision],
        train=recipe.trainable_parts,
        seed=training.seed,
    )
    optimizer = build_optimizer(model, optimizer=recipe.optimizer, bf16=training.precision == "bf16")
    return RunState(
        recipe,
        model=model,
        optimizer=optimizer,
        fingerprint=dataset.fingerprint,
        tokenizer_files={path.name: path for path in tokenizer.files},
    )


def _start(recipe: Recipe, state: RunState, *, position: Position) -> Progress:
    """Resume, else start from other weights, else (only when told to) from random ones."""
    progress = state.restore()
    if progress is not None:
        return progress
    if recipe.checkpoint.init is not None:
        state.start_from(recipe.checkpoint.init)
        _say(position, f"weights from {recipe.checkpoint.init}")
    elif not recipe.checkpoint.allow_random_init:
        raise CheckpointError(
            f"no checkpoint in {recipe.checkpoint_dir} and no checkpoint.init; name the weights to start from, or set "
            "checkpoint.allow_random_init=true to train from random ones"
        )
    return Progress(step=0, bad_steps=0)


@contextmanager
def _loader(
    recipe: Recipe, dataset: Dataset, sampler: Sampler, *, position: Position, start_step: int
) -> Iterator[StepSource | None]:
    if not broadcast.is_source():
        yield None
        return
    loader = step_loader(recipe, dataset, sampler, position=position, start_step=start_step)
    if torch.cuda.is_available():
        ahead = StepPrefetcher(loader, steps=recipe.training.steps)
        yield ahead
        # Not where a step failed: the thread may wait for a slow disk, and the process is about to leave.
        ahead.close()
        loader.close()
        return
    try:
        yield loader
    finally:
        loader.close()


@contextmanager
def _log(recipe: Recipe, progress: Progress, *, position: Position) -> Iterator[MetricsLog | None]:
    if position.rank:
        yield None
        return
    log = MetricsLog(
        recipe.run.dir,
        steps=recipe.training.steps,
        start_step=progress.step,
        tensorboard=recipe.run.tensorboard,
    )
    try:
        yield log
    finally:
        log.close()


def _row(
    recipe: Recipe, result: StepResult, *, modality: str, step: int, lr: float, seconds: float, at: Position
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    batch, length = recipe.training.global_batch_size, recipe.data.seq_length
    peak = _peak_flops(recipe)
    flops = step_flops(
        recipe.model,
        seq_length=length,
        sequences=batch,
        images=result.images,
        trainable_parts=recipe.trainable_parts,
    )
    return {
        "step": step,
        "modality": modality,
        "loss": result.loss if math.isfinite(result.loss) else None,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens": batch * length,
        "loss_tokens": result.loss_tokens,
        "images": result.images,
        "bad_samples": result.bad_samples,
        "step_time_s": round(seconds, 6),
        "tokens_per_s": round(batch * length / seconds, 3),
        "mfu": mfu(flops, seconds=seconds, devices=at.world_size, peak_flops=peak) if peak else None,
        "skipped": result.skipped,
        "consumed_samples": step * batch,
    }


def _known_device() -> Device | None:
    """This device's row in the planner's table, with the memory that it really has; None where it has no row."""
    if not torch.cuda.is_available():
        return find_device("cpu")
    row = known_device(torch.cuda.get_device_name())
    if row is None:
        return None
    return dataclasses.replace(row, memory_bytes=torch.cuda.get_device_properties().total_memory)


def _peak_flops(recipe: Recipe) -> float | None:
    """Dense peak of this device, where the planner knows one; MFU is left out elsewhere."""
    device = _known_device()
    return device.peak_flops.get(recipe.training.precision) if device else None


def _shared_layout(recipe: Recipe) -> tuple[int, ...]:
    """Decoder layers per stage on these devices; what `megavl plan` shows for the same `--devices` and `--device`.

    Rank 0 decides: memory of equal devices differs by a few MiB, which may move a layer.
    """
    found: list[tuple[int, ...]] = [()]
    if dist.get_rank() == 0:
        found[0] = resolve_layout(recipe, devices=dist.get_world_size(), device=_known_device())
    dist.broadcast_object_list(found, src=0, device=cpu_runtime.device())
    return found[0]


def _handle_bad_step(
    recipe: Recipe, progress: Progress, result: StepResult, *, sample_ids: tuple[int, ...], position: Position
) -> None:
    _say(position, f"step {progress.step} skipped: loss {result.loss} or its gradient is not finite; {sample_ids=}")
    if progress.bad_steps >= recipe.training.max_bad_steps:
        raise NumericsError(
            f"{progress.bad_steps} steps in a row up to {progress.step} had a loss or gradient that is not finite; "
            f"the newest checkpoint in {recipe.checkpoint_dir} is from before them; lower optimizer.lr or check data"
        )


def _save(state: RunState, progress: Progress, *, position: Position, must: bool) -> None:
    """Save; a failing storage is survived once in a row unless this save is the run's last chance."""
    try:
        path = state.save(progress)
    except StorageError as error:
        state.failed_saves += 1
        if must or state.failed_saves > 1:
            raise
        _say(position, f"warning: {error}; training goes on without this checkpoint")
        return
    state.failed_saves = 0
    _say(position, f"saved {path}")


def _opening_line(recipe: Recipe, layout: tuple[int, ...], *, position: Position, progress: Progress) -> str:
    parallel = recipe.parallel
    split = "+".join(str(count) for count in layout)
    verb = f"resuming after step {progress.step}" if progress.step else "starting"
    return (
        f"{verb}: {recipe.model.preset}, stage {recipe.training.stage}, tp {parallel.tensor} x pp {parallel.pipeline} "
        f"(layers {split}) x dp {position.dp_size}, {recipe.training.precision}, "
        f"training {', '.join(recipe.trainable_parts)}"
    )


def _say(position: Position, text: str) -> None:
    if position.rank == 0:
        print(text, flush=True)
