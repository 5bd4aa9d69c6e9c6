"""Steps for a calibration: all of one modality, from the recipe's data or random."""

from __future__ import annotations

import dataclasses

import torch

from megavl.config.recipe import Recipe
from megavl.data.batch import Batch, Modality, make_batch
from megavl.data.mixture import recipe_mixture
from megavl.data.sampler import Sampler
from megavl.data.tokenizer import open_tokenizer
from megavl.parallel import broadcast
from megavl.parallel.groups import Position
from megavl.train.batch_broadcast import StepSource
from megavl.train.open_data import recipe_dataset, step_loader

MICRO_BATCHES = 2
"""Micro-batches per step; the first one of each step is not counted."""


class RandomSteps:
    """Random micro-batches with one document per sequence and a fixed number of images."""

    def __init__(self, recipe: Recipe, *, images: int, position: Position) -> None:
        self.recipe, self.images = recipe, images
        self.generator = torch.Generator().manual_seed(recipe.training.seed + position.dp_rank)

    def get(self, step: int) -> list[Batch]:
        """Micro-batches of any step."""
        return [self._batch() for _ in range(MICRO_BATCHES)]

    def _batch(self) -> Batch:
        recipe = self.recipe
        model, length, count = recipe.model, recipe.data.seq_length, recipe.training.micro_batch_size
        tokens = torch.randint(model.llm.vocab_size, (count, length), generator=self.generator)
        tokens[tokens == model.image_token_id] = (model.image_token_id + 1) % model.llm.vocab_size
        tokens[:, 1 : 1 + self.images * model.image_tokens] = model.image_token_id
        shape = (count * self.images, 3, model.canvas_size, model.canvas_size)
        flat = tokens.flatten()
        return make_batch(
            flat,
            borders=range(0, (count + 1) * length, length),
            loss_mask=flat.roll(-1) != model.image_token_id,
            images=torch.randint(0, 256, shape, generator=self.generator, dtype=torch.uint8),
            image_token_id=model.image_token_id,
            sample_ids=range(count),
        )


def step_source(recipe: Recipe, kind: Modality, *, images: int, position: Position, real: bool) -> StepSource | None:
    """Steps from the recipe's data if `real`, else random ones; None on ranks that do not load."""
    if not broadcast.is_source():
        return None
    if not real or not _draws(recipe, kind):
        return RandomSteps(recipe, images=images if kind == "multimodal" else 0, position=position)
    recipe = _steps_of(recipe, kind, replicas=position.dp_size)
    dataset = recipe_dataset(recipe, tokenizer=open_tokenizer(recipe.data.tokenizer), skip_hash=True)
    sampler = Sampler(dataset.counts, mixture=recipe_mixture(recipe, dataset.counts))
    return step_loader(recipe, dataset, sampler, position=position)


def _draws(recipe: Recipe, kind: Modality) -> bool:
    """Whether the recipe takes steps of this kind, so that its data hold some."""
    data = recipe.data
    return (
        data.multimodal_fraction > 0
        if kind == "multimodal"
        else data.multimodal_fraction < 1 or data.modality_warmup_steps > 0
    )


def _steps_of(recipe: Recipe, kind: Modality, *, replicas: int) -> Recipe:
    """The recipe with short steps of one kind, more of them than a calibration takes."""
    data = dataclasses.replace(recipe.data, multimodal_fraction=float(kind == "multimodal"), modality_warmup_steps=0)
    batch = MICRO_BATCHES * recipe.training.micro_batch_size * replicas
    training = dataclasses.replace(recipe.training, global_batch_size=batch, steps=1_000_000)
    return dataclasses.replace(recipe, data=data, training=training)
