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
from megavl.parallel import broadcast, groups
from megavl.planner.layout import layout_string
from megavl.train.feed import StepData, next_step
from megavl.train.optimizer import build_optimizer
from megavl.train.rank_model import RankModel, build_rank_model
from megavl.train.state import restore_state, save_state
from megavl.train.step import forward_backward, train_step
from tests.distributed.gather import complete_gradients, gather
from tests.distributed.synthetic import SyntheticSteps

SEQ_LENGTH = 160
BATCH = 4


def run_case(case: dict[str, Any], *, out: Path) -> None:
    """Losses, norms and gathered gradients of one layout, saved by its rank 0.

    `case["model"]` is laid over the tiny preset, whose weights under those sizes are `case["checkpoint"]`.

    Three steps follow, then the state is saved. `case["resume"]` names the case whose saved state, under another
    layout, is loaded into a fresh model and optimizer for two more steps.
    """
    parallel = ParallelConfig(
        tensor=case["tp"],
        pipeline=case["pp"],
        virtual_pipeline=case.get("vpp", 1),
        sequence_parallel=case.get("sp", False),
        layout=tuple(case.get("layout", "auto")) if "layout" in case else "auto",
        vision=case.get("vision", "recompute"),
        # Small buckets, so that every overlap path is taken and buckets end in padding.
        bucket_size=case.get("bucket_size", 20_000),
        timeout_s=120,
    )
    position = groups.start(parallel, seed=1)
    config = load_model_config("tiny-hybrid", **case["model"])
    model, optimizer = _build(case, parallel=parallel)
    checkpoint = Path(case["checkpoint"])
    store = CheckpointStore(checkpoint.parent)
    model.load_weights(lambda state: store.load(checkpoint, state, strict=False, convert_dtype=True))
    optimizer.reload_model_params()

    def source(modality: str) -> SyntheticSteps | None:
        if not broadcast.is_source():
            return None
        return SyntheticSteps(
            config,
            modality=modality,
            seq_length=SEQ_LENGTH,
            global_batch_size=BATCH,
            micro_batch_size=case.get("mbs", 1),
            dp_rank=position.dp_rank,
            dp_size=position.dp_size,
        )

    def step_data(modality: str, step: int) -> StepData:
        return next_step(source(modality), step, split_all=parallel.vision == "split_all")

    result: dict[str, Any] = {}
    for modality in ("text", "multimodal"):
        model.zero_grad()
        optimizer.zero_grad()
        forward_backward(model, step_data(modality, 0))
        complete_gradients(model)
        result[f"{modality} gradients"] = gather(model, what="grad")
    steps = [train_step(model, optimizer, step_data("multimodal", 0), stop_flag=False)]
    before = _vision(model)
    steps.append(train_step(model, optimizer, step_data("text", 1), stop_flag=False))
    result["vision untouched"] = all(torch.equal(a, b) for a, b in zip(before, _vision(model)))
    steps.append(train_step(model, optimizer, step_data("multimodal", 2), stop_flag=False))
    result["losses"] = [step.loss for step in steps]
    result["norms"] = [step.grad_norm for step in steps]
    result["loss tokens"] = [step.loss_tokens for step in steps]
    states = CheckpointStore(out / f"state of {case['name']}")
    states.save(3, state=save_state(model, optimizer), content={}, files={})
    if "resume" in case:
        model, optimizer = _build(case, parallel=parallel)
        path = out / f"state of {case['resume']}" / "iter_0000003"
        restore_state(model, optimizer, lambda state: states.load(path, state))
    more = [train_step(model, optimizer, step_data(m, 3), stop_flag=False) for m in ("text", "multimodal")]
    result["resumed"] = [value for step in more for value in (step.loss, step.grad_norm)]
    if position.rank == 0:
        torch.save(result, out / f"{case['name']}.pt")
    groups.stop()


def _build(case: dict[str, Any], *, parallel: ParallelConfig) -> tuple[Any, Any]:
    config, bf16 = load_model_config("tiny-hybrid", **case["model"]), case.get("bf16", False)
    layout = case.get("layout") or _even(config.llm.num_layers, case["pp"] * case.get("vpp", 1))
    model = build_rank_model(
        config,
        parallel=parallel,
        recompute=RecomputeConfig(**case.get("recompute", {})),
        layout=layout_string(tuple(layout)),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        train=tuple(case.get("train", TRAINABLE_PARTS)),
        seed=1,
    )
    return model, build_optimizer(model, optimizer=OptimizerConfig(lr=1e-4), bf16=bf16)


def _vision(model: RankModel) -> list[torch.Tensor]:
    model.gather_weights()
    named = [pair for chunk in model.chunks for pair in chunk.module.named_parameters()]
    return [weight.detach().clone() for name, weight in named if name.startswith("vision.")]


def _even(layers: int, stages: int) -> list[int]:
    return [layers // stages] * stages


def main() -> None:
    """Run all cases in order."""
    rank, cases, out = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for case in cases:
        world = case["tp"] * case["pp"] * case["dp"]
        if rank < world:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(case["port"]))
            run_case(case, out=out)


if __name__ == "__main__":
    main()
