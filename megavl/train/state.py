"""Content of a run's checkpoint, and how a run starts from one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import parallel_state as mpu
from megatron.core.optimizer import ChainedOptimizer

from megavl.checkpoint.reader import resolve
from megavl.checkpoint.store import CheckpointStore, read_manifest
from megavl.config.errors import UsageError
from megavl.config.load import dump_recipe, to_dict
from megavl.config.recipe import Recipe
from megavl.train.model_chunks import ModelChunks

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run; with the recipe it determines everything that follows."""

    step: int
    """Optimizer steps done, skipped ones included."""
    bad_steps: int
    """Skipped steps in a row."""


class RunState:
    """Saves and restores model, optimizer and progress."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        model: ModelChunks,
        optimizer: ChainedOptimizer,
        fingerprint: str,
        tokenizer_files: dict[str, Path],
    ) -> None:
        self.recipe, self.model, self.optimizer, self.fingerprint = recipe, model, optimizer, fingerprint
        self.tokenizer_files = tokenizer_files
        settings = recipe.checkpoint
        self.failed_saves = 0
        self.store = CheckpointStore(recipe.checkpoint_dir, keep=settings.keep, skip_hash=settings.skip_hash)

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint. Collective."""
        files: dict[str, bytes | Path] = {
            "recipe.yaml": dump_recipe(self.recipe).encode(),
            "model.json": _json(to_dict(self.recipe.model)),
            **{f"tokenizer/{name}": path for name, path in self.tokenizer_files.items()},
        }
        state = save_state(self.model, self.optimizer)
        return self.store.save(progress.step, state=state, content=self._content(progress), files=files)

    def restore(self) -> Progress | None:
        """Resume from the newest good checkpoint of this run; None if there is none yet. Collective.

        Raises:
            CheckpointError: only damaged checkpoints, or weights that do not fit.
            UsageError: the checkpoint belongs to another seed, batch size, data set or stage.
        """
        path = self.store.newest(allow_fresh=self.recipe.checkpoint.allow_fresh)
        if path is None:
            return None
        content = read_manifest(path)["content"]
        self._check(path, content)
        restore_state(self.model, self.optimizer, lambda state: self.store.load(path, state))
        return Progress(step=content["step"], bad_steps=content["bad_steps"])

    def start_from(self, init: str) -> None:
        """Load only the weights of another run's checkpoint. Collective."""
        path = resolve(init)
        self.model.load_weights(lambda state: self.store.load(path, state, strict=False, convert_dtype=True))
        self.optimizer.reload_model_params()

    def _content(self, progress: Progress) -> dict[str, Any]:
        training = self.recipe.training
        return {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "bad_steps": progress.bad_steps,
            "consumed_samples": progress.step * training.global_batch_size,
            **self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        """Settings that must not change within a run, because they determine samples and trained weights."""
        training, data = self.recipe.training, self.recipe.data
        return {
            "seed": training.seed,
            "global_batch_size": training.global_batch_size,
            "data_fingerprint": self.fingerprint,
            "multimodal_fraction": data.multimodal_fraction,
            "modality_warmup_steps": data.modality_warmup_steps,
            "grouping": data.grouping,
            "cross_document_attention": data.cross_document_attention,
            "stage": training.stage,
            "trainable_parts": list(self.recipe.trainable_parts),
        }

    def _check(self, path: Path, content: dict[str, Any]) -> None:
        for key, value in self._identity().items():
            if content.get(key) == value:
                continue
            if self.recipe.checkpoint.force_resume and key != "trainable_parts":
                continue
            raise UsageError(
                f"{path}: {key} is {content.get(key)!r} in the checkpoint and {value!r} in the recipe; resume with the "
                "old value, use another checkpoint.dir, or set checkpoint.force_resume=true to go on regardless"
            )


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


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode()
