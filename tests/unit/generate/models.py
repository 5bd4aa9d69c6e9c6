"""Tiny models with random weights, in memory and on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from launch.bench.engines.random_models import random_weights
from megavl.checkpoint.writer import write_model_checkpoint
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig
from megavl.convert.hf_write import write_hf
from megavl.generate.decode import Request, generate
from megavl.generate.weights import load_weights
from megavl.model.build import BuildSpec, build_to_generate
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups
from megavl.weights.lazy import LazyTensor

PRESETS = ("tiny-hybrid", "tiny-siglip")
TALKATIVE = {"tiny-hybrid": 2, "tiny-siglip": 0}
"""Seeds of weights whose greedy answers in the chat format do not end in one repeated token."""


def config_of(preset: str) -> ModelConfig:
    return load_model_config(preset)


def random_tensors(preset: str, *, seed: int = 0) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in random_weights(config_of(preset), seed=seed)}


@contextmanager
def built(preset: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Iterator[DeepseekVL]:
    """The model of a preset, in a world of its own unless there is one."""
    alone, first = ParallelConfig(), not dist.is_initialized()
    if first:
        groups.start(alone, seed=0)
    try:
        config = config_of(preset)
        model = build_to_generate(BuildSpec(model=config, parallel=alone, dtype=dtype))
        load_weights(model, random_tensors(preset, seed=seed), source="test")
        yield model
    finally:
        if first:
            groups.stop()


def greedy_tokens(model: DeepseekVL, ids: Sequence[int], *, images: torch.Tensor, eos_id: int, count: int) -> list[int]:
    request = Request(ids=ids, images=images, max_new_tokens=count)
    return [token for _, token, _ in generate(model, [request], eos_id=eos_id)]


def write_folder(preset: str, out: Path, *, tokenizer: Path, fmt: str, seed: int = 0) -> Path:
    config, tensors = config_of(preset), random_tensors(preset, seed=seed)
    return write_hf(out, config=config, tensors=tensors, fmt=fmt, tokenizer_dir=tokenizer, dtype="float32")


def write_checkpoint(preset: str, out: Path, *, tokenizer: Path, seed: int = 0) -> Path:
    """The checkpoint itself; `out` is its parent."""
    files = {f"tokenizer/{path.name}": path for path in tokenizer.iterdir()}
    tensors = random_weights(config_of(preset), seed=seed)
    return write_model_checkpoint(out, config=config_of(preset), tensors=tensors, files=files)


def write_picture(path: Path, *, seed: int, size: tuple[int, int] = (120, 90)) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 10, size[0] // 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path
