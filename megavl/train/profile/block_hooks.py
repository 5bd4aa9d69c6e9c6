"""Where one block of a stage hands over to the next, in the forward and in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from megavl.model.vl_model import DeepseekVL


def mark_blocks(stage: DeepseekVL, mark: Callable[[str], None]) -> list[RemovableHandle]:
    """Have `mark` called with a name whenever a micro-batch passes a border; forward hooks, and gradient hooks back.

    Names in order: `begin`; `embedded` (hidden states enter the layers), `layers` (they enter norm and head), `head`
    (its backward pass begins); `head back` and `layers back` (the gradient leaves head and layers). A border that no
    gradient crosses has no mark on the way back.

    Args:
        stage: one pipeline stage; without a head on it, nothing marks the head's borders.
        mark: called from the thread that runs the pass.

    Returns:
        What `remove()` ends it with.
    """
    decoder = stage.language_model.decoder

    def begin(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        mark("begin")

    def enter_layers(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mark("embedded")
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if hidden is None:
            # An inner stage was given its hidden states beforehand.
            hidden = decoder.input_tensor
        assert hidden is not None, "the decoder was called without hidden states"
        if hidden.requires_grad:
            hidden.register_hook(lambda _: mark("layers back"))

    def leave_layers(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        mark("layers")
        if args[0].requires_grad:
            args[0].register_hook(lambda _: mark("head back"))

    def leave_head(module: torch.nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: mark("head"))
        else:
            mark("head")

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
