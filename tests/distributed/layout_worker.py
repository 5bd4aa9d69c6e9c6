"""One process of the layout comparison: runs every case whose world it belongs to.

Usage: layout_worker.py RANK CASES.json OUT_DIR. Processes are reused from case to case; importing torch and
megatron-core costs more than the cases do.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.store import CheckpointStore
from megavl.checkpoint.stored_keys import is_stacked, stored_key
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig, RecomputeConfig
from megavl.data.batch import Batch
from megavl.generate.score import score
from megavl.generate.score_rows import EncodedOption, ScoreRequest
from megavl.model.build import BuildSpec
from megavl.parallel import broadcast, groups
from megavl.planner.layouts.layout import layout_string
from megavl.train import split_encoders
from megavl.train.batch_broadcast import next_step
from megavl.train.evaluation import spread_images
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.optimizer import Optimizer, build_optimizer
from megavl.train.state import restore_state, save_state
from megavl.train.step import StepResult, train_step
from tests.distributed.faults import fault
from tests.distributed.float64 import fp32_is_fp64, keep_float64
from tests.distributed.gather import complete_gradients, gather, gather_counts, scatter, vision_state
from tests.distributed.synthetic import SOURCES, SyntheticSteps
from tests.tiny_run import free_port

SEQ_LENGTH = 128
# Pieces of a rank's share of up to three images.
split_encoders.ENCODED_AT_ONCE = 2
BATCH = 4
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# With two replicas 2 against 3 images, later 4 against 1; a step may begin or end with a micro-batch without any.
IMAGE_COUNTS = (2, 0, 1, 2)


def run_case(case: dict[str, Any], *, out: Path) -> None:
    """Losses, norms and gathered gradients of one layout, saved by its rank 0.

    `case["sizes"]` is laid over the tiny preset.

    A multimodal, a text and a multimodal step are run, or with `case["one step"]` only the first. It may start from
    weights moved by the seed `case["moved"]`, or run under a `case["fault"]`. Then, where `case["saves"]`, the state is
    saved. `case["resume"]` names the case whose saved state, under another layout, is loaded into a fresh model and
    optimizer for three more steps; `case["goes on"]` runs these without a break. `case["scores"]` scores options in
    between, which must not change the later steps.
    """
    parallel, dtype = _parallel(case), DTYPES[case["precision"]]
    position = groups.start(parallel, seed=1)
    config = load_model_config("tiny-hybrid", **case["sizes"])
    model, optimizer = _build(case, parallel=parallel)
    scatter(model, _start_weights(json.dumps(case["sizes"])))
    if "moved" in case:
        _move_weights(model, seed=case["moved"])
    optimizer.reload_model_params()

    def step_data(modality: str, step: int) -> tuple[Batch, ...]:
        source = SyntheticSteps(
            config,
            modality=modality,
            seq_length=SEQ_LENGTH,
            global_batch_size=BATCH,
            micro_batch_size=case.get("mbs", 1),
            dp_rank=position.dp_rank,
            dp_size=position.dp_size,
            image_counts=IMAGE_COUNTS,
        )
        return next_step(source if broadcast.is_source() else None, step, split_all=parallel.vision == "split_all")

    result: dict[str, Any] = {"text steps": []}
    steps: list[StepResult] = []

    def run(modality: str, *, keep_gradients: bool = False) -> None:
        data = step_data(modality, len(steps))
        watched = _vision_watched(model, optimizer) if modality == "text" else contextlib.nullcontext()
        kept = _gradients_kept(model, optimizer, keep=keep_gradients, replicas_agree="fault" not in case)
        with watched as counts, kept as gradients:
            steps.append(train_step(model, optimizer, data, stop_flag=False, sources=SOURCES))
        if keep_gradients:
            (result[f"{modality} gradients"],) = gradients
        if modality == "text":
            result["text steps"].append(counts)

    with fault(case.get("fault")):
        run("multimodal", keep_gradients=True)
    if not case["one step"]:
        run("text", keep_gradients=True)
        run("multimodal")
    if case["scores"]:
        result["scores"] = _scores(model, config)
    if case["saves"]:
        with fp32_is_fp64(dtype):
            state = save_state(model, optimizer)
        CheckpointStore(out / f"state of {case['name']}").save(3, state=state, content={}, files={})
    if case["resume"]:
        model, optimizer = _build(case, parallel=parallel)
        states, path = CheckpointStore(out), out / f"state of {case['resume']}" / "iter_0000003"
        with fp32_is_fp64(dtype):
            restore_state(model, optimizer, lambda state: states.load(path, state))
    if case["resume"] or case["goes on"]:
        # Text first: what it must leave alone was just loaded. The last loss depends on both updates, so on the moments
        # of all weights.
        for modality in ("text", "multimodal", "multimodal"):
            run(modality)
    result["losses"] = [step.loss for step in steps]
    result["losses by source"] = [step.loss_by_source for step in steps]
    result["norms"] = [step.grad_norm for step in steps]
    result["loss tokens"] = [step.loss_tokens for step in steps]
    if position.rank == 0:
        # Whoever waits counts the files, so a file is there at once.
        torch.save(result, out / "unfinished")
        (out / "unfinished").rename(out / f"{case['name']}.pt")
    groups.stop()
    if position.rank == 0 and case["resume"]:
        # No other case resumes it.
        shutil.rmtree(out / f"state of {case['resume']}")


class _Stored:
    """An image file in memory."""

    def __init__(self, picture: Image.Image) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        self.read = buffer.getvalue


def _scores(model: ModelChunks, config: ModelConfig) -> list[float]:
    """Log-probabilities of options of one and of several tokens, over several passes.

    Prompts have no, one or two of three images, which they share.
    """
    rng = np.random.default_rng(1)
    low, high = config.image_token_id + 1, config.llm.vocab_size
    files = [_Stored(Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))) for _ in range(3)]
    requests = []
    for number in range(7):
        pictures = [files[(number + at) % 3] for at in range(number % 3)]
        prompt = [*[config.image_token_id] * config.image_tokens * len(pictures), *rng.integers(low, high, 9).tolist()]
        options = [(*prompt, *rng.integers(low, high, 1 + 2 * (number % 2)).tolist()) for _ in range(3)]
        encoded = tuple(EncodedOption(ids=ids, start=len(prompt)) for ids in options)
        requests.append(ScoreRequest(options=encoded, images=tuple(pictures)))
    model.gather_weights()
    found = score(
        [chunk.module for chunk in model.chunks],
        requests,
        config=config,
        row_tokens=100,
        spread=spread_images(model),
    )
    return [one.log_prob for of_request in found for one in of_request]


@functools.cache
def _start_weights(sizes: str) -> dict[str, torch.Tensor]:
    """Whole random weights under the names of a checkpoint."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, weight in random_weights(load_model_config("tiny-hybrid", **json.loads(sizes))):
        layers.setdefault(stored_key(name).key, []).append(weight)
    return {key: torch.stack(found) if is_stacked(key) else found[0] for key, found in layers.items()}


def _parallel(case: dict[str, Any]) -> ParallelConfig:
    overlap, distributed_optimizer = case.get("overlap", True), case.get("distributed_optimizer", True)
    return ParallelConfig(
        tensor=case.get("tp", 1),
        pipeline=case.get("pp", 1),
        virtual_pipeline=case.get("vpp", 1),
        sequence_parallel=case.get("sp", False),
        layout=tuple(case["layout"]) if "layout" in case else "auto",
        vision=case.get("vision", "recompute"),
        deterministic=case.get("deterministic", False),
        distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
        # Small buckets, so that every overlap path is taken and buckets end in padding.
        bucket_size=60_000,
        # Whoever started this process ends it sooner.
        timeout_s=3600,
    )


def _build(case: dict[str, Any], *, parallel: ParallelConfig) -> tuple[ModelChunks, Optimizer]:
    config, dtype = load_model_config("tiny-hybrid", **case["sizes"]), DTYPES[case["precision"]]
    stages = parallel.pipeline * parallel.virtual_pipeline
    even = (config.llm.num_layers // stages,) * stages
    spec = BuildSpec(
        model=config,
        parallel=parallel,
        recompute=RecomputeConfig(**case.get("recompute", {})),
        layout=layout_string(even if parallel.layout == "auto" else parallel.layout),
        dtype=dtype,
        train=tuple(case.get("train", TRAINABLE_PARTS)),
        seed=1,
        compile=case.get("compile", "none"),
    )
    model = build_model_chunks(spec)
    with fp32_is_fp64(dtype):
        optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-4), bf16=dtype == torch.bfloat16)
    if dtype == torch.float64:
        keep_float64(optimizer)
    return model, optimizer


@torch.no_grad()
def _move_weights(model: ModelChunks, *, seed: int) -> None:
    """Move every number of every weight up or down by one rounding of fp32."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.chunks[0].module.parameters():
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        weight.mul_(1 + torch.finfo(torch.float32).eps * signs)


@contextlib.contextmanager
def _gradients_kept(
    model: ModelChunks, optimizer: Optimizer, *, keep: bool, replicas_agree: bool
) -> Iterator[list[dict[str, torch.Tensor] | None]]:
    """On rank 0 the gradients that each update inside is made from, if they are to be kept."""
    kept: list[Any] = []
    update = optimizer.step

    def keep_and_update(loss: torch.Tensor) -> Any:
        complete_gradients(model)
        kept.append(gather(model, what="grad", replicas_agree=replicas_agree))
        return update(loss)

    if keep:
        optimizer.step = keep_and_update
    try:
        yield kept
    finally:
        optimizer.step = update


@contextlib.contextmanager
def _vision_watched(model: ModelChunks, optimizer: Optimizer) -> Iterator[dict[str, int]]:
    """Counts over all ranks, at the end, of what a text step found and left of the vision side."""
    counts: dict[str, int] = {}
    before = vision_state(model, optimizer)
    yield counts
    after = vision_state(model, optimizer)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    counts |= gather_counts(
        {
            "changed": len(changed),
            **{
                f"{part} {key}": sum(
                    bool(value.any()) for name, value in after.items() if part in name and name.endswith(f" {key}")
                )
                for part in ("vision.adaptor.", "vision.siglip.")
                for key in ("weight", "exp_avg", "exp_avg_sq", "step")
            },
        }
    )


def _port(rank: int, *, file: Path) -> str:
    """Where the ranks of a case meet; chosen when it begins, since a port does not stay free for long."""
    if rank == 0:
        unfinished = file.with_name("unfinished port")
        unfinished.write_text(str(free_port()))
        unfinished.rename(file)
    while not file.exists():
        time.sleep(0.01)
    return file.read_text()


def main() -> None:
    """Run all cases in order."""
    rank, cases, out = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    # What was imported stays; megatron-core collects garbage at every save and load.
    gc.freeze()
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for case in cases:
        world = case.get("tp", 1) * case.get("pp", 1) * case.get("dp", 1)
        if rank < world:
            port = _port(rank, file=out / f"{case['name']}.port")
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=port)
            run_case(case, out=out)
            # Models in reference cycles keep their process groups, with the threads of these.
            gc.collect()


if __name__ == "__main__":
    main()
