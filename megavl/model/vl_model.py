"""DeepSeek-VL as one pipeline stage's module.

Legend: T tokens of the micro-batch, R of these with a label or a successor, I images, P positions of an image, C canvas
side in pixels. H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavl.config.model import ModelConfig
from megavl.data.batch import Batch
from megavl.model.attention import segments
from megavl.model.cache import KeyValueCache, Step
from megavl.model.decoder import build_decoder
from megavl.model.first_stage import embed
from megavl.model.image_placement import PLACEMENTS
from megavl.model.kernels import Level
from megavl.model.loss import vocab_parallel_scores
from megavl.model.vision import VisionEncoder


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
        compiled: Level = "none",
        generates: bool = False,
    ) -> None:
        """Build a stage; see `build_decoder` for `compiled` and `generates`."""
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.placement = PLACEMENTS[placement]
        self.image_token_id = model.image_token_id
        self.vision: VisionEncoder | None = None
        if pre_process:
            self.vision = VisionEncoder(model, recompute=recompute_vision, compiled=compiled == "layers")
        self.language_model = build_decoder(
            config,
            model.llm,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            compiled=compiled,
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

    def forward(self, batch: Batch, *, dummy_image: bool = False) -> torch.Tensor:
        """One micro-batch through this stage.

        Args:
            batch: the micro-batch, on the device.
            dummy_image: see `first_stage.embed`.

        Returns:
            Inner stages: hidden states (T, 1, H). Last stage: loss of each label (1, R).
        """
        return self._run(batch, labels=batch.labels[None], loss_rows=batch.loss_rows, dummy_image=dummy_image)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (T, V) of every token's successor, V split over tensor-parallel ranks; only where the head is."""
        return self._run(batch, labels=None, loss_rows=None)[0]

    def score(self, batch: Batch) -> torch.Tensor:
        """One micro-batch through this stage, to score its labels without a gradient.

        Returns:
            Inner stages: hidden states (T, 1, H). Last stage: (2, R), at least fp32: the loss of each label in nats,
            and 1 where no token is likelier than the label, else 0.
        """
        out = self._run(batch, labels=None, loss_rows=batch.loss_rows)
        if not self.post_process:
            return out
        return vocab_parallel_scores(out[0], batch.labels, group=self.language_model.pg_collection.tp)

    def forward_cached(
        self, step: Step, *, tokens: torch.Tensor, images: torch.Tensor | None, image_rows: torch.Tensor
    ) -> torch.Tensor:
        """Tokens that continue cached sequences; the model is in eval mode.

        Args:
            step: the cache's rows that the tokens continue.
            tokens: int64 (T,).
            images: uint8 (I, 3, C, C), or embeddings (I, P, H); read on the first stage only.
            image_rows: int64 (I * P,), rows of `tokens` that the images fill.

        Returns:
            Hidden states (T, 1, H), on the last stage those that `head` takes.
        """
        assert not self.training, "a cache is used in eval mode only"
        # Not through GPTModel.forward, which prepares rotary angles of whole rows and computes logits of every token.
        hidden: torch.Tensor = self.language_model.decoder(
            hidden_states=self._embed(tokens, images, image_rows), attention_mask=None, packed_seq_params=step
        )
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (R, V), V whole, of hidden states (R, 1, H); on the last stage only."""
        logits, _ = self.language_model.output_layer(hidden, runtime_gather_output=True)
        out: torch.Tensor = logits[:, 0]
        return out

    def new_cache(self, *, rows: int) -> KeyValueCache:
        """An empty cache for the decoder layers of this stage."""
        config, weight = self.config, next(self.parameters())
        return KeyValueCache(
            rows=rows,
            heads=config.num_attention_heads // config.tensor_model_parallel_size,
            head_dim=config.kv_channels,
            angles=self.language_model.rotary_pos_emb.get_emb,
            dtype=weight.dtype,
            device=weight.device,
        )

    def _run(
        self,
        batch: Batch,
        *,
        labels: torch.Tensor | None,
        loss_rows: torch.Tensor | None,
        dummy_image: bool = False,
    ) -> torch.Tensor:
        out: torch.Tensor = self.language_model(
            *(None, None, None),
            decoder_input=self._embed(batch.tokens, batch.images, batch.image_rows, dummy_image=dummy_image),
            labels=labels if self.post_process else None,
            loss_mask=loss_rows,
            packed_seq_params=segments(batch, on_device=self.config.apply_rope_fusion),
        )
        return out

    def _embed(
        self, tokens: torch.Tensor, images: torch.Tensor | None, image_rows: torch.Tensor, *, dummy_image: bool = False
    ) -> torch.Tensor | None:
        """Input of the decoder on the first stage; None elsewhere."""
        if self.vision is None:
            return None
        return embed(
            vision=self.vision,
            embedding=self.language_model.embedding,
            tokens=tokens,
            images=images,
            image_rows=image_rows,
            placement=self.placement,
            dummy_image=dummy_image,
            sequence_parallel=self.config.sequence_parallel,
        )
