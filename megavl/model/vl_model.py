"""DeepSeek-VL as one pipeline stage's module.

Legend: T tokens of the micro-batch, I images, C canvas side in pixels, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavl.config.model import ModelConfig
from megavl.model.attention import Segments
from megavl.model.decoder import build_decoder
from megavl.model.first_stage import embed
from megavl.model.image_placement import PLACEMENTS
from megavl.model.vision import Features, VisionEncoder


class DeepseekVL(MegatronModule):
    """The fused first stage (on pipeline stage 0) and this stage's share of the decoder."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        *,
        pre_process: bool,
        post_process: bool,
        recompute_vision: bool = False,
        placement: str = "recompute",
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.placement = PLACEMENTS[placement]
        self.image_token_id = model.image_token_id
        self.vision = VisionEncoder(model, recompute=recompute_vision) if pre_process else None
        self.language_model = build_decoder(
            config, model.llm, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        # Read by megatron-core's schedules and gradient finalisation.
        self.model_type = self.language_model.model_type
        self.share_embeddings_and_output_weights = False

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        """Take the hidden states that the previous stage sent."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """Weight shared between embedding and head: none, the head has its own."""
        return None

    def forward(
        self,
        *,
        tokens: torch.Tensor,
        images: torch.Tensor | Features,
        packed: Segments | None,
        labels: torch.Tensor | None = None,
        anchor: bool = False,
        cache: BaseInferenceContext | None = None,
    ) -> torch.Tensor:
        """One micro-batch through this stage.

        Args:
            tokens: int64 (1, T).
            images: what the placement takes, e.g. uint8 (I, 3, C, C); read on the first stage only.
            packed: segment borders over T; None with a cache.
            labels: int64 (1, T); read on the last stage only.
            anchor: see `first_stage.embed`.
            cache: keys and values of the tokens before these; the model must be in eval mode.

        Returns:
            Inner stages: hidden states (T, 1, H). Last stage: loss per token (1, T) with labels, logits (1, T, V)
            without, V split over tensor-parallel ranks. With a cache: logits (1, 1, V) of the last token, V whole.
        """
        decoder_input = None
        if self.vision is not None:
            decoder_input = embed(
                vision=self.vision,
                embedding=self.language_model.embedding,
                tokens=tokens,
                images=images,
                placement=self.placement,
                image_token_id=self.image_token_id,
                anchor=anchor,
                sequence_parallel=self.config.sequence_parallel,
            )
        out: torch.Tensor = self.language_model(
            None,
            None,
            None,
            decoder_input=decoder_input,
            labels=labels,
            packed_seq_params=packed,
            inference_context=cache,
            runtime_gather_output=True if cache is not None else None,
        )
        return out
