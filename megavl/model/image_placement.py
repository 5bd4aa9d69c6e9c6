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

Encoder = Callable[[VisionEncoder, torch.Tensor], torch.Tensor]
"""(encoder, images) to embeddings (I, P, H)."""


@dataclass(frozen=True, kw_only=True)
class ImagePlacement:
    """How the first stage gets the embeddings of a micro-batch's images."""

    encode: Encoder
    """Embeds images on this rank alone."""
    embeddings: Encoder
    """Embeds all images of a micro-batch, at least 1, together with the ranks that share them."""
    own_images: Callable[[torch.Tensor], int]
    """Images whose gradient reaches the weights of this rank directly."""

    def dummy_image(self, vision: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
        """A zero that depends on every trainable weight of `encode`; `images` give the shape alone."""
        return 0.0 * self.encode(vision, images.new_zeros(1, *images.shape[1:])).sum()


def _encode(vision: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = vision(images)
    return out


def _project(vision: VisionEncoder, features: torch.Tensor) -> torch.Tensor:
    return vision.project(features.unbind(1))


def _share(images: torch.Tensor) -> range:
    parts = shares(len(images), ranks=mpu.get_tensor_model_parallel_world_size())
    return parts[mpu.get_tensor_model_parallel_rank()]


def _encode_share(vision: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    share = _share(images)
    if len(share):
        own = vision(images[share.start : share.stop])
    else:
        # Every rank must go backward through a decoder, even a frozen one, or none: its collectives meet there.
        shape = (0, vision.image_tokens, vision.out_width)
        own = vision.siglip.pos_embed.new_empty(shape, requires_grad=vision.trains)
    return gather_images(own, count=len(images), group=mpu.get_tensor_model_parallel_group())


PLACEMENTS: Mapping[str, ImagePlacement] = {
    "recompute": ImagePlacement(encode=_encode, embeddings=_encode, own_images=len),
    "split_tp": ImagePlacement(encode=_encode, embeddings=_encode_share, own_images=lambda images: len(_share(images))),
    "split_all": ImagePlacement(encode=_project, embeddings=_project, own_images=len),
}
"""Images are uint8 (I, 3, C, C); under `split_all` the towers' features (I, V, P, W) replace them."""
