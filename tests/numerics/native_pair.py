"""One set of random weights in MegaVL and in transformers' own class, with the same prompt for both."""

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
from transformers import DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration, PreTrainedModel

from megavl.config.model import ModelConfig
from megavl.config.presets import ImageGeometry
from megavl.config.recipe import ParallelConfig
from megavl.convert.lazy import LoadedTensor
from megavl.convert.native_format import side_files
from megavl.convert.table import weight_rows
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.data.image import canvas
from megavl.generate.weights import load_weights
from megavl.model.attention import segments
from megavl.model.build import BuildSpec, build_model
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups
from tests.distributed.synthetic import random_weights
from tests.numerics.original_pixels import random_picture, tower_pixels

TOLERANCE = 1e-5
"""Largest difference relative to the reference's largest value, fp32; a wrong GELU changes logits by some 1e-4."""
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
        packed = segments(
            torch.tensor([0, len(prompt.ids)], dtype=torch.int32), device=torch.device("cpu"), on_device=False
        )
        images = prompt.canvases(geometry or self.config.image_geometry)
        return self.ours(tokens=torch.tensor([prompt.ids]), images=images, packed=packed)[0]

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
        ours = build_model(BuildSpec(model=config, parallel=alone, seed=1))
        load_weights(ours, {name: LoadedTensor(tensor) for name, tensor in weights.items()}, source="test")
        yield Pair(config, ours.eval(), transformers_model(config, weights, attention=attention))
    finally:
        groups.stop()


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by flat name: HD scalar, relative positions and biases are not 0, positions count as much as patches."""
    return {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.5
        if name.endswith("pos_embed")
        else tensor
        for name, tensor in random_weights(config, seed=seed)
    }


def transformers_model(config: ModelConfig, weights: dict[str, torch.Tensor], *, attention: str) -> PreTrainedModel:
    """The native class, its sizes and tensors as MegaVL would export them."""
    model = new_transformers_model(config, attention=attention, dtype=torch.float32)
    state: dict[str, torch.Tensor] = {}
    for row in weight_rows(config, "native"):
        state |= zip(row.keys, row.transform.from_flat(weights[row.flat]))
    model.load_state_dict(state, strict=True)
    return model.eval()


def new_transformers_model(config: ModelConfig, *, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """The native class with the weights that transformers begins with."""
    model_class = DeepseekVLForConditionalGeneration if config.sam is None else DeepseekVLHybridForConditionalGeneration
    ids = TokenizerIds(bos=0, eos=EOS, pad=2, image=config.image_token_id)
    # The parts' own entries decide about their weights, whatever the whole is asked for.
    raw = side_files(config, ids=ids, dtype=str(dtype).removeprefix("torch."))["config.json"]
    hf_config = model_class.config_class.from_dict(raw)
    return model_class._from_config(hf_config, attn_implementation=attention, dtype=dtype)


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


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    assert expected.isfinite().all() and expected.std() > 1e-3 * expected.abs().max(), "the reference is degenerate"
    return float((found - expected).abs().max() / expected.abs().max())
