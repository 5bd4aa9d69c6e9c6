"""Content of a run's checkpoint, and how a run starts from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.optimizer import ChainedOptimizer

from megavl.checkpoint import collective_errors
from megavl.checkpoint.find import START
from megavl.checkpoint.manifest import read_manifest
from megavl.checkpoint.reader import resolve
from megavl.checkpoint.store import CheckpointStore
from megavl.config.load import dump_recipe, to_dict
from megavl.config.recipe import Recipe
from megavl.data.mixture import sequences_before
from megavl.data.tokenizer import Tokenizer
from megavl.train.identity import Fixed, compare_resumed, compare_start
from megavl.train.model_chunks import ModelChunks
from megavl.train.optimizer import holds_half_state
from megavl.train.progress import Progress, read_content

FORMAT_VERSION = 1


class RunState:
    """Saves and restores model, optimizer and progress."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: ModelChunks,
        optimizer: ChainedOptimizer,
        fingerprint: str,
        tokenizer: Tokenizer,
    ) -> None:
        self.recipe, self.model, self.optimizer, self.tokenizer = recipe, model, optimizer, tokenizer
        self.fixed = Fixed.of(recipe, fingerprint=fingerprint)
        self._start: dict[str, Any] = {START: None}
        settings = recipe.checkpoint
        self.store = CheckpointStore(recipe.checkpoint_dir, keep=settings.keep, skip_hash=settings.skip_hash)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint. Collective."""
        return self.store.save(progress.step, **self._contents(progress))

    def begin_save(self, progress: Progress) -> None:
        """Begin to write a checkpoint in the background; `store.finish` commits it. Collective."""
        self.store.begin(progress.step, **self._contents(progress))

    def _contents(self, progress: Progress) -> dict[str, Any]:
        files: dict[str, bytes | Path] = {
            "recipe.yaml": dump_recipe(self.recipe).encode(),
            "model.json": _json(to_dict(self.recipe.model)),
            **{f"tokenizer/{path.name}": path for path in self.tokenizer.files},
        }
        state = save_state(self.model, self.optimizer)
        return {"state": state, "content": self._content(progress), "files": files}

    def restore(self) -> tuple[Progress, list[str]] | None:
        """Resume from the newest good checkpoint of this run; None if there is none yet. Collective.

        Returns:
            Progress, and a line for each setting in which the recipe differs from the run so far.

        Raises:
            CheckpointError: only damaged checkpoints, or weights that do not fit.
            UsageError: the checkpoint belongs to another model, seed, batch size, data set or stage.
        """
        path = self.store.newest(allow_fresh=self.recipe.checkpoint.allow_fresh)
        if path is None:
            return None
        content = read_content(path)
        lines = compare_resumed(self.recipe, path, content=content, fixed=self.fixed, tokenizer=self.tokenizer)
        # With another precision the weights are converted; the optimizer's are fp32 in any case.
        self._start = {START: content[START]} if START in content else {}
        restore_state(self.model, self.optimizer, lambda state: self.store.load(path, state, convert_dtype=True))
        return Progress.of(content, global_batch_size=self.recipe.training.global_batch_size), lines

    def start_from(self, init: str) -> list[str]:
        """Load only the weights of another run's checkpoint. Collective.

        Returns:
            A line for each setting in which the recipe differs from the checkpoint and may.

        Raises:
            CheckpointError: no checkpoint there, or weights that do not fit.
            UsageError: another model or tokenizer than the recipe's.
        """
        # Rank 0 alone reads all of it, and all ranks load the checkpoint that it found.
        path, start = collective_errors.on_rank_zero(lambda: _found(init, skip_hash=self.recipe.checkpoint.skip_hash))
        lines = compare_start(self.recipe, path, tokenizer=self.tokenizer)
        self.model.load_weights(lambda state: self.store.load(path, state, strict=False, convert_dtype=True))
        self.optimizer.reload_model_params()
        self._start = {START: start}
        return lines

    def _content(self, progress: Progress) -> dict[str, Any]:
        size = self.recipe.training.global_batch_size
        content = {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "bad_steps": progress.bad_steps,
            "consumed_samples": sequences_before(progress.step, size=size, earlier=progress.earlier_batches),
            **self.fixed.values,
            **self._start,
        }
        if progress.earlier_batches:
            content["earlier_batches"] = [list(pair) for pair in progress.earlier_batches]
        return content


def _found(init: str, *, skip_hash: bool) -> tuple[Path, dict[str, Any]]:
    """The checkpoint to start from, and how later ones name it."""
    path = resolve(init, skip_hash=skip_hash)
    manifest = read_manifest(path)
    return path, {"checkpoint": str(path.resolve()), "step": manifest["iteration"], "digest": manifest["digest"]}


def save_state(model: ModelChunks, optimizer: ChainedOptimizer) -> dict[str, Any]:
    """Sharded state of weights and optimizer, for `CheckpointStore.save`. Collective."""
    model.gather_weights()
    weights = model.sharded_weights()
    return {**weights, "optimizer": optimizer.sharded_state_dict(weights, metadata=_metadata())}


def restore_state(
    model: ModelChunks, optimizer: ChainedOptimizer, load: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Load weights and optimizer: `load` reads what the sharded state of this layout describes. Collective."""
    weights = model.sharded_weights()
    wanted = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_metadata())
    loaded = load({**weights, "optimizer": wanted})
    model.fill(loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    # Halves of fp32 weights are rounded another way than the stored bf16 weights, each shard on its rank.
    model.gather_weights(changed=holds_half_state(optimizer))


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
