"""One of two processes that save a trained state and load it under one layout after another.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.reshard FOLDER

Two steps under the first layout give `FOLDER/0`. Each further layout loads the state before it and saves it unchanged.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from megavl.checkpoint.store import CheckpointStore
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig
from megavl.model.build import BuildSpec
from megavl.parallel import broadcast, groups
from megavl.planner.layouts.layout import layout_string
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.state import restore_state, save_state
from megavl.train.step import train_step
from tests.distributed.synthetic import SyntheticSteps

CONFIG = load_model_config("tiny-siglip", llm={"hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": 256})
LAYOUTS = (
    ParallelConfig(tensor=2, sequence_parallel=True),
    ParallelConfig(pipeline=2, layout=(1, 3)),
    ParallelConfig(),
    ParallelConfig(distributed_optimizer=False, overlap_param_gather=False),
)


def main() -> int:
    """Save under every layout, in this process; each has groups, and so a port, of its own."""
    folder, port = Path(sys.argv[1]), int(os.environ["MASTER_PORT"])
    # torchrun's own store, which the ranks would else meet at, keeps what the groups before have written.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    torch.set_num_threads(1)
    for number, parallel in enumerate(LAYOUTS):
        os.environ["MASTER_PORT"] = str(port + 1 + number)
        position = groups.start(parallel, seed=1)
        run_layout(folder, number, parallel=parallel, position=position)
        groups.stop()
    return 0


def run_layout(folder: Path, number: int, *, parallel: ParallelConfig, position: groups.Position) -> None:
    """Train two steps, or load; then save."""
    even = (CONFIG.llm.num_layers // parallel.pipeline,) * parallel.pipeline
    layout = layout_string(even if parallel.layout == "auto" else parallel.layout)
    spec = BuildSpec(model=CONFIG, parallel=parallel, layout=layout, dtype=torch.float32, train=TRAINABLE_PARTS, seed=1)
    model = build_model_chunks(spec)
    optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-3), bf16=False)
    set_learning_rate(optimizer, lr=1e-3, weight_decay=0.1)
    if number == 0:
        source = SyntheticSteps(
            CONFIG,
            modality="multimodal",
            seq_length=128,
            global_batch_size=2,
            micro_batch_size=1,
            dp_rank=position.dp_rank,
            dp_size=position.dp_size,
        )
        for step in range(2):
            train_step(model, optimizer, next_step(source if broadcast.is_source() else None, step), stop_flag=False)
    else:
        path, store = folder / str(number - 1) / "iter_0000002", CheckpointStore(folder)
        restore_state(model, optimizer, lambda state: store.load(path, state))
    CheckpointStore(folder / str(number)).save(2, state=save_state(model, optimizer), content={}, files={})


if __name__ == "__main__":
    sys.exit(main())
