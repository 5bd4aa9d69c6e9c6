"""DeepSeek-VL as one pipeline stage's module.

Legend: T tokens of the micro-batch, R of these whose label counts, I images, C canvas side in pixels, H hidden,
V vocabulary, B rows of a cache.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavl.config.model import ModelConfig
from megavl.model.attention import Segments
from megavl.model.cache import KeyValueCache, Step
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
        generates: bool = False,
    ) -> None:
        """Build a stage; see `build_decoder` for `generates`."""
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.placement = PLACEMENTS[placement]
        self.image_token_id = model.image_token_id
        self.vision = VisionEncoder(model, recompute=recompute_vision) if pre_process else None
        self.language_model = build_decoder(
            config,
            model.llm,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            generates=generates,
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
        packed: Segments | Step,
        labels: torch.Tensor | None = None,
        loss_rows: torch.Tensor | None = None,
        anchor: bool = False,
    ) -> torch.Tensor:
        """One micro-batch through this stage.

        Args:
            tokens: int64 (1, T).
            images: what the placement takes, e.g. uint8 (I, 3, C, C); read on the first stage only.
            packed: segment borders over T; or the rows of a cache that the tokens continue, with the model in eval
                mode and without labels.
            labels: int64 (1, R); on the last stage only.
            loss_rows: int64 (R,), positions of the labels; read on the last stage only.
            anchor: see `first_stage.embed`.

        Returns:
            Inner stages: hidden states (T, 1, H). Last stage: loss of each label (1, R), or without labels logits
            (1, T, V), V split over tensor-parallel ranks. Last stage with a cache: logits (B, V) behind the last token
            of each row, V whole.
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
        if isinstance(packed, Step):
            return self._continue(decoder_input, packed)
        out: torch.Tensor = self.language_model(
            *(None, None, None),
            decoder_input=decoder_input,
            labels=labels,
            loss_mask=loss_rows,
            packed_seq_params=packed,
        )
        return out

    def new_cache(self, *, rows: int) -> KeyValueCache:
        """An empty cache for the decoder layers of this stage.

        Args:
            rows: sequences that are decoded together.
        """
        config, weight = self.config, next(self.parameters())
        return KeyValueCache(
            rows=rows,
            heads=config.num_attention_heads // config.tensor_model_parallel_size,
            head_dim=config.kv_channels,
            angles=self.language_model.rotary_pos_emb.get_emb,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _continue(self, decoder_input: torch.Tensor | None, step: Step) -> torch.Tensor:
        # Not through GPTModel.forward: it prepares rotary angles of whole rows, and logits at one place of all rows.
        assert not self.training, "a cache is used in eval mode only"
        hidden: torch.Tensor = self.language_model.decoder(
            hidden_states=decoder_input, attention_mask=None, packed_seq_params=step
        )
        if not self.post_process:
            return hidden
        logits, _ = self.language_model.output_layer(step.last(hidden), runtime_gather_output=True)
        out: torch.Tensor = logits[:, 0]
        return out
