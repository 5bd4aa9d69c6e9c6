"""A model on disk, on this process or on the ranks that a launcher started.

A model is a MegaVL checkpoint, the directory that holds checkpoints, or a Hugging Face folder in either format.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megavl.config.errors import DataError, UsageError
from megavl.config.expected_warnings import expected_warnings_ignored
from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig
from megavl.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_in
from megavl.generate.weights import load_weights
from megavl.planner.layouts.layout import balance_weights, layout_string
from megavl.weights.canonical_names import canonical_shapes
from megavl.weights.dtypes import DTYPES
from megavl.weights.lazy import LazyTensor

with expected_warnings_ignored():
    from megavl.checkpoint import collective_errors
    from megavl.convert.open_weights import find_weights
    from megavl.model.build import BuildSpec, build_to_generate
    from megavl.model.vl_model import DeepseekVL
    from megavl.parallel import groups

ALONE = ParallelConfig()


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk, with everything but its weights in memory."""

    path: Path
    """Checkpoint or Hugging Face folder."""
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, LazyTensor]
    """Weights by canonical name."""


def find_model(path: str | Path, *, skip_hash: bool = False) -> ModelSource:
    """Read sizes, tokenizer and list of weights.

    Args:
        skip_hash: compare sizes of a checkpoint's files only, not their hashes.

    Raises:
        CheckpointError: nothing there, damaged, or not a DeepSeek-VL model.
        DataError: the tokenizer is missing or does not belong to the model.
    """
    found = find_weights(path, skip_hash=skip_hash)
    tokenizer = open_tokenizer(tokenizer_in(found.tokenizer))
    _check_tokenizer(tokenizer, found.config)
    return ModelSource(path=found.path, config=found.config, tokenizer=tokenizer, tensors=found.tensors)


def find_model_on_every_rank(path: str | Path) -> ModelSource:
    """`find_model`, with the same end on every rank; rank 0 alone compares hashes, before the others read."""
    first: list[ModelSource] = []

    def open_first() -> Path:
        first.append(find_model(path))
        return first[0].path

    found = collective_errors.on_rank_zero(open_first)
    collective_errors.on_every_rank(lambda: None if first else first.append(find_model(found, skip_hash=True)))
    return first[0]


def check_world(parallel: ParallelConfig) -> None:
    """Compare the layout with the processes that were started.

    Raises:
        UsageError: their numbers differ.
    """
    world, wanted = groups.world_size_from_env(), parallel.tensor * parallel.pipeline
    if world != wanted:
        raise UsageError(
            f"WORLD_SIZE is {world}, but tensor {parallel.tensor} x pipeline {parallel.pipeline} takes {wanted} "
            f"processes; start {wanted} of them (torchrun --nproc-per-node {wanted}), or choose other sizes"
        )


@contextmanager
def world(parallel: ParallelConfig) -> Iterator[None]:
    """Process groups over the processes of a launcher, or over this one alone.

    After an error with several ranks the groups stay: waiting for other ranks could hang, so the process must end.
    """
    check_world(parallel)
    groups.start(parallel, seed=0)
    several = collective_errors.world_size() > 1
    if several and not torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", collective_errors.world_size()))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    try:
        yield
    except BaseException:
        if not several:
            groups.stop()
        raise
    groups.stop()


@contextmanager
def loaded(source: ModelSource, *, dtype: str | None = None, parallel: ParallelConfig = ALONE) -> Iterator[DeepseekVL]:
    """The model with its weights, in eval mode, in a world that ends with the context.

    Args:
        dtype: float32 or bfloat16; None means float32 on the CPU and bfloat16 on CUDA.
        parallel: tensor x pipeline sizes and layout.
    """
    check_layout(source.config, parallel)
    with world(parallel):
        yield load_stage(source, dtype=dtype, parallel=parallel)


def check_layout(config: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that the model can be divided like this.

    Raises:
        UsageError: naming the option and the size that do not fit.
    """
    llm = config.llm
    for name in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(llm, name)
        if value % parallel.tensor:
            raise UsageError(f"tensor: {parallel.tensor} does not divide the model's {name} {value}; choose a divisor")
    layout = parallel.layout
    if layout != "auto" and (len(layout) != parallel.pipeline or sum(layout) != llm.num_layers):
        raise UsageError(
            f"layout: {','.join(map(str, layout))} does not share out {llm.num_layers} layers to {parallel.pipeline} "
            "pipeline stages; give one number for each stage"
        )


def load_stage(source: ModelSource, *, dtype: str | None, parallel: ParallelConfig) -> DeepseekVL:
    """This rank's stage with its weights, in eval mode; it reads no other weights. The process groups must run.

    Raises:
        CheckpointError: tensors that do not fit, on every rank.
    """
    layers = parallel.layout
    if layers == "auto":
        layers = balance_weights(source.config, stages=parallel.pipeline, tensor=parallel.tensor)
    name = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    spec = BuildSpec(model=source.config, parallel=parallel, layout=layout_string(layers), dtype=DTYPES[name])
    with expected_warnings_ignored():
        model = build_to_generate(spec)
    at = groups.position()
    collective_errors.on_every_rank(
        lambda: load_weights(
            model,
            source.tensors,
            source=str(source.path),
            first_layer=sum(layers[: at.pp_rank]),
            tensor_rank=at.tp_rank,
            tensor_size=at.tp_size,
            elsewhere=canonical_shapes(source.config) if at.pp_size > 1 else (),
        )
    )
    return model


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.image_id is not None and tokenizer.image_id != config.image_token_id:
        raise DataError(
            f"{tokenizer.path}: <image_placeholder> has id {tokenizer.image_id}, but the model's image token is "
            f"{config.image_token_id}; give the tokenizer that the model was trained with"
        )
    if tokenizer.vocab_size > config.llm.vocab_size:
        raise DataError(
            f"{tokenizer.path}: {tokenizer.vocab_size} tokens, but the model has {config.llm.vocab_size} vocabulary "
            "rows; give the tokenizer that the model was trained with"
        )
