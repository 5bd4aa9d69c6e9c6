"""Intermediate results of MegaVL's and transformers' model, compared module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from launch.bench.engines.random_models import relative_error
from tests.numerics.native_pair import Pair

Take = Callable[[tuple[Any, ...], dict[str, Any], Any], torch.Tensor]
"""From a module's arguments and output to the tensor that is compared."""


def output(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> torch.Tensor:
    """The output, or the first of them."""
    return out[0] if isinstance(out, (tuple, list)) else getattr(out, "last_hidden_state", out)


def argument(index: int) -> Take:
    """One of the positional arguments."""
    return lambda args, kwargs, out: args[index]


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> torch.Tensor:
    """The hidden states, by position or by name."""
    return args[0] if args else kwargs["hidden_states"]


@dataclass(frozen=True)
class Intermediate:
    """One intermediate result in both models."""

    name: str
    ours: nn.Module
    theirs: nn.Module
    take_ours: Take = output
    take_theirs: Take = output
    arrange: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    """Ours to the reference's layout."""


def intermediates(pair: Pair) -> list[Intermediate]:
    """Every intermediate of the vision path, and the decoder's layers."""
    return [*_siglip(pair), *(_sam(pair) if pair.config.sam else ()), *_adaptor(pair), *_decoder(pair)]


def _siglip(pair: Pair) -> Iterator[Intermediate]:
    ours, theirs = pair.ours.vision.siglip, pair.theirs.model.vision_model
    theirs = getattr(theirs, "vision_model", theirs)  # nested before transformers 5.10
    yield Intermediate("siglip pixels", ours, theirs.embeddings, argument(0), argument(0))
    yield Intermediate("siglip patch_embed", ours.patch_embed, theirs.embeddings.patch_embedding)
    yield Intermediate("siglip + pos_embed", ours.blocks[0], theirs.embeddings, argument(0))
    for i, (block, layer) in enumerate(zip(ours.blocks, theirs.encoder.layers, strict=True)):
        yield Intermediate(f"siglip block {i} attn", block.attn, layer.self_attn)
        yield Intermediate(f"siglip block {i} mlp", block.mlp, layer.mlp)
        yield Intermediate(f"siglip block {i}", block, layer)
    yield Intermediate("siglip norm", ours.norm, theirs.post_layernorm)


def _sam(pair: Pair) -> Iterator[Intermediate]:
    ours, model = pair.ours.vision.sam, pair.theirs.model
    theirs, proj = model.high_res_vision_model.vision_encoder, model.high_res_vision_proj
    yield Intermediate("sam pixels", ours, theirs.patch_embed, argument(0), argument(0))
    yield Intermediate("sam patch_embed", ours.patch_embed, theirs.patch_embed, arrange=lambda x: x.permute(0, 2, 3, 1))
    yield Intermediate("sam + pos_embed", ours.blocks[0], theirs.layers[0], argument(0), hidden_input)
    for i, (block, layer) in enumerate(zip(ours.blocks, theirs.layers, strict=True)):
        yield Intermediate(f"sam block {i} attn", block.attn, layer.attn)
        yield Intermediate(f"sam block {i} mlp", block.mlp, layer.mlp)
        yield Intermediate(f"sam block {i}", block, layer)
    yield Intermediate("sam neck", ours.neck, theirs.neck)
    yield Intermediate("sam neck_hd", ours.neck_hd, model.high_res_vision_neck)
    # Both branches use these modules, first the main one.
    yield Intermediate("sam interpolation", ours.downsamples[0], proj.conv1, argument(0), argument(0))
    yield Intermediate("sam downsample 0", ours.downsamples[0], proj.conv1)
    yield Intermediate("sam downsample 1", ours.downsamples[1], proj.conv2)
    yield Intermediate("sam sum", ours, model.aligner, output, argument(1))


def _adaptor(pair: Pair) -> Iterator[Intermediate]:
    ours, theirs = pair.ours.vision.adaptor, pair.theirs.model.aligner
    if pair.config.sam is None:
        yield Intermediate("adaptor first", ours.get_submodule("layers.0"), theirs.linear1)
        yield Intermediate("adaptor gelu", ours.get_submodule("layers.2"), theirs.linear2, argument(0), argument(0))
    else:
        yield Intermediate("adaptor high", ours.high_up_proj, theirs.high_res_vision_proj)
        yield Intermediate("adaptor low", ours.low_up_proj, theirs.vision_proj)
        yield Intermediate("adaptor gelu", ours.get_submodule("layers.1"), theirs.proj, argument(0), argument(0))
    yield Intermediate("adaptor", ours, theirs)


def _decoder(pair: Pair) -> Iterator[Intermediate]:
    ours, theirs = pair.ours.language_model.decoder, pair.theirs.model.language_model
    for i, (layer, reference) in enumerate(zip(ours.layers, theirs.layers, strict=True)):
        if i == 0:
            yield Intermediate("embeddings", layer, reference, hidden_input, hidden_input, lambda x: x.transpose(0, 1))
        yield Intermediate(f"decoder layer {i}", layer, reference, arrange=lambda x: x.transpose(0, 1))
    yield Intermediate("decoder norm", ours.final_layernorm, theirs.norm, arrange=lambda x: x.transpose(0, 1))


@contextmanager
def recording(found: list[Intermediate]) -> Iterator[Callable[[], dict[str, float]]]:
    """Record every intermediate; the yielded function gives the relative error of each pass by name."""
    seen: dict[tuple[str, str], list[torch.Tensor]] = {}
    handles = []

    def watch(module: nn.Module, side: str, name: str, take: Take) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen.setdefault((side, name), []).append(take(args, kwargs, out).detach().clone())

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def errors() -> dict[str, float]:
        result = {}
        for item in found:
            ours, theirs = (seen[side, item.name] for side in ("ours", "theirs"))
            assert len(ours) == len(theirs), f"{item.name}: {len(ours)} passes against {len(theirs)}"
            for number, (a, b) in enumerate(zip(ours, theirs)):
                name = item.name if len(ours) == 1 else f"{item.name} ({('main', 'hd')[number]})"
                result[name] = relative_error(item.arrange(a), b)
        return result

    for item in found:
        watch(item.ours, "ours", item.name, item.take_ours)
        watch(item.theirs, "theirs", item.name, item.take_theirs)
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
