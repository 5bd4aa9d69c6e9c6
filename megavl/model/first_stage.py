"""The fused first stage: vision encoders, adaptor and text embedding as one module on pipeline stage 0.

It is replicated on every tensor-parallel rank and computed by each of them (paper, section 3.3), so the decoder above
sees plain embeddings and ordinary 3D parallelism applies. The one batch-first to sequence-first transpose of the model
and the sequence-parallel scatter happen here.

Legend: T tokens of the micro-batch, I images, P tokens per image, C canvas side in pixels, H hidden.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.utils import make_viewless_tensor
from torch import nn
from torch.nn import functional as F

from megavl.config.model import ModelConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD, HALF
from megavl.model.adaptor import build_adaptor
from megavl.model.sam import SamTower
from megavl.model.siglip import SiglipTower


class VisionEncoder(nn.Module):
    """Canvases to language-width embeddings."""

    def __init__(self, config: ModelConfig, *, recompute: bool = False) -> None:
        super().__init__()
        self.clip_mean: torch.Tensor
        self.clip_std: torch.Tensor
        self.siglip_mean_std: torch.Tensor
        self.low_size = config.siglip.image_size
        self.siglip = SiglipTower(config.siglip, recompute=recompute)
        self.sam = SamTower(config.sam, recompute=recompute) if config.sam else None
        self.adaptor = build_adaptor(config)
        for name, values in (("clip_mean", CLIP_MEAN), ("clip_std", CLIP_STD), ("siglip_mean_std", HALF)):
            # Stay fp32 in a bf16 model: `model.build` casts parameters only. Images are normalised in fp32, cast last.
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, canvases: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            canvases: uint8 (I, 3, C, C).

        Returns:
            (I, P, H) in the dtype of the weights.
        """
        dtype = self.siglip.pos_embed.dtype
        pixels = canvases.float() / 255.0
        low = pixels
        if self.sam is not None:
            size = (self.low_size, self.low_size)
            low = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        low_features = self.siglip(((low - self.siglip_mean_std) / self.siglip_mean_std).to(dtype))
        if self.sam is None:
            out: torch.Tensor = self.adaptor(low_features, None)
            return out
        high = (pixels - self.clip_mean) / self.clip_std
        out = self.adaptor(low_features, self.sam(high.to(dtype)))
        return out


def embed(
    *,
    vision: VisionEncoder,
    embedding: nn.Module,
    tokens: torch.Tensor,
    images: torch.Tensor,
    image_token_id: int,
    anchor: bool,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Text and image embeddings of one micro-batch.

    Args:
        vision: encoders and adaptor.
        embedding: megatron-core's language model embedding (vocabulary split over tensor-parallel ranks).
        tokens: int64 (1, T); image positions hold `image_token_id`, `P` for each image, checked by the loader.
        images: uint8 (I, 3, C, C); I may be 0.
        image_token_id: id that marks an image position.
        anchor: without images, tie the trainable vision weights in with weight zero, so that overlapped gradient
            reduction finds every gradient.
        sequence_parallel: hand each tensor-parallel rank its share of the sequence.

    Returns:
        (T, 1, H), or (T / tensor-parallel size, 1, H) with sequence parallelism.
    """
    x = embedding(input_ids=tokens, position_ids=None)  # (T, 1, H)
    if images.shape[0]:
        features = vision(images).flatten(0, 1)  # (I * P, H)
        x = x.masked_scatter((tokens == image_token_id).view(-1, 1, 1), features.to(x.dtype))
    elif anchor and any(weight.requires_grad for weight in vision.parameters()):
        x = x + 0.0 * vision(images.new_zeros(1, *images.shape[1:])).sum().to(x.dtype)
    if sequence_parallel:
        x = tensor_parallel.scatter_to_sequence_parallel_region(x)
    # Pipeline sends release the storage of what they sent, so it may not be a view.
    out: torch.Tensor = make_viewless_tensor(x, requires_grad=True, keep_graph=True)
    return out
