"""The data of a recipe for training."""

from __future__ import annotations

from megavl.config.recipe import Recipe
from megavl.data.dataset import Dataset, open_dataset
from megavl.data.loader import StepLoader
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import Tokenizer
from megavl.parallel.groups import Position


def recipe_dataset(
    recipe: Recipe,
    *,
    tokenizer: Tokenizer,
    skip_hash: bool = False,
    check: bool = True,
) -> Dataset:
    """Open the recipe's sources.

    Args:
        skip_hash: leave out the checksums of whole files.
        check: read all files and compare their hashes; otherwise `Dataset.check` must do it before data are used.

    Raises:
        DataError: as `open_dataset`.
    """
    data, model = recipe.data, recipe.model
    return open_dataset(
        data.mixture,
        tokenizer=tokenizer,
        seq_length=data.seq_length,
        geometry=model.image_geometry,
        vocab_size=model.llm.vocab_size,
        image_token_id=model.image_token_id,
        skip_hash=skip_hash,
        check=check,
    )


def step_loader(
    recipe: Recipe,
    dataset: Dataset,
    sampler: Sampler,
    *,
    position: Position,
    workers: int = 0,
    prefetched: int = 0,
    start_step: int = 0,
) -> StepLoader:
    """The loader of this data-parallel rank, with `workers` processes and `prefetched` images; the caller closes it."""
    data, training = recipe.data, recipe.training
    return StepLoader(
        dataset,
        sampler=sampler,
        micro_batch_size=training.micro_batch_size,
        dp_rank=position.dp_rank,
        dp_size=position.dp_size,
        num_workers=workers,
        prefetch_images=prefetched,
        max_bad_in_row=data.max_bad_in_row,
        cross_document_attention=data.cross_document_attention,
        total_steps=training.steps,
        start_step=start_step,
        # Two workers lost in a row must be noticed before the watchdog takes the step for hung.
        worker_timeout_s=min(120.0, recipe.parallel.timeout_s / 3),
    )
