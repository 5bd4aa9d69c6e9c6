"""Hooks on the borders between the blocks of a stage, in the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from megavl.model.vl_model import DeepseekVL


def add_block_hooks(stage: DeepseekVL, reach: Callable[[str], None]) -> list[RemovableHandle]:
    """Call `reach` with a border's name whenever a micro-batch reaches that border.

    - `begin`: it enters the stage.
    - `embedded`: it enters the decoder layers.
    - `layers`: it enters the final norm and the head.
    - `head`: the head's backward pass starts.
    - `head back`, `layers back`: the backward pass of head or layers ends; not called without a gradient.

    Args:
        stage: one pipeline stage; only a stage with a head reaches the head's borders.
        reach: called from the thread that runs the pass.

    Returns:
        Handles that remove the hooks.
    """
    decoder = stage.language_model.decoder

    def begin(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        reach("begin")

    def enter_layers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reach("embedded")
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden is None:
            # An inner stage received its hidden states before the call.
            hidden = decoder.input_tensor
        assert hidden is not None, "the decoder was called without hidden states"
        if hidden.requires_grad:
            hidden.register_hook(lambda _: reach("layers back"))

    def leave_layers(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        reach("layers")
        if args[0].requires_grad:
            args[0].register_hook(lambda _: reach("head back"))

    def leave_head(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: reach("head"))
        else:
            reach("head")

    handles = [
        stage.register_forward_pre_hook(begin),
        decoder.register_forward_pre_hook(enter_layers, with_kwargs=True),
    ]
    if stage.post_process:
        handles += [
            decoder.final_layernorm.register_forward_pre_hook(leave_layers),
            stage.register_forward_hook(leave_head),
        ]
    return handles
