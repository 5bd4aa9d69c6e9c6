"""One process of two replicas: the gradients of rank 1 become NaN, and no rank may change a bit.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.bad_rank 0|1 0|1

The arguments switch bf16 and the distributed optimizer. Every rank prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig
from megavl.model.build import BuildSpec
from megavl.parallel import groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.step import train_step
from tests.distributed.gather import own_state
from tests.distributed.synthetic import SyntheticSteps

CONFIG = load_model_config("tiny-siglip")


def main() -> int:
    """A good step, a bad one, another good one."""
    bf16, distributed = (word == "1" for word in sys.argv[1:])
    parallel = ParallelConfig(distributed_optimizer=distributed, overlap_param_gather=distributed)
    position = groups.start(parallel, seed=1)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = build_model_chunks(BuildSpec(model=CONFIG, parallel=parallel, dtype=dtype, train=TRAINABLE_PARTS, seed=1))
    optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-3), bf16=bf16)
    set_learning_rate(optimizer, lr=1e-3, weight_decay=0.1)
    source = SyntheticSteps(
        CONFIG,
        modality="multimodal",
        seq_length=128,
        global_batch_size=2,
        micro_batch_size=1,
        dp_rank=position.dp_rank,
        dp_size=position.dp_size,
    )
    steps = [train_step(model, optimizer, next_step(source, 0), stop_flag=False)]
    before = own_state(model, optimizer)
    if position.rank == 1:
        weight = next(model.chunks[0].module.language_model.decoder.layers.parameters())
        handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    steps.append(train_step(model, optimizer, next_step(source, 1), stop_flag=False))
    after = own_state(model, optimizer)
    if position.rank == 1:
        handle.remove()
    steps.append(train_step(model, optimizer, next_step(source, 2), stop_flag=False))
    later = own_state(model, optimizer)
    row = {
        "rank": position.rank,
        "skipped": [step.skipped for step in steps],
        "losses": [step.loss for step in steps],
        "tensors": len(before),
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "moved later": sum(not torch.equal(after[name], later[name]) for name in after),
    }
    # One write: lines of two processes would mix.
    os.write(1, f"{json.dumps(row)}\n".encode())
    groups.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
