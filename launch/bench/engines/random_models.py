"""Models with random weights: their tensors by canonical name, transformers' class around them, and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from megavl.config.model import ModelConfig
from megavl.convert.native_format import side_files
from megavl.convert.table import NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED, weight_rows
from megavl.convert.tokenizer_files import TokenizerIds
from megavl.weights.canonical_names import canonical_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOS, EOS, PAD, IMAGE = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<image_placeholder>"
"""Special tokens of `write_tokenizer`, with the ids 0 to 3."""


def random_weights(config: ModelConfig, *, seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a model by canonical name, from a generator seeded by the name's position.

    Tensors that start at zero in training get values too, since zeros would hide the branches that use them.
    """
    for index, (name, shape) in enumerate(canonical_shapes(config).items()):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        noise = torch.randn(shape, generator=generator)
        is_norm = "norm" in name or (name.startswith(("vision.sam.neck.", "vision.sam.neck_hd.")) and len(shape) == 1)
        if is_norm and name.endswith("weight"):
            yield name, 1.0 + 0.1 * noise
        elif name.endswith("hd_alpha_downsamples"):
            yield name, torch.full(shape, 0.7)
        else:
            fan_in = max(1, noise[0].numel()) if noise.dim() > 1 else 100
            yield name, noise * fan_in**-0.5


def random_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """`random_weights` as a dictionary, with position embeddings that count as much as the patches do."""
    return {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.5
        if name.endswith("pos_embed")
        else tensor
        for name, tensor in random_weights(config, seed=seed)
    }


def transformers_model(config: ModelConfig, weights: dict[str, torch.Tensor], *, attention: str) -> PreTrainedModel:
    """transformers' class in fp32, with the tensors that MegaVL would export."""
    model = new_transformers_model(config, attention=attention, dtype=torch.float32)
    state: dict[str, torch.Tensor] = {}
    for row in weight_rows(config, "native"):
        state |= zip(row.keys, row.transform.from_canonical(weights[row.name]))
    model.load_state_dict({name_in(model, key): tensor for key, tensor in state.items()}, strict=True)
    return model.eval()


def name_in(model: PreTrainedModel, key: str) -> str:
    """Name that this release's class gives to a tensor of a native file: from 5.10 on, SigLIP is not nested in it."""
    nested = hasattr(model.model.vision_model, "vision_model")
    return key if nested else key.replace(NATIVE_SIGLIP, NATIVE_SIGLIP_UNNESTED, 1)


def new_transformers_model(config: ModelConfig, *, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' class with the weights that transformers initialises it with."""
    from megavl.generate.against_transformers import native_class  # imports megatron-core

    model_class = native_class(config)
    ids = TokenizerIds(bos=0, eos=1, pad=2, image=config.image_token_id)
    # The towers take their type from their own entries, whatever type the whole model is given.
    raw = side_files(config, ids=ids, dtype=str(dtype).removeprefix("torch."))["config.json"]
    hf_config = model_class.config_class.from_dict(raw)
    return model_class._from_config(hf_config, attn_implementation=attention, dtype=dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    assert expected.isfinite().all() and expected.std() > 1e-3 * expected.abs().max(), "the reference is degenerate"
    return float((found - expected).abs().max() / expected.abs().max())


def write_tokenizer(folder: Path) -> Path:
    """Write a byte-level BPE tokenizer; each colour with the blank before it is a single token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BOS, EOS, PAD, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["User: which colour is it? Assistant: red green blue\n\n"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
