"""`parallel.vision: split_all`: all tensor x pipeline ranks encode shares of the images before the pipeline starts.

Each rank holds a copy of the towers. Their features go to the first stage, where the adaptor and everything above it
run as usual. Where a tower trains, the gradients of the features return to the ranks that computed them. Each rank
turns them into weight gradients, whose sum joins the first stage's gradient buffer before it is reduced over replicas.
Only the first stage's copy belongs to the model, the optimizer and checkpoints; the others are copied from it.

Legend: I images, V towers (1 or 2), P tokens per image, W tower width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel

from megavl.config.recipe import ENCODED_AT_ONCE
from megavl.data.batch import Batch
from megavl.model.build import BuildSpec, build_towers
from megavl.model.vision import Features, VisionTowers
from megavl.parallel.images import copy_from, exchange_images, shares, sum_over


class SplitEncoders:
    """The towers of this rank, and what its backward pass needs of the current step."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        spec: BuildSpec,
    ) -> None:
        """Build the towers where the first stage's are not; `copy_weights` must follow once weights are loaded."""
        self._group = mpu.get_model_parallel_group()
        self._tensor = mpu.get_tensor_model_parallel_world_size()
        # The first `tensor` ranks of the group are the first stage.
        self._first = chunks[0] if mpu.is_pipeline_first_stage() else None
        assert (self._group.rank() < self._tensor) == (self._first is not None), "the group lists stages in order"
        self._towers: VisionTowers = build_towers(spec) if self._first is None else self._first.module.vision
        self._weights = [weight for name, weight in self._towers.named_parameters() if not name.startswith("adaptor.")]
        self._trained = [weight for weight in self._weights if weight.requires_grad]
        # A tower whose first layers train would keep all its activations until the pipeline is done.
        self._rerun = [name for name, part in (("siglip", "siglip"), ("sam", "sam_trunk")) if part in spec.train]
        self._shape = (2 if spec.model.sam else 1, spec.model.image_tokens, spec.model.siglip.width)
        self._own: list[Features] = []
        self._features = self._empty()
        self._given: list[torch.Tensor] = []
        self._counts: tuple[int, ...] = ()
        self._text = True
        self._stale = False

    def copy_weights(self) -> None:
        """Give every rank the first stage's weights, frozen ones too. Collective."""
        self._copy(self._weights)

    def encode(self, batches: Sequence[Batch]) -> tuple[Batch, ...]:
        """Encode this rank's share and hand the features to the first stage; its weights must be whole. Collective.

        Args:
            batches: the step's micro-batches, whose images are this rank's share.

        Returns:
            The same with features (I, V, P, W) as images: all of them on the first stage, none elsewhere.
        """
        self._text = batches[0].modality == "text"
        counts = [batch.image_count for batch in batches]
        self._counts = tuple(len(part) for part in shares(sum(counts), ranks=self._group.size()))
        self._features = self._spread(batches) if sum(counts) else self._empty()
        pieces = self._features.split(counts) if self._first is not None else [self._features] * len(counts)
        # A leaf for each micro-batch: the gradient of one does not touch the others.
        self._given = [piece.detach().requires_grad_(bool(self._trained)) for piece in pieces]
        return tuple(dataclasses.replace(batch, images=given) for batch, given in zip(batches, self._given))

    def backward(self) -> None:
        """Add the towers' gradients to the first stage's buffer; after the schedule, before gradients are reduced.

        Collective. Under overlap every trained weight is announced, on text steps too: its bucket waits for all.
        """
        if self._trained:
            self._reduce()
        self._own, self._given, self._features = [], [], self._empty()

    def _reduce(self) -> None:
        if any(self._counts):
            sums = sum_over(self._weight_gradients(self._return()), group=self._group)
            if self._first is not None:
                for weight, gradient in zip(self._trained, sums):
                    weight.main_grad.add_(gradient)  # type: ignore[union-attr]
        # Without images of its own too, where those of other replicas train the towers.
        self._stale = self._stale or not self._text
        if self._first is not None and self._first.ddp_config.overlap_grad_reduce:
            for weight in self._trained:
                self._first.param_to_bucket_group[weight].register_grad_ready(weight, self._first.force_all_reduce)

    def _spread(self, batches: Sequence[Batch]) -> torch.Tensor:
        """(I, V, P, W) of all images on the first stage, (0, V, P, W) elsewhere."""
        if self._stale:
            self._copy(self._trained)
            self._stale = False
        images = [image for batch in batches for image in batch.images]
        trains = bool(self._trained) and torch.is_grad_enabled()
        with torch.set_grad_enabled(trains):
            encoded = [
                self._towers.encode(torch.stack(images[first : first + ENCODED_AT_ONCE]), rerun=self._rerun)
                for first in range(0, len(images), ENCODED_AT_ONCE)
            ]
        own = torch.cat([torch.stack([tower.detach() for tower in part], dim=1) for part in encoded] or [self._empty()])
        self._own = encoded if trains else []
        del encoded
        send = [own.shape[0] if rank < self._tensor else 0 for rank in range(self._group.size())]
        receive = self._counts if self._first is not None else [0] * self._group.size()
        return exchange_images(torch.cat([own] * self._tensor), send=send, receive=receive, group=self._group)

    def _return(self) -> torch.Tensor:
        """Gradients (I, V, P, W) of this rank's features; the ranks of the first stage take turns in sending."""
        me, ranks = self._group.rank(), range(self._group.size())
        send = [self._counts[rank] if self._first is not None and rank % self._tensor == me else 0 for rank in ranks]
        receive = [self._counts[me] if me % self._tensor == rank else 0 for rank in ranks]
        rows = self._empty()
        if self._first is not None:
            # They overwrite the features, which nobody needs any more: of 2,304 sequences with 5 images they take 25
            # GiB.
            for piece in self._given:
                values = piece.detach()
                if piece.grad is None:
                    values.zero_()
                else:
                    values.copy_(piece.grad)
                piece.grad = None
            parts = self._features.split(list(self._counts))
            rows = torch.cat([part for part, count in zip(parts, send) if count] or [rows])
        return exchange_images(rows, send=send, receive=receive, group=self._group)

    def _weight_gradients(self, gradients: torch.Tensor) -> list[torch.Tensor]:
        """At least fp32, of this rank's images."""
        sums = [
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in self._trained
        ]
        for features, piece in zip(self._own, gradients.split(ENCODED_AT_ONCE)):
            pairs = [(tower, gradient) for tower, gradient in zip(features, piece.unbind(1)) if tower.requires_grad]
            found = torch.autograd.grad(
                [tower for tower, _ in pairs], self._trained, [gradient for _, gradient in pairs], allow_unused=True
            )
            for total, gradient in zip(sums, found):
                if gradient is not None:
                    total.add_(gradient)
            del found
        return sums

    def _copy(self, weights: Sequence[torch.Tensor]) -> None:
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            group = mpu.get_pipeline_model_parallel_group()
            copy_from(mpu.get_pipeline_model_parallel_first_rank(), weights, group=group)

    def _empty(self) -> torch.Tensor:
        like = self._weights[0]
        return torch.empty((0, *self._shape), dtype=like.dtype, device=like.device)
