"""One of several data-parallel ranks that save and load a model with its optimizer, and tell how long each waited.

It uses what every version of MegaVL has, and saves in the background where the version can. Rank 0 prints JSON lines.

    python -m torch.distributed.run --nproc-per-node 4 save_speed.py FOLDER --rounds 3
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavl.checkpoint.store import CheckpointStore
from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_PARTS, OptimizerConfig, ParallelConfig
from megavl.model.build import BuildSpec
from megavl.parallel import groups
from megavl.planner.layouts.layout import layout_string
from megavl.train.model_chunks import ModelChunks, build_model_chunks
from megavl.train.optimizer import build_optimizer
from megavl.train.state import restore_state, save_state

LLM = {"hidden_size": 384, "ffn_hidden_size": 1056, "num_layers": 8, "num_attention_heads": 6, "vocab_size": 16384}
_WORK = torch.ones(256, 256)


def main() -> None:
    """Save in turn, then load."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig()
    groups.start(parallel, seed=1)
    config = load_model_config("tiny-siglip", llm=LLM)
    layout = layout_string((LLM["num_layers"],))
    spec = BuildSpec(model=config, parallel=parallel, layout=layout, dtype=torch.float32, train=TRAINABLE_PARTS, seed=1)
    model = build_model_chunks(spec)
    optimizer = build_optimizer(model, optimizer=OptimizerConfig(lr=1e-3), bf16=False)
    store = CheckpointStore(arguments.folder)
    for number in range(arguments.rounds):
        tell(kind="waiting", standstill_s=save(store, 2 * number + 1, model=model, optimizer=optimizer))
        if hasattr(store, "begin"):
            tell(kind="background", **save_in_background(store, 2 * number + 2, model=model, optimizer=optimizer))
    path = store.newest()
    assert path is not None
    share = [sum(file.stat().st_size for file in path.glob(f"__{rank}_*")) for rank in range(dist.get_world_size())]
    tell(kind="files", written=share, parameters=sum(weight.numel() for weight in model.chunks[0].parameters()))
    # A new process knows of no verified checkpoint.
    store = CheckpointStore(arguments.folder)
    vars(__import__("megavl.checkpoint.manifest", fromlist=["_verified"]))["_verified"].clear()
    before, began = read_so_far(), time.perf_counter()
    newest = store.newest()
    assert newest is not None
    restore_state(model, optimizer, lambda state: store.load(newest, state))
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, read_so_far() - before)
    tell(kind="load", seconds=time.perf_counter() - began, read=taken)
    groups.stop()


def save(store: CheckpointStore, step: int, *, model: ModelChunks, optimizer: Any) -> float:
    """Seconds of a save that waits."""
    settle()
    began = time.perf_counter()
    store.save(step, state=save_state(model, optimizer), content={}, files={})
    dist.barrier()
    return time.perf_counter() - began


def save_in_background(store: CheckpointStore, step: int, *, model: ModelChunks, optimizer: Any) -> dict[str, float]:
    """Seconds that training stands still, and the time of a piece of work meanwhile against that of one alone."""
    settle()
    alone = min(work() for _ in range(5))
    began = time.perf_counter()
    store.begin(step, state=save_state(model, optimizer), content={}, files={})
    dist.barrier()
    copied, pieces = time.perf_counter(), []
    while groups.on_any_rank(not store.is_written()):
        pieces.append(work())
    written = time.perf_counter()
    store.finish()
    dist.barrier()
    ended = time.perf_counter()
    return {
        "standstill_s": copied - began + ended - written,
        "copy_s": copied - began,
        "commit_s": ended - written,
        "writing_s": written - copied,
        "slowdown": sum(pieces) / len(pieces) / alone if pieces else 1.0,
    }


def work() -> float:
    """Seconds of matrix products, in place of a step."""
    began = time.perf_counter()
    for _ in range(100):
        torch.mm(_WORK, _WORK)
    return time.perf_counter() - began


def settle() -> None:
    """Let earlier writes reach the disk."""
    gc.collect()
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def read_so_far() -> int:
    """Bytes that this process has read from files, the page cache included."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def tell(**row: Any) -> None:
    """Print a row, on rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
