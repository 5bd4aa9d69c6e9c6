"""Images that several prompts share: they are decoded and encoded once, as long as they are remembered.

Legend: I images, P tokens per image, H hidden, C canvas side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megavl.config.expected_warnings import expected_warnings_ignored
from megavl.config.model import ModelConfig
from megavl.generate.prompt import ImageSource, image_canvas, image_content

with expected_warnings_ignored():
    from megavl.model.image_placement import PLACEMENTS
    from megavl.model.vl_model import DeepseekVL
    from megavl.parallel import cpu_runtime

REMEMBERED = 256 << 20
"""Bytes of embeddings that are remembered: of 56 images of the 7B in bf16, or of thousands of a tiny model."""


@dataclass(eq=False, kw_only=True)
class SharedImage:
    """An image of one or more prompts."""

    canvas: torch.Tensor | None
    """uint8 (3, C, C) until it is encoded."""
    embedding: torch.Tensor | None = None
    """(P, H) on the device, on the first stage."""


class SharedImages:
    """The images that were read last, by the content of their files.

    Their embeddings are those of the weights at hand, so nothing may train meanwhile. Tensor-parallel ranks encode a
    share each, so they make the same calls.
    """

    def __init__(self, stage: DeepseekVL, config: ModelConfig) -> None:
        """No images yet; `stage` is this rank's, the first of several, in eval mode."""
        self._stage, self._config = stage, config
        # Without gradients a share for each rank is always less work.
        self._placement = PLACEMENTS["split_tp" if stage.config.tensor_model_parallel_size > 1 else "recompute"]
        size = config.image_tokens * config.llm.hidden_size * stage.config.params_dtype.itemsize
        self._most = max(1, REMEMBERED // size)
        self._known: dict[bytes, SharedImage] = {}

    def read(self, sources: Sequence[ImageSource]) -> list[SharedImage]:
        """Images of a prompt, of which those are decoded that are not known. An image in memory never is.

        Raises:
            ImageError: an image is missing, damaged or none; the message names it.
        """
        return [self._read(source) for source in sources]

    @torch.no_grad()
    def embeddings(self, images: Sequence[SharedImage]) -> torch.Tensor:
        """Embeddings (I, P, H) on the first stage; those that are not there yet are made together. Empty elsewhere."""
        fresh = [one for one in dict.fromkeys(images) if one.canvas is not None]
        canvases = [one.canvas for one in fresh if one.canvas is not None]
        vision, device = self._stage.vision, cpu_runtime.device()
        if vision is not None and canvases:
            with cpu_runtime.without_redirection():
                found = self._placement.embeddings(vision, torch.stack(canvases).to(device))
            for one, embedding in zip(fresh, found, strict=True):
                # A part of the whole would keep all of it in memory.
                one.embedding = embedding.clone()
        for one in fresh:
            one.canvas = None
        embeddings = [one.embedding for one in images if one.embedding is not None]
        return torch.stack(embeddings) if embeddings else torch.empty(0)

    def _read(self, source: ImageSource) -> SharedImage:
        content = image_content(source)
        key = hashlib.blake2b(content, digest_size=16).digest() if isinstance(content, bytes) else None
        found = None if key is None else self._known.pop(key, None)
        if found is None:
            canvas = image_canvas(content, geometry=self._config.image_geometry, source=source)
            found = SharedImage(canvas=canvas)
        if key is not None:
            # The one that was used last stays longest.
            self._known[key] = found
            if len(self._known) > self._most:
                self._known.pop(next(iter(self._known)))
        return found
