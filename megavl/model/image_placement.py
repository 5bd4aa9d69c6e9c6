"""Which rank turns the images of a micro-batch into embeddings: one row per `parallel.vision`.

Legend: I images, P tokens per image, H hidden, V towers, W tower width, C canvas side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu

from megavl.model.vision import VisionEncoder
from megavl.parallel.images import gather_images, shares


@dataclass(frozen=True, kw_only=True)
class ImagePlacement:
    """How the first stage gets the embeddings of a micro-batch's images."""

    embeddings: Callable[[VisionEncoder, torch.Tensor], torch.Tensor]
    """(encoder, images) to (I, P, H); I is at least 1."""
    own_images: Callable[[torch.Tensor], int]
    """Images whose gradient reaches the weights of this rank directly."""
    dummy_image: Callable[[VisionEncoder, torch.Tensor], torch.Tensor]
    """(encoder, images) to a zero that depends on every trainable weight that `embeddings` trains directly."""


def _share(images: torch.Tensor) -> range:
    parts = shares(images.shape[0], ranks=mpu.get_tensor_model_parallel_world_size())
    return parts[mpu.get_tensor_model_parallel_rank()]


def _embed_share(vision: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    share = _share(images)
    if len(share):
        own = vision(images[share.start : share.stop])
    else:
        # Every rank must go backward through a decoder, even a frozen one, or none: its collectives meet there.
        shape = (0, vision.image_tokens, vision.out_width)
        own = vision.siglip.pos_embed.new_empty(shape, requires_grad=vision.trains)
    return gather_images(own, count=images.shape[0], group=mpu.get_tensor_model_parallel_group())


def _project(vision: VisionEncoder, features: torch.Tensor) -> torch.Tensor:
    return vision.project(features.unbind(1))


def _dummy_image(vision: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    return 0.0 * vision(images.new_zeros(1, *images.shape[1:])).sum()


def _dummy_features(vision: VisionEncoder, features: torch.Tensor) -> torch.Tensor:
    return 0.0 * _project(vision, features.new_zeros(1, *features.shape[1:])).sum()


PLACEMENTS: Mapping[str, ImagePlacement] = {
    "recompute": ImagePlacement(
        embeddings=lambda vision, images: vision(images), own_images=len, dummy_image=_dummy_image
    ),
    "split_tp": ImagePlacement(
        embeddings=_embed_share, own_images=lambda images: len(_share(images)), dummy_image=_dummy_image
    ),
    "split_all": ImagePlacement(embeddings=_project, own_images=len, dummy_image=_dummy_features),
}
"""Images are uint8 (I, 3, C, C); under `split_all` the towers' features (I, V, P, W) replace them."""
