"""MegaVL and transformers' own class with the same random weights, and prompts for both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from launch.bench.engines.random_models import random_tensors, transformers_model
from launch.bench.engines.released_pixels import random_picture, tower_pixels
from megavl.config.model import ModelConfig
from megavl.config.presets import ImageGeometry
from megavl.config.recipe import ParallelConfig
from megavl.data.batch import make_batch
from megavl.data.image import canvas
from megavl.generate.weights import load_weights
from megavl.model.build import BuildSpec, build_stages
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups
from megavl.weights.lazy import LazyTensor

TOLERANCE = 1e-5
"""Largest difference relative to the reference's largest value, fp32. A wrong GELU changes logits by 1e-4."""
EOS = 1


@dataclass(frozen=True)
class Prompt:
    """Text with images in it, ready for either side."""

    ids: tuple[int, ...]
    pictures: tuple[Image.Image, ...]
    pixels: dict[str, torch.Tensor]
    """The reference's inputs, by the released rule."""

    def canvases(self, geometry: ImageGeometry) -> torch.Tensor:
        """MegaVL's inputs."""
        return torch.from_numpy(np.stack([canvas(picture, geometry=geometry) for picture in self.pictures]))


@dataclass(frozen=True)
class Pair:
    """The same model twice."""

    config: ModelConfig
    ours: DeepseekVL
    theirs: PreTrainedModel

    def our_logits(self, prompt: Prompt, *, geometry: ImageGeometry | None = None) -> torch.Tensor:
        """(T, V); `geometry` replaces the model's own."""
        images = prompt.canvases(geometry or self.config.image_geometry)
        batch = make_batch(torch.tensor(prompt.ids), images=images, image_token_id=self.config.image_token_id)
        return self.ours.logits(batch)

    def their_logits(self, prompt: Prompt) -> torch.Tensor:
        """(T, V)."""
        return self.theirs(input_ids=torch.tensor([prompt.ids]), **prompt.pixels).logits[0]

    def their_greedy_tokens(self, prompt: Prompt, *, count: int) -> list[int]:
        """Tokens that transformers' `generate` gives."""
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "eos_token_id": EOS, "pad_token_id": 2}
        out = self.theirs.generate(input_ids=torch.tensor([prompt.ids]), **prompt.pixels, **options)
        return out[0, len(prompt.ids) :].tolist()


@contextmanager
def native_pair(config: ModelConfig, *, seed: int = 0, attention: str = "sdpa") -> Iterator[Pair]:
    """Both models in fp32, in a world of one process that ends with the context."""
    alone = ParallelConfig()
    weights = random_tensors(config, seed=seed)
    groups.start(alone, seed=0)
    try:
        (ours,) = build_stages(BuildSpec(model=config, parallel=alone, seed=1))
        load_weights(ours, {name: LazyTensor.of(tensor) for name, tensor in weights.items()}, source="test")
        yield Pair(config, ours.eval(), transformers_model(config, weights, attention=attention))
    finally:
        groups.stop()


def prompt_with_images(config: ModelConfig, sizes: Sequence[tuple[int, int]], *, seed: int = 0) -> Prompt:
    """Random words around one image for each of `sizes` (width, height)."""
    generator = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return generator.integers(config.image_token_id + 1, config.llm.vocab_size, count).tolist()

    ids = [0, *words(5)]
    for number in range(len(sizes)):
        ids += [config.image_token_id] * config.image_tokens + words(3 + number)
    pictures = [random_picture(seed * 100 + number, size) for number, size in enumerate(sizes)]
    return Prompt(tuple(ids), tuple(pictures), tower_pixels(pictures, config))
