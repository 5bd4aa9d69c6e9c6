"""Optimizer state in halves, on the stand-in for Transformer Engine: `python -m tests.end_to_end.half_state FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from launch.bench.engines.random_models import random_tensors
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_sides import MegaVL, made_up_batches
from launch.bench.engines.step_work import Work, make_work
from megavl.checkpoint.store import CheckpointStore
from megavl.config.errors import UsageError
from megavl.config.load import load_model_config
from megavl.config.recipe import ParallelConfig
from megavl.model.engine_choice import uses_transformer_engine
from megavl.model.trainable import is_vision
from megavl.parallel import groups
from megavl.train import optimizer as optimizers
from megavl.train.state import restore_state, save_state
from megavl.train.weight_halves import group_in_parts, join_weight, split_weight
from megavl.weights.canonical_names import canonical_name
from tests.contract.test_recipes_build import count_parameters_on_meta

FINAL_NORM = "model.language_model.decoder.final_layernorm._extra_state"


def work(state: str, *, precision: str = "bf16", engine: str = "always") -> Work:
    """Two decoder layers, one micro-batch."""
    words = {"part": "whole", "layers": 2, "recompute": "none", "memory_bytes": None}
    found = make_work("tiny-siglip", micro_batches=1, precision=precision, **words)
    recipe = replace(found.recipe, optimizer=replace(found.recipe.optimizer, state_precision=state))
    return replace(found, recipe=replace(recipe, training=replace(recipe.training, transformer_engine=engine)))


def build(state: str, *, engine: str = "always", seed: int = 0) -> MegaVL:
    """A model with its optimizer."""
    found = work(state, engine=engine)
    weights = random_tensors(found.recipe.model, seed=seed)
    return MegaVL(found, marks=Marks(), lr=1e-3, local=False, weights=weights)


def step(side: MegaVL, kind: str) -> None:
    """One step of a modality."""
    side.step(side.prepare(made_up_batches(work("fp32"), kind, steps=1)[0], kind))


def contents(side: MegaVL) -> dict[str, torch.Tensor]:
    """Copies of weights and of what a checkpoint holds of the optimizer, by canonical name."""
    (chunk,), (part,) = side.model.chunks, side.optimizer.chained_optimizers
    found = {}
    for parameter, weight in chunk.module.named_parameters():
        name = canonical_name(parameter)
        found[f"{name} weight"] = weight.detach().cpu().clone()
        if weight.requires_grad:
            state = part._get_main_param_and_optimizer_states(weight)
            found |= {f"{name} {key}": state[key].detach().cpu().clone() for key in ("param", "exp_avg", "exp_avg_sq")}
    return found


def counts(side: MegaVL) -> list[int]:
    """Step counts of the groups."""
    return [group["step"] for group in side.optimizer.state_dict()["optimizer"]["param_groups"]]


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not bitwise equal."""
    assert one.keys() == other.keys() and one
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


def check_halves() -> None:
    """Every pattern of low bits around every kind of number survives, and bf16 is the nearest."""
    low = torch.arange(1 << 16, dtype=torch.int32)
    for high in (0x0000, 0x3F80, 0x3F81, 0xBF80, 0x7F7E, 0x8000):
        signed = high - (1 << 16) if high >= 1 << 15 else high
        master = ((torch.tensor(signed, dtype=torch.int32) << 16) | low).view(torch.float32)
        weight, rest = split_weight(master)
        assert torch.equal(join_weight(weight, rest).view(torch.int32), master.view(torch.int32))
        ties = low == 0x8000
        assert torch.equal(weight[~ties], master.bfloat16()[~ties])
    parts = list(group_in_parts({"lr": 1.0, "params": [torch.zeros(n) for n in (3, 4, 9, 1, 1)]}, most=8))
    assert [[len(weight) for weight in part["params"]] for part in parts] == [[3, 4], [9], [1, 1]]
    assert all(part["lr"] == 1.0 for part in parts)


def check_updates() -> None:
    """Updates are those of torch's AdamW but for rounding, a bad or partial step leaves what it must."""
    half, full, small = build("bf16"), build("fp32", engine="never"), build("bf16")
    for side in (half, full):
        step(side, "multimodal")
    with mock.patch.object(optimizers, "group_in_parts", partial(group_in_parts, most=1000)):
        step(small, "multimodal")
    assert differing(contents(half), contents(small)) == [], "parts of a group are updated as the whole"
    (part,) = half.optimizer.chained_optimizers
    taken = [tensor for state in part.optimizer.state.values() for tensor in state.values()]
    numbers = sum(weight.numel() for group in part.param_groups for weight in group["params"])
    assert sum(tensor.nbytes for tensor in taken) == 6 * numbers
    ours, theirs = contents(half), contents(full)
    moved = {name: (ours[name] - theirs[name]).abs().max() for name in ours if name.endswith(" param")}
    print("largest difference of an fp32 weight", max(map(float, moved.values())), "after a step of 1e-3")
    # Adam moves a weight by the sign of a gradient near zero, which rounding decides.
    for name in moved:
        near = (ours[name] - theirs[name]).abs() <= 1e-4
        assert near.float().mean() > 0.9, name
    before = contents(half)
    step(half, "text")
    changed = differing(before, contents(half))
    assert changed and not any(is_vision(name) for name in changed), "a text step leaves the vision side"
    assert sorted(set(counts(half))) == [1, 2]
    before = contents(half)
    norm, updated = type(half.optimizer).step(half.optimizer, torch.tensor(float("nan"), device="cuda"))
    assert not updated and differing(before, contents(half)) == [] and sorted(set(counts(half))) == [1, 2]


def check_checkpoints(folder: Path) -> None:
    """State goes to a run without Transformer Engine and back, bit by bit; extra states are nobody's business."""
    half = build("bf16")
    step(half, "multimodal")
    step(half, "text")
    store, kept = CheckpointStore(folder), contents(half)
    state = save_state(half.model, half.optimizer)
    # As Transformer Engine's own final norm would have it.
    state["more"] = {FINAL_NORM: ShardedObject(FINAL_NORM, None, (1,), (0,), replica_id=0)}
    path = store.save(1, state=state, content={}, files={})
    full = build("fp32", engine="never", seed=1)
    restore_state(full.model, full.optimizer, lambda state: store.load(path, state))
    assert differing(kept, contents(full)) == [] and counts(full) == counts(half)
    path = store.save(2, state=save_state(full.model, full.optimizer), content={}, files={})
    again = build("bf16", seed=2)

    def hostile(state: dict) -> dict:
        loaded = store.load(path, state)
        keys = [key for key in loaded["stage0"] if key.endswith("_extra_state")]
        assert len(keys) == 2 * 4
        return {**loaded, "stage0": {**loaded["stage0"], **dict.fromkeys(keys, torch.ones(3, dtype=torch.uint8))}}

    restore_state(again.model, again.optimizer, hostile)
    assert differing(kept, contents(again)) == [] and counts(again) == counts(half)
    for side in (half, again):
        step(side, "multimodal")
    assert differing(contents(half), contents(again)) == []


def main() -> None:
    """All checks, in one process."""
    check_halves()
    groups.start(ParallelConfig(), seed=1)
    assert uses_transformer_engine(work("fp32", engine="auto").recipe)
    try:
        uses_transformer_engine(work("fp32", precision="fp32").recipe)
    except UsageError as error:
        assert "training.precision fp32" in str(error)
    else:
        raise AssertionError("cuDNN's attention takes no fp32")
    assert sum(count_parameters_on_meta(load_model_config("tiny-hybrid")).values()) > 1e6
    check_updates()
    check_checkpoints(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
