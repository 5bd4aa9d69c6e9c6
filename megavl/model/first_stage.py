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

from megavl.model.image_placement import ImagePlacement
from megavl.model.vision import Features, VisionEncoder


def embed(
    *,
    vision: VisionEncoder,
    embedding: nn.Module,
    tokens: torch.Tensor,
    images: torch.Tensor | Features,
    placement: ImagePlacement,
    image_token_id: int,
    anchor: bool,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Text and image embeddings of one micro-batch.

    Args:
        vision: encoders and adaptor.
        embedding: megatron-core's language model embedding (vocabulary split over tensor-parallel ranks).
        tokens: int64 (1, T); image positions hold `image_token_id`, `P` for each image, checked by the loader.
        images: what `placement` takes for I images: uint8 (I, 3, C, C), or features of the towers; I may be 0.
        placement: which rank encodes them.
        image_token_id: id that marks an image position.
        anchor: where this rank encodes no image, tie the trainable vision weights in with weight zero, so that
            overlapped gradient reduction finds every gradient.
        sequence_parallel: hand each tensor-parallel rank its share of the sequence.

    Returns:
        (T, 1, H), or (T / tensor-parallel size, 1, H) with sequence parallelism.
    """
    x = embedding(input_ids=tokens, position_ids=None)  # (T, 1, H)
    if (images[0] if isinstance(images, tuple) else images).shape[0]:
        vectors = placement.embeddings(vision, images).flatten(0, 1)  # (I * P, H)
        # Their number is known on the host: finding it in a mask, as masked_scatter's backward pass does, would wait
        # for the device.
        marked = (tokens[0] == image_token_id).int()
        rows = marked.argsort(descending=True, stable=True)[: vectors.shape[0]]
        x = x.index_copy(0, rows, vectors.unsqueeze(1).to(x.dtype))
    if anchor and not placement.here(images) and vision.trains:
        x = x + placement.anchor(vision, images).to(x.dtype)
    if sequence_parallel:
        x = tensor_parallel.scatter_to_sequence_parallel_region(x)
    # Pipeline sends release the storage of what they sent, so it may not be a view.
    out: torch.Tensor = make_viewless_tensor(x, requires_grad=True, keep_graph=True)
    return out
