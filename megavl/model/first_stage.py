"""The fused first stage: vision encoders, adaptor and text embedding as one module on pipeline stage 0.

Every tensor-parallel rank holds and computes it (paper, section 3.3). So the decoder above sees plain embeddings, and
ordinary 3D parallelism applies. The model's one batch-first to sequence-first transpose happens here, and the
sequence-parallel scatter.

Legend: T tokens of the micro-batch, I images, P tokens per image, C canvas side in pixels, H hidden.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from megatron.core.utils import make_viewless_tensor
from torch import nn

from megavl.model.image_placement import ImagePlacement
from megavl.model.vision import VisionEncoder


def embed(
    *,
    vision: VisionEncoder,
    embedding: nn.Module,
    tokens: torch.Tensor,
    images: torch.Tensor | None,
    image_rows: torch.Tensor,
    placement: ImagePlacement,
    dummy_image: bool,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Text and image embeddings of one micro-batch.

    Args:
        embedding: megatron-core's language model embedding (vocabulary split over tensor-parallel ranks).
        tokens: int64 (T,).
        images: what `placement` takes for I images: uint8 (I, 3, C, C), or features of the towers. Or their embeddings
            (I, P, H), which evaluation makes once for several prompts. None where `image_rows` is empty and no dummy
            image is wanted.
        image_rows: int64 (I * P,), rows of `tokens` that the images fill.
        dummy_image: where this rank encodes no image, encode a dummy one with weight zero. Overlapped gradient
            reduction then finds a gradient of every trainable weight.
        sequence_parallel: hand each tensor-parallel rank its share of the sequence.

    Returns:
        (T, 1, H), or (T / tensor-parallel size, 1, H) with sequence parallelism.
    """
    x = embedding(input_ids=tokens[None], position_ids=None)  # (T, 1, H)
    # The transpose leaves the batch dimension a stride with which torch multiplies token by token.
    x = x[:, 0].unsqueeze(1)
    if len(image_rows):
        assert images is not None, "image rows come with images"
        embedded = images if images.ndim == 3 else placement.embeddings(vision, images)
        vectors = embedded.flatten(0, 1)  # (I * P, H)
        # By index, because the backward pass of masked_scatter would wait for the device to count the mask.
        x = x.index_copy(0, image_rows, vectors.unsqueeze(1).to(x.dtype))
    if dummy_image and vision.trains:
        assert images is not None, "a dummy image needs the shape of images"
        if not placement.own_images(images):
            x = x + placement.dummy_image(vision, images).to(x.dtype)
    if sequence_parallel:
        x = tensor_parallel.scatter_to_sequence_parallel_region(x)
    # Pipeline sends release the storage of what they sent, so it may not be a view.
    out: torch.Tensor = make_viewless_tensor(x, requires_grad=True, keep_graph=True)
    return out
