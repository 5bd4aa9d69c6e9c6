"""Measures where the time of a training step goes, by marks on the device's own clock.

A mark says which region begins; the time up to the next mark belongs to it. Marks do not make the host wait for the
device. In the backward pass, regions begin where gradients reach the tensors that the forward pass handed over.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import nn

REGIONS = ("vision", "decoder", "head", "communication", "optimizer", "other")
"""`vision` has encoders, adaptor and embedding. `head` has final norm, head and loss. `communication` reduces gradients
after the last backward pass; on one rank it is bookkeeping. `optimizer` has clipping and update. `other` zeroes
gradients and sums up the step."""


class Marks:
    """Marks of the steps since `clear`."""

    def __init__(self) -> None:
        self.on_cuda = torch.cuda.is_available()
        self._marks: list[tuple[str, Any]] = []

    def clear(self) -> None:
        """Forget all marks."""
        self._marks.clear()

    def mark(self, region: str) -> None:
        """A region begins: `step` at the start of each step, or one of `REGIONS`."""
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((region, event))
        else:
            self._marks.append((region, time.perf_counter()))

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every region in each step, and of the whole step under `step`. Waits for the device."""
        if self.on_cuda:
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        for (region, begin), (_, end) in zip(self._marks, self._marks[1:]):
            if region == "end":
                continue
            if region == "step":
                found.append(defaultdict(float))
            seconds = begin.elapsed_time(end) / 1000 if self.on_cuda else end - begin
            found[-1]["other" if region == "step" else region] += seconds
            found[-1]["step"] += seconds
        return [{name: step.get(name, 0.0) for name in ("step", *REGIONS)} for step in found]

    def watch(self, whole: nn.Module, decoder: nn.Module, norm: nn.Module) -> None:
        """Mark the passes through a model.

        Args:
            whole: called once for each micro-batch.
            decoder: its layers with the final norm; called with the hidden states as `hidden_states` (megatron-core,
                whose later stages find them in `input_tensor`) or `inputs_embeds` (transformers).
            norm: the final norm; None where the part has no head.
        """
        whole.register_forward_pre_hook(lambda *_: self.mark("vision"))
        decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)
        if norm is not None:
            norm.register_forward_pre_hook(self._leave_decoder)

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mark("decoder")
        hidden = kwargs.get("hidden_states", kwargs.get("inputs_embeds"))
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _: self.mark("vision"))

    def _leave_decoder(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.mark("head")
        if args[0].requires_grad:
            args[0].register_hook(lambda _: self.mark("decoder"))
