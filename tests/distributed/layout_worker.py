"""One process of the layout comparison: runs every case whose world it belongs to.

Usage: layout_worker.py RANK CASES.json OUT_DIR. Processes are reused from case to case; importing torch and
megatron-core costs more than the cases do.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from megavl.checkpoint.store import CheckpointStore
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig, RecomputeConfig
from megavl.data.batch import Batch
from megavl.model.build import BuildSpec
from megavl.parallel import broadcast, groups
from megavl.planner.layouts.layout import layout_string
from megavl.train import split_encoders
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.optimizer import Optimizer, build_optimizer
from megavl.train.state import restore_state, save_state
from megavl.train.step import StepResult, forward_backward, train_step
from tests.distributed.gather import complete_gradients, gather, gather_counts, vision_state
from tests.distributed.synthetic import SyntheticSteps

SEQ_LENGTH = 160
# Pieces of a rank's share of up to three images.
split_encoders.ENCODED_AT_ONCE = 2
BATCH = 4
# With two replicas 2 against 3 images, later 4 against 1; a step may begin or end with a micro-batch without any.
IMAGE_COUNTS = (2, 0, 1, 2)


def run_case(case: dict[str, Any], *, out: Path) -> None:
    """Losses, norms and gathered gradients of one layout, saved by its rank 0.

    `case["sizes"]` is laid over the tiny preset, whose weights under those sizes are `case["checkpoint"]`.

    A multimodal, a text and a multimodal step are run; then, where `case["saves"]`, the state is saved.
    `case["resume"]` names the case whose saved state, under another layout, is loaded into a fresh model and optimizer
    for three more steps; `case["goes on"]` runs these without a break.
    """
    parallel = _parallel(case)
    position = groups.start(parallel, seed=1)
    config = load_model_config("tiny-hybrid", **case["sizes"])
    model, optimizer = _build(case, parallel=parallel)
    checkpoint = Path(case["checkpoint"])
    store = CheckpointStore(checkpoint.parent)
    model.load_weights(lambda state: store.load(checkpoint, state, strict=False, convert_dtype=True))
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

    model.zero_grad()
    optimizer.zero_grad()
    forward_backward(model, step_data("text", 0))
    complete_gradients(model)
    result: dict[str, Any] = {"text gradients": gather(model, what="grad")}
    first, result["multimodal gradients"] = _step_with_gradients(model, optimizer, step_data("multimodal", 0))
    steps = [first]
    result["text steps"] = [_text_step(model, optimizer, step_data("text", 1), steps)]
    steps.append(train_step(model, optimizer, step_data("multimodal", 2), stop_flag=False))
    if case["saves"]:
        states = CheckpointStore(out / f"state of {case['name']}")
        states.save(3, state=save_state(model, optimizer), content={}, files={})
    if case["resume"]:
        model, optimizer = _build(case, parallel=parallel)
        states, path = CheckpointStore(out), out / f"state of {case['resume']}" / "iter_0000003"
        restore_state(model, optimizer, lambda state: states.load(path, state))
    if case["resume"] or case["goes on"]:
        # The last loss depends on both updates, so on the moments of all weights.
        steps.append(train_step(model, optimizer, step_data("multimodal", 3), stop_flag=False))
        result["text steps"].append(_text_step(model, optimizer, step_data("text", 4), steps))
        steps.append(train_step(model, optimizer, step_data("multimodal", 5), stop_flag=False))
    result["losses"] = [step.loss for step in steps]
    result["norms"] = [step.grad_norm for step in steps]
    result["loss tokens"] = [step.loss_tokens for step in steps]
    if position.rank == 0:
        torch.save(result, out / f"{case['name']}.pt")
    groups.stop()


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
        bucket_size=20_000,
        timeout_s=120,
    )


def _build(case: dict[str, Any], *, parallel: ParallelConfig) -> tuple[ModelChunks, Optimizer]:
    config, bf16 = load_model_config("tiny-hybrid", **case["sizes"]), case.get("bf16", False)
    stages = parallel.pipeline * parallel.virtual_pipeline
    even = (config.llm.num_layers // stages,) * stages
    spec = BuildSpec(
        model=config,
        parallel=parallel,
        recompute=RecomputeConfig(**case.get("recompute", {})),
        layout=layout_string(even if parallel.layout == "auto" else parallel.layout),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        train=tuple(case.get("train", TRAINABLE_PARTS)),
        seed=1,
    )
    model = build_model_chunks(spec)
    return model, build_optimizer(model, optimizer=OptimizerConfig(lr=1e-4), bf16=bf16)


def _step_with_gradients(
    model: ModelChunks, optimizer: Optimizer, data: tuple[Batch, ...]
) -> tuple[StepResult, dict[str, torch.Tensor] | None]:
    """A step, and on rank 0 the gradients that its update is made from."""
    kept: list[Any] = []
    update = optimizer.step

    def keep_and_update(loss: torch.Tensor) -> Any:
        complete_gradients(model)
        kept.append(gather(model, what="grad"))
        return update(loss)

    optimizer.step = keep_and_update
    try:
        result = train_step(model, optimizer, data, stop_flag=False)
    finally:
        optimizer.step = update
    return result, kept[0]


def _text_step(
    model: ModelChunks, optimizer: Optimizer, data: tuple[Batch, ...], steps: list[StepResult]
) -> dict[str, int]:
    """Append a text step; counts over all ranks of what it found and left of the vision side."""
    before = vision_state(model, optimizer)
    steps.append(train_step(model, optimizer, data, stop_flag=False))
    after = vision_state(model, optimizer)
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return gather_counts(
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


def main() -> None:
    """Run all cases in order."""
    rank, cases, out = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for case in cases:
        world = case.get("tp", 1) * case.get("pp", 1) * case.get("dp", 1)
        if rank < world:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(case["port"]))
            run_case(case, out=out)


if __name__ == "__main__":
    main()
