"""A MODEL argument: a MegaVL checkpoint, the directory that holds checkpoints, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megavl.checkpoint.reader import load_model_config, open_model_tensors, resolve
from megavl.config.errors import DataError
from megavl.config.model import ModelConfig
from megavl.config.recipe import ParallelConfig, RecomputeConfig
from megavl.convert.hf_read import flat_view, is_hf_folder, open_hf_tensors, read_config
from megavl.data.tokenizer import Tokenizer, open_tokenizer
from megavl.generate.weights import LazyTensor, load_weights
from megavl.model.build import build_model
from megavl.model.vl_model import DeepseekVL
from megavl.parallel import groups

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk: everything but its weights has been read."""

    path: Path
    """Checkpoint or Hugging Face folder."""
    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, LazyTensor]
    """Weights by flat name."""


def find_model(path: str | Path) -> ModelSource:
    """Read sizes, tokenizer and list of weights.

    Raises:
        CheckpointError: nothing there, damaged, or not a DeepSeek-VL model.
        DataError: the tokenizer is missing or does not belong to the model.
    """
    path = Path(path)
    tensors: Mapping[str, LazyTensor]
    if is_hf_folder(path):
        config, fmt = read_config(path)
        tensors = flat_view(open_hf_tensors(path), config=config, fmt=fmt)
        tokenizer = open_tokenizer(path)
    else:
        path = resolve(path)
        config = load_model_config(path)
        tensors = open_model_tensors(path)
        tokenizer = open_tokenizer(_tokenizer_in(path / "tokenizer"))
    _check_tokenizer(tokenizer, config)
    return ModelSource(path=path, config=config, tokenizer=tokenizer, tensors=tensors)


@contextmanager
def loaded(source: ModelSource, *, dtype: str | None = None) -> Iterator[DeepseekVL]:
    """The model with its weights, in eval mode, in a world of one process that ends with the context.

    Args:
        source: from `find_model`.
        dtype: float32 or bfloat16; None means float32 on the CPU and bfloat16 on CUDA.
    """
    alone = ParallelConfig()
    groups.start(alone, seed=0)
    try:
        name = dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
        model = build_model(
            source.config,
            parallel=alone,
            recompute=RecomputeConfig(),
            layout=None,
            dtype=_DTYPES[name],
            train=(),
            seed=0,
        )
        load_weights(model, source.tensors, source=str(source.path))
        yield model.eval()
    finally:
        groups.stop()


def _tokenizer_in(folder: Path) -> Path:
    """A checkpoint keeps a SentencePiece file under the name it had."""
    models = sorted(folder.glob("*.model"))
    return models[0] if len(models) == 1 and not (folder / "tokenizer.json").is_file() else folder


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
