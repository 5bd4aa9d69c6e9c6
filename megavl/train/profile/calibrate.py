"""Measures seconds of every block in real training steps, for the planner.

The model is the recipe's with few decoder layers, on one pipeline stage. All data-parallel replicas run the same steps
at the same time, so ranks that share a machine's cores slow each other down as in training. Times are taken where
tensors pass from block to block: in forward hooks, and in gradient hooks on the same tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megavl.config.recipe import Recipe
from megavl.data.batch import Batch, Modality
from megavl.data.loader import StepLoader
from megavl.model.build import BuildSpec
from megavl.parallel import cpu_runtime, groups
from megavl.parallel.groups import Position
from megavl.planner.hardware.calibration import (
    Calibration,
    Entry,
    KindEntry,
    Seconds,
    VisionEntry,
    model_key,
    recompute_key,
)
from megavl.train.batch_broadcast import StepPrefetcher, StepSource, next_step
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.optimizer import Optimizer, build_optimizer, set_learning_rate
from megavl.train.profile.block_hooks import add_block_hooks
from megavl.train.profile.calibration_steps import MICRO_BATCHES, RandomSteps, step_source
from megavl.train.step import train_step
from megavl.weights.dtypes import DTYPE_OF_PRECISION

LAYERS = 4
"""Decoder layers that are measured; the planner multiplies."""
WARM_UP = 2
"""Steps of each kind that are not counted."""


def calibrate(recipe: Recipe, *, images: int, repeats: int) -> Calibration | None:
    """Measure `recipe` on the processes that a launcher started.

    Args:
        recipe: its micro-batch, tensor and sequence parallelism, recompute and trained groups are used.
        images: images of a random multimodal sequence; used if the recipe's data do not exist.

    Returns:
        A calibration with one entry on rank 0; None elsewhere.
    """
    recipe = _reduced(recipe)
    groups.world_size_from_env()
    position = groups.start(recipe.parallel, seed=recipe.training.seed)
    if not torch.cuda.is_available():
        torch.set_num_threads(recipe.training.threads or 1)
    model, optimizer = _build(recipe)
    kinds: tuple[Modality, ...] = ("text", "multimodal") if recipe.data.multimodal_fraction else ("text",)
    real = all(Path(source.path).is_dir() for source in recipe.data.mixture) and Path(recipe.data.tokenizer).exists()
    probe = _Probe(model, optimizer)
    samples: dict[str, _Samples] = {}
    with tqdm(total=(len(kinds) + 1) * (repeats + WARM_UP), desc="calibrate", disable=position.rank > 0) as bar:
        for kind in kinds:
            source = step_source(recipe, kind, images=images, position=position, real=real)
            samples[kind] = _measure(probe, source, repeats=repeats, bar=bar)
        if "multimodal" in kinds:
            one = RandomSteps(recipe, images=1, position=position)
            samples["one image"] = _measure(probe, one, repeats=repeats, bar=bar)
    entry = _entry(recipe, samples, probe=probe, world=position.world_size, transfer_s=_transfer(recipe, position))
    groups.stop()
    if position.rank:
        return None
    return Calibration(
        device=_device_text(recipe),
        shared_cores=not torch.cuda.is_available(),
        model=model_key(recipe.model),
        seq_length=recipe.data.seq_length,
        precision=recipe.training.precision,
        trained=tuple(recipe.trainable_parts),
        data="recipe" if real else "synthetic",
        versions={name: version(name) for name in ("torch", "megatron-core")},
        entries=(entry,),
    )


@dataclasses.dataclass
class _Samples:
    """Seconds of the counted steps of one kind."""

    blocks: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    loading: list[float] = dataclasses.field(default_factory=list)
    update: list[float] = dataclasses.field(default_factory=list)
    fixed: list[float] = dataclasses.field(default_factory=list)
    images: list[int] = dataclasses.field(default_factory=list)

    def seconds(self, name: str) -> float:
        """Lower quartile of a block's pass: other programs on the machine only add time."""
        return low(self.blocks[name])


class _Probe:
    """Runs steps and notes the time of every border between blocks."""

    def __init__(self, model: ModelChunks, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.borders: list[tuple[str, float]] = []
        (chunk,) = model.chunks
        stage = chunk.module
        self.layers = len(stage.language_model.decoder.layers)
        add_block_hooks(stage, self.reach)
        for name in ("siglip", "sam", "adaptor"):
            part = getattr(stage.vision, name)
            if part is not None:
                part.register_forward_pre_hook(lambda *_, name=name: self.reach(f"{name} begin"))
                part.register_forward_hook(lambda *_, name=name: self.reach(f"{name} end"))
        stage.vision.adaptor.register_forward_pre_hook(self._enter_adaptor)
        stage.vision.register_forward_hook(lambda *_: self.reach("vision"))
        finalize = chunk.config.finalize_model_grads_func

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.reach("pipeline done")
            return finalize(*args, **kwargs)

        chunk.config.finalize_model_grads_func = timed

    def reach(self, name: str) -> None:
        """Note the time when the device is idle."""
        torch.cuda.synchronize()
        self.borders.append((name, time.perf_counter()))

    def run(self, data: Sequence[Batch]) -> tuple[float, float]:
        """Run one step; returns seconds of the optimizer, and of everything else outside the blocks."""
        self.borders.clear()
        step, update = self.optimizer.step, 0.0

        def timed(loss: torch.Tensor) -> Any:
            nonlocal update
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = step(loss)
            torch.cuda.synchronize()
            update = time.perf_counter() - began
            return out

        self.optimizer.step = timed  # type: ignore[method-assign]
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_step(self.model, self.optimizer, data, stop_flag=False)
        torch.cuda.synchronize()
        whole = time.perf_counter() - began
        del self.optimizer.step
        return update, whole - update - (self.borders[-1][1] - self.borders[0][1])

    def blocks(self) -> list[dict[str, float]]:
        """Seconds of each block's passes for every micro-batch of the last step."""
        found = self.borders
        starts = [index for index, (name, _) in enumerate(found) if name == "begin"] + [len(found) - 1]
        return [_differences(found[start : end + 1], layers=self.layers) for start, end in itertools.pairwise(starts)]

    def _enter_adaptor(self, module: torch.nn.Module, args: tuple[torch.Tensor | None, ...]) -> None:
        for features in args:
            if features is not None and features.requires_grad:
                features.register_hook(lambda _: self.reach("adaptor back"))


def low(values: list[float]) -> float:
    """Lower quartile."""
    # The default method would return less than the smaller of two values.
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]


def _differences(borders: list[tuple[str, float]], *, layers: int) -> dict[str, float]:
    """Seconds between the borders that one micro-batch reached, by block and pass."""
    at = dict(borders)
    vision, head = at.get("vision", at["begin"]), at["head"]
    # If nothing trains, there is no backward pass.
    end = borders[-1][1] if "head back" in at else head
    head_back = at.get("head back", head)
    layers_back = at.get("layers back", end)
    # If features need no gradient, the rest of the backward pass belongs to the adaptor.
    adaptor_back = at.get("adaptor back", end)
    out = {
        "towers forward": at.get("adaptor begin", vision) - at["begin"],
        "adaptor forward": vision - at.get("adaptor begin", vision),
        "embedding forward": at["embedded"] - vision,
        "layer forward": (at["layers"] - at["embedded"]) / layers,
        "head forward": head - at["layers"],
        "head backward": head_back - head,
        "layer backward": (layers_back - head_back) / layers,
        "embedding backward": adaptor_back - layers_back,
        "towers backward": end - adaptor_back,
    }
    for name in ("sam", "siglip"):
        if f"{name} end" in at:
            out[f"{name} forward"] = at[f"{name} end"] - at[f"{name} begin"]
    return out


def _reduced(recipe: Recipe) -> Recipe:
    """The recipe on one stage with few layers, without overlap, so that reduction adds to no block's time."""
    llm = dataclasses.replace(recipe.model.llm, num_layers=min(LAYERS, recipe.model.llm.num_layers))
    parallel = dataclasses.replace(
        recipe.parallel,
        pipeline=1,
        virtual_pipeline=1,
        layout="auto",
        vision="recompute",
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, llm=llm), parallel=parallel)


def _build(recipe: Recipe) -> tuple[ModelChunks, Optimizer]:
    model = build_model_chunks(BuildSpec.of(recipe, layout=None, dtype=DTYPE_OF_PRECISION[recipe.training.precision]))
    optimizer = build_optimizer(model, optimizer=recipe.optimizer, bf16=recipe.training.precision == "bf16")
    set_learning_rate(optimizer, lr=1e-9, weight_decay=0.0)
    return model, optimizer


def _measure(probe: _Probe, source: StepSource | None, *, repeats: int, bar: tqdm[Any]) -> _Samples:
    out = _Samples()
    # As in training, the next step's data is prepared while the device computes.
    prefetcher = (
        StepPrefetcher(source, steps=WARM_UP + repeats) if source is not None and torch.cuda.is_available() else None
    )
    for step in range(WARM_UP + repeats):
        began = time.perf_counter()
        data = next_step(prefetcher or source, step)
        loading = time.perf_counter() - began
        update, fixed = probe.run(data)
        bar.update()
        if step < WARM_UP:
            continue
        out.loading.append(loading / MICRO_BATCHES)
        out.update.append(update)
        out.fixed.append(fixed)
        out.images.append(sum(batch.image_count for batch in data))
        for found in probe.blocks()[1:]:
            for name, seconds in found.items():
                out.blocks[name].append(seconds)
    if prefetcher is not None:
        prefetcher.close()
    if isinstance(source, StepLoader):
        source.close()
    return out


def _entry(
    recipe: Recipe, samples: dict[str, _Samples], *, probe: _Probe, world: int, transfer_s: float | None
) -> Entry:
    text, multimodal, one = samples["text"], samples.get("multimodal"), samples.get("one image")
    (chunk,) = probe.model.chunks
    trained = sum(weight.numel() for weight in chunk.module.parameters() if weight.requires_grad)
    replicas = world // recipe.parallel.tensor
    active = multimodal or text
    return Entry(
        tensor=recipe.parallel.tensor,
        processes=world,
        sequence_parallel=recipe.parallel.sequence_parallel,
        micro_batch_size=recipe.training.micro_batch_size,
        recompute=recompute_key(recipe),
        text=_kind(text),
        multimodal=_kind(multimodal, embedding=text) if multimodal else None,
        images=statistics.mean(multimodal.images) / MICRO_BATCHES if multimodal else 0.0,
        vision=_vision(multimodal, text) if multimodal else None,
        one_image=_vision(one, text) if one else None,
        towers={
            name: multimodal.seconds(f"{name} forward")
            for name in ("sam", "siglip")
            if multimodal and f"{name} forward" in multimodal.blocks
        },
        update_s_per_parameter=low(active.update) * replicas / max(1, trained),
        step_s=low(text.fixed),
        transfer_s=transfer_s,
    )


def _kind(found: _Samples, *, embedding: _Samples | None = None) -> KindEntry:
    """Blocks of one modality; `embedding` measures the embedding, whose backward pass images would hide."""
    of_embedding = embedding or found
    return KindEntry(
        embedding=_seconds(of_embedding, "embedding"),
        layer=_seconds(found, "layer"),
        head=_seconds(found, "head"),
        loading=low(found.loading),
    )


def _vision(found: _Samples, text: _Samples) -> VisionEntry:
    """Encoders and adaptor; the adaptor includes writing its rows into the embeddings."""
    rows = found.seconds("embedding forward") - text.seconds("embedding forward")
    back = found.seconds("embedding backward") - text.seconds("embedding backward")
    return VisionEntry(
        towers=_seconds(found, "towers"),
        adaptor=Seconds(forward=found.seconds("adaptor forward") + max(0.0, rows), backward=max(0.0, back)),
    )


def _seconds(found: _Samples, name: str) -> Seconds:
    return Seconds(forward=found.seconds(f"{name} forward"), backward=found.seconds(f"{name} backward"))


def _transfer(recipe: Recipe, position: Position) -> float | None:
    """Seconds to send one micro-batch's hidden states from rank 0 to rank 1: half a round trip."""
    if position.world_size == 1:
        return None
    tokens = recipe.training.micro_batch_size * recipe.data.seq_length
    shape = (tokens, 1, recipe.model.llm.hidden_size)
    tensor = torch.zeros(shape, dtype=DTYPE_OF_PRECISION[recipe.training.precision], device=cpu_runtime.device())
    times = []
    for _ in range(20):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        if position.rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif position.rank == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / 2)
    return low(times[5:])


def _device_text(recipe: Recipe) -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = recipe.training.threads or 1
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} threads a rank"
