"""The three programs that take a measured step: MegaVL, MegaVL with megatron-core's local attention, transformers.

All get the same tokens, labels and images, and on request the same weights. Everything that a step reads is on the
device before it begins. transformers gets normalised pixels; MegaVL normalises uint8 images inside the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol
from unittest import mock

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from launch.bench.engines.random_models import name_in, new_transformers_model, transformers_model
from launch.bench.engines.step_marks import Marks
from launch.bench.engines.step_work import Work
from megavl.convert.table import weight_rows
from megavl.data.batch import Batch
from megavl.generate.against_transformers import pixel_tensors
from megavl.model import decoder
from megavl.model.build import BuildSpec
from megavl.model.trainable import is_vision, part_of
from megavl.parallel import cpu_runtime, groups
from megavl.train.batch_broadcast import next_step
from megavl.train.model_chunks import build_model_chunks
from megavl.train.optimizer import build_optimizer, set_learning_rate
from megavl.train.profile.calibration_steps import MICRO_BATCHES, RandomSteps
from megavl.train.step import train_step
from megavl.weights.canonical_names import canonical_name
from megavl.weights.dtypes import DTYPE_OF_PRECISION

SIDES = ("megavl", "megatron-local", "transformers")


class Side(Protocol):
    """A model with its optimizer."""

    def prepare(self, batches: list[Batch], kind: str) -> Any:
        """Bring a step's micro-batches into the form that `step` takes, on the device."""

    def step(self, data: Any) -> Any:
        """One optimizer step; its loss, nats per token, as a number or a tensor of one."""

    def update_bytes(self, kind: str) -> int:
        """Fewest bytes that an update can read and write."""


class GivenSteps:
    """A source that repeats the same micro-batches."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def get(self, step: int) -> list[Batch]:
        """The micro-batches."""
        return self.batches


def made_up_batches(work: Work, kind: str, *, steps: int) -> list[list[Batch]]:
    """Random micro-batches for some steps, equal on every side: one document a sequence, images as packing allows."""
    alone = groups.Position(rank=0, world_size=1, tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=0, dp_size=1)
    source = RandomSteps(work.recipe, images=work.images(kind), position=alone)
    pulls = -(-work.micro_batches // MICRO_BATCHES)
    found = [[batch for pull in range(pulls) for batch in source.get(pull)] for _ in range(steps)]
    return [batches[: work.micro_batches] for batches in found]


class LocalAttention(DotProductAttention):
    """megatron-core's own attention on one unpacked sequence, called as MegaVL calls its attention."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """(T, A, D) to (T, 1, A x D)."""
        assert len(packed_seq_params.borders) == 2, "this attention knows nothing of segments: one document a sequence"
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))  # (T, 1, A, D)
        out: torch.Tensor = super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        return out


class MegaVL:
    """MegaVL's training step on one rank; `local` replaces its attention by megatron-core's own."""

    def __init__(
        self, work: Work, *, marks: Marks, lr: float, local: bool, weights: dict[str, torch.Tensor] | None
    ) -> None:
        recipe, self.marks = work.recipe, marks
        if local:
            # Transformer Engine, where it is installed, would bring its own attention.
            recipe = replace(recipe, training=replace(recipe.training, transformer_engine="never"))
        precision = recipe.training.precision
        spec = BuildSpec.of(recipe, layout=None, dtype=DTYPE_OF_PRECISION[precision])
        if local and spec.compiled == "layers":
            # Whole layers call MegaVL's own attention.
            spec = replace(spec, compile="kernels")
        # Drawing a large model's weights on the host takes a minute.
        drawn = contextlib.nullcontext() if weights is not None else _nothing_drawn()
        with _part(work.part), _modules(local=local), drawn:
            self.model = build_model_chunks(spec)
        (chunk,) = self.model.chunks
        if weights is not None:
            for name, parameter in chunk.module.named_parameters():
                parameter.data.copy_(weights[canonical_name(name)])
        else:
            draw_on_device(chunk.module)
        self.optimizer = build_optimizer(self.model, optimizer=recipe.optimizer, bf16=precision == "bf16")
        set_learning_rate(self.optimizer, lr=lr, weight_decay=0.0)
        _end_part(chunk.module, work)
        layers = chunk.module.language_model.decoder
        marks.watch(chunk.module, layers, getattr(layers, "final_layernorm", None))
        finalize, update = chunk.config.finalize_model_grads_func, self.optimizer.step

        def marked_finalize(*args: Any, **kwargs: Any) -> Any:
            marks.mark("communication")
            return finalize(*args, **kwargs)

        def marked_update(loss: torch.Tensor) -> Any:
            marks.mark("optimizer")
            out = update(loss)
            marks.mark("other")
            return out

        chunk.config.finalize_model_grads_func = marked_finalize
        self.optimizer.step = marked_update

    def prepare(self, batches: list[Batch], kind: str) -> tuple[Batch, ...]:
        """As the training loop gets it."""
        return next_step(GivenSteps(batches), 0)

    def step(self, data: tuple[Batch, ...]) -> float:
        """As the training loop takes it."""
        self.marks.mark("step")
        result = train_step(self.model, self.optimizer, data, stop_flag=False)
        assert not result.skipped, f"loss {result.loss}: the step was skipped"
        return result.loss

    def update_bytes(self, kind: str) -> int:
        """Gradient, master weight and two moments in fp32, the latter three written back; and the bf16 weight."""
        (chunk,) = self.model.chunks
        named = [(name, weight) for name, weight in chunk.module.named_parameters() if weight.requires_grad]
        moved = [weight for name, weight in named if kind == "multimodal" or not is_vision(name)]
        return sum(weight.numel() * (28 + (2 if weight.dtype == torch.bfloat16 else 0)) for weight in moved)


@contextlib.contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Leave the weights of modules that are built as their memory is, instead of drawing random ones."""
    drawing = ("normal_", "trunc_normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_")
    with mock.patch.multiple(torch.nn.init, **dict.fromkeys(drawing, lambda tensor, *args, **kwargs: tensor)):
        yield


def draw_on_device(module: torch.nn.Module) -> None:
    """Random weights where they are: matrices like a new model's, biases zero, other vectors one."""
    for name, weight in module.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(std=0.02)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)


@contextlib.contextmanager
def _part(part: str) -> Iterator[None]:
    """Make megatron-core build the stage of the pipeline rank that `part` names."""
    first, last = (lambda **_: part != "last"), (lambda **_: part != "first")
    with mock.patch.multiple(mpu, is_pipeline_first_stage=first, is_pipeline_last_stage=last):
        yield


def _modules(*, local: bool) -> contextlib.AbstractContextManager[Any]:
    """Replace MegaVL's attention by megatron-core's own where `local`."""
    if not local:
        return contextlib.nullcontext()
    return mock.patch.object(decoder, "PackedAttention", LocalAttention)


def _end_part(stage: torch.nn.Module, work: Work) -> None:
    """Give a first stage a loss, and a last stage its input."""
    if work.part == "first":
        # The mean over the channels, as a loss per token (1, T).
        stage.register_forward_hook(lambda module, args, out: out.float().mean(-1).transpose(0, 1))
    if work.part == "last":
        weight = next(stage.parameters())
        shape = (work.recipe.data.seq_length, 1, work.recipe.model.llm.hidden_size)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        stage.register_forward_pre_hook(lambda *_: stage.set_input_tensor(hidden.detach().requires_grad_()))


class Transformers:
    """transformers' own class with SDPA, its loss, and torch's fused AdamW over weights of the training type."""

    def __init__(
        self,
        work: Work,
        *,
        marks: Marks,
        lr: float,
        weights: dict[str, torch.Tensor] | None,
        checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        assert work.part == "whole", "transformers has no pipeline stages"
        recipe, self.marks, self.config = work.recipe, marks, work.recipe.model
        self.dtype = DTYPE_OF_PRECISION[recipe.training.precision]
        self.device = cpu_runtime.device()
        cpu_runtime.prepare_products(self.dtype)
        if weights is not None:
            model = transformers_model(self.config, weights, attention="sdpa").to(self.device, self.dtype)
        else:
            with self.device:
                model = new_transformers_model(self.config, attention="sdpa", dtype=self.dtype)
        rows = weight_rows(self.config, "native")
        keys = [key for row in rows if part_of(row.name) in recipe.trainable_parts for key in row.keys]
        trained = {name_in(model, key) for key in keys}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.train()
        if compiled:
            # Marks would break the graph, so a compiled model is timed as a whole.
            self.model.compile()
        else:
            marks.watch(model, model.model.language_model, model.model.language_model.norm)
        optimizer = recipe.optimizer
        self.clip = optimizer.clip_grad
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=0.0, fused=True
        )

    def prepare(self, batches: list[Batch], kind: str) -> list[dict[str, Any]]:
        """Arguments of the model for every micro-batch."""
        total = torch.tensor(float(sum(len(batch.loss_rows) for batch in batches)))
        found = []
        for batch in batches:
            labels = torch.full_like(batch.tokens, -100).index_copy(0, batch.loss_rows, batch.labels)
            labels = labels[None].to(self.device)
            inputs: dict[str, Any] = {"input_ids": batch.tokens[None].to(self.device), "labels": labels}
            # Labels are shifted already; the sum over the step's tokens is what gradient accumulation needs.
            inputs |= {"shift_labels": labels, "num_items_in_batch": total.to(self.device)}
            if kind == "multimodal":
                pixels = pixel_tensors(batch.images, config=self.config)
                inputs |= {name: value.to(self.device, self.dtype) for name, value in pixels.items()}
            found.append(inputs)
        return found

    def step(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Accumulate, clip, update."""
        self.marks.mark("step")
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for inputs in data:
            loss = self.model(**inputs, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        self.marks.mark("optimizer")
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.marks.mark("other")
        return torch.stack(losses).sum()

    def update_bytes(self, kind: str) -> int:
        """Gradient, weight and two moments in the type of the step, the latter three written back."""
        return sum(7 * weight.numel() * weight.element_size() for weight in self.parameters if weight.grad is not None)
