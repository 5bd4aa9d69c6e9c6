"""States and rank functions of the checkpoint tests; imported by the ranks' server."""

from __future__ import annotations

import resource
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavl.checkpoint import collective_errors, save
from megavl.checkpoint.background import HostBuffer
from megavl.checkpoint.shard_reads import ShardReader
from megavl.checkpoint.store import CheckpointStore
from megavl.config.errors import CheckpointError, StorageError
from megavl.config.load import load_model_config
from megavl.files import activity

ROWS = 8
"""Rows of the sharded toy tensor, whatever the number of ranks."""


def toy_state(value: float, *, objects: bool = True) -> dict[str, Any]:
    """A sharded tensor, a replicated one, one object per rank, and common values; all a function of `value`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = ROWS // world
    whole = torch.arange(ROWS * 4, dtype=torch.float32).reshape(ROWS, 4) + value
    state: dict[str, Any] = {
        "model": {
            "weight": ShardedTensor.from_rank_offsets(
                "model.vision.weight", whole[rank * rows : (rank + 1) * rows].clone(), (0, rank, world)
            ),
            "bias": ShardedTensor.from_rank_offsets(
                "model.vision.bias", torch.full((3,), value, dtype=torch.bfloat16), replica_id=rank
            ),
            "table": ShardedTensor.from_rank_offsets(
                "model.vision.table", torch.arange(4096.0).reshape(1, 512, 8) + value, replica_id=(0, 0, rank)
            ),
        },
        "iteration": int(value),
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}, {}],
    }
    if objects:
        state["rng"] = ShardedObject("rng", {"rank": rank, "value": value}, (world,), (rank,))
    return state


def save_and_load(directory: str, steps: list[int]) -> dict[str, Any]:
    """Save every step, then load the newest into zeros; report what came back."""
    store = CheckpointStore(directory)
    for step in steps:
        store.save(step, state=toy_state(step), content={"consumed": 3 * step}, files={"recipe.yaml": b"seed: 1\n"})
    path = store.newest()
    assert path is not None
    read, read_rows = [0], ShardReader._read

    def counted(self: ShardReader, stream: Any, position: int, rows: torch.Tensor, *, source: str) -> None:
        read[0] += rows.nbytes
        read_rows(self, stream, position, rows, source=source)

    ShardReader._read = counted  # type: ignore[method-assign]
    return {"path": str(path), **_report(store.load(path, toy_state(0))), "read": read[0]}


def wait_for_rank_zero(directory: str) -> int:
    """How much progress a rank notes while rank 0 reads files for three beats."""
    collective_errors.BEAT_S, beats, send = 0.01, [], dist.broadcast_object_list
    noted = activity.count()

    def counted(*args: Any, **words: Any) -> None:
        beats.append(args)
        send(*args, **words)

    def read() -> str:
        while len(beats) < 3:
            activity.note()
            time.sleep(0.01)
        return "done"

    collective_errors.dist.broadcast_object_list = counted
    assert collective_errors.on_rank_zero(read) == "done"
    return activity.count() - noted


def load_only(directory: str, objects: bool, strict: bool) -> dict[str, Any]:
    """Load the newest checkpoint into zeros."""
    store = CheckpointStore(directory)
    path = store.newest()
    assert path is not None
    return {"path": str(path), **_report(store.load(path, toy_state(0, objects=objects), strict=strict))}


def save_again(directory: str, steps: list[int]) -> list[str]:
    """Save steps; report the directories."""
    store = CheckpointStore(directory)
    return [store.save(step, state=toy_state(step), content={}, files={}).name for step in steps]


def save_less(directory: str) -> str:
    """Save without the first block of rank 1; report the error."""
    whole: Any = save.own_blocks
    vars(save)["own_blocks"] = lambda *args, rank, **named: whole(*args, rank=rank, **named)[rank:]
    try:
        CheckpointStore(directory).save(1, state=toy_state(1), content={}, files={})
    except CheckpointError as error:
        return str(error)
    return ""


def save_in_background(directory: str, steps: list[int]) -> list[str]:
    """Begin to save each step, overwrite its state as training would, and commit; report directories or errors.

    At step 10 one rank finds no memory for its copy.
    """
    store, found, reserve = CheckpointStore(directory), [], HostBuffer.reserve
    for step in steps:
        state = toy_state(step)
        room = step != 10 or dist.get_rank() == 0
        HostBuffer.reserve = reserve if room else lambda *args, **words: False  # type: ignore[method-assign]
        store.begin(step, state=state, content={}, files={})
        for shard in state["model"].values():
            shard.data.zero_()
        state["groups"][0]["lr"] = 0.0
        assert store.begun == step
        try:
            found.append(store.finish().name)
        except StorageError as error:
            found.append(str(error))
        assert store.begun is None and store.is_written()
    return found


def save_limited(directory: str) -> list[str]:
    """Save 5 freely and 10 under a file-size limit that stands for a full disk."""
    store = CheckpointStore(directory)
    store.save(5, state=toy_state(5), content={}, files={})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    state = toy_state(10)
    state["model"]["large"] = ShardedTensor.from_rank_offsets(
        "model.large", torch.ones(1, 1 << 16), (0, dist.get_rank(), dist.get_world_size())
    )
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, free[1]))
    try:
        store.save(10, state=state, content={}, files={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    return []


def load_changed(path: str, change: str) -> None:
    """Ask, on the last rank only or on all, for something that is not in the checkpoint."""
    state = toy_state(0)
    model, rank, world = state["model"], dist.get_rank(), dist.get_world_size()
    last = rank == world - 1
    if change == "dtype":
        model["weight"] = ShardedTensor.from_rank_offsets(
            "model.vision.weight", model["weight"].data.bfloat16(), (0, rank, world)
        )
    elif change == "shape":
        model["weight"] = ShardedTensor.from_rank_offsets(
            "model.vision.weight", torch.zeros(ROWS, 4), (0, rank, world), allow_shape_mismatch=True
        )
    elif change == "unexpected" and last:
        model["more"] = ShardedTensor.from_rank_offsets("model.vision.more", torch.zeros(2))
    elif change == "missing":
        del model["bias"]
    elif change == "uncovered" and last:
        del model["weight"]
    store = CheckpointStore(Path(path).parent)
    store.load(path, state)


def converted(path: str) -> list[list[float]]:
    """Load fp32 into bf16 with the conversion allowed."""
    state = toy_state(0)
    weight = torch.zeros(ROWS, 4, dtype=torch.bfloat16)
    state["model"]["weight"] = ShardedTensor.from_rank_offsets("model.vision.weight", weight)
    CheckpointStore(Path(path).parent).load(path, state, convert_dtype=True)
    return weight.float().tolist()


def _report(loaded: dict[str, Any]) -> dict[str, Any]:
    return {
        "weight": loaded["model"]["weight"].tolist(),
        "bias": loaded["model"]["bias"].float().tolist(),
        "table": loaded["model"]["table"].flatten().tolist(),
        "rng": loaded.get("rng"),
        "iteration": loaded["iteration"],
        "betas": list(loaded["groups"][0]["betas"]),
    }


class TinyModel(MegatronModule):
    """A real language model under the product's names, and a few replicated vision tensors on the first stage."""

    def __init__(self, *, tp: int, pp: int) -> None:
        llm = load_model_config("tiny-hybrid").llm
        config = TransformerConfig(
            num_layers=llm.num_layers,
            hidden_size=llm.hidden_size,
            num_attention_heads=llm.num_attention_heads,
            ffn_hidden_size=llm.ffn_hidden_size,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            bias_dropout_fusion=False,
            use_cpu_initialization=True,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            pipeline_dtype=torch.float32,
        )
        super().__init__(config)
        first = parallel_state.is_pipeline_first_stage()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.language_model = GPTModel(
                config,
                get_gpt_layer_local_spec(normalization="RMSNorm"),
                vocab_size=llm.vocab_size,
                max_sequence_length=64,
                pre_process=first,
                post_process=parallel_state.is_pipeline_last_stage(),
                share_embeddings_and_output_weights=False,
                position_embedding_type="rope",
            )
        if first:
            self.vision = torch.nn.ModuleDict({"siglip": torch.nn.Linear(3, 4)})
            self.vision["siglip"].register_parameter("pos_embed", torch.nn.Parameter(torch.zeros(1, 2, 3)))


def reshard_real_model(directory: str, tp: int, pp: int) -> dict[str, Any]:
    """Load the weights written by one process into a sharded model, strictly, and save what it then holds as step 7."""
    parallel_state.initialize_model_parallel(tp, pp)
    torch.manual_seed(dist.get_rank())
    model = TinyModel(tp=tp, pp=pp)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def state() -> dict[str, Any]:
        return {"model": model.sharded_state_dict(prefix="model.", metadata={"dp_cp_group": group})}

    store = CheckpointStore(directory)
    path = store.newest()
    assert path is not None
    store.load(path, state())
    store.save(7, state=state(), content={}, files={"model.json": path / "model.json"})
    fc1 = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith("layers.0.mlp.linear_fc1.weight")
    }
    ranks = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    return {"ranks": ranks, "fc1": [tensor.tolist() for tensor in fc1.values()]}
