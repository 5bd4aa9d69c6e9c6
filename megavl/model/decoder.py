"""DeepSeek-LLM as megatron-core's GPTModel: configuration and layer specs."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megavl.config.model import DecoderConfig
from megavl.config.recipe import ParallelConfig, RecomputeConfig
from megavl.config.releases import parts_of
from megavl.model.attention import PackedAttention
from megavl.model.fused_layer import FusedLayer
from megavl.model.fused_parts import FusedMLP, FusedNorm
from megavl.model.kernels import Level
from megavl.model.loss import vocab_parallel_loss
from megavl.model.norm import RMSNorm
from megavl.model.projection import ColumnProjection, RowProjection
from megavl.model.weight_gradients import fuses_on_cpu, fuses_weight_gradients


def transformer_config(
    llm: DecoderConfig,
    *,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    layout: str | None,
    dtype: torch.dtype,
    transformer_engine: bool = False,
    compiled: Level = "none",
    generates: bool = False,
) -> TransformerConfig:
    """megatron-core's configuration of the decoder.

    Args:
        layout: megatron-core's layout string; None when there is one stage (which would be read as virtual stages).
        dtype: dtype of weights and of pipeline transfers.
        transformer_engine: build the layers from Transformer Engine's modules.
        compiled: what torch.compile is used for.
        generates: for inference, where torch.compile would start anew for every number of tokens.
    """
    full = recompute.granularity == "full"
    return TransformerConfig(
        num_layers=llm.num_layers,
        hidden_size=llm.hidden_size,
        ffn_hidden_size=llm.ffn_hidden_size,
        num_attention_heads=llm.num_attention_heads,
        kv_channels=llm.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=llm.rms_norm_eps,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=llm.init_std,
        # Weights drawn on the host do not depend on the tensor-parallel size.
        use_cpu_initialization=True,
        perform_initialization=True,
        masked_softmax_fusion=False,
        # megatron-core's mark for torch.compile being wanted and able, which its own SwiGLU reads too.
        bias_activation_fusion=not generates and compiled != "none",
        bias_dropout_fusion=False,
        transformer_impl="transformer_engine" if transformer_engine else "local",
        apply_rope_fusion=transformer_engine,
        gradient_accumulation_fusion=not generates
        and (fuses_weight_gradients() or (compiled != "none" and fuses_on_cpu(dtype))),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=layout,
        deterministic_mode=parallel.deterministic,
        sequence_parallel=parallel.sequence_parallel,
        # Text and image batches differ widely in their number of loss tokens.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        # With two pipeline ranks and virtual stages, batched transfers are matched in the wrong order, silently.
        batch_p2p_comm=False,
        # Only where streams order it: gloo would still be sending outputs that the schedule has deallocated.
        overlap_p2p_comm=parallel.virtual_pipeline > 1 and torch.cuda.is_available(),
        recompute_granularity=None if recompute.granularity == "none" else recompute.granularity,
        recompute_method="uniform" if full else None,
        recompute_num_layers=recompute.num_layers if full else None,
        recompute_modules=list(recompute.modules) if recompute.granularity == "selective" else None,
    )


class Decoder(GPTModel):
    """megatron-core's GPTModel whose head computes logits only where the loss counts, and keeps no copies of them.

    Image tokens, questions and padding carry no loss: with five images in 4096 tokens that is 70% of the positions.
    `loss_mask`, which megatron-core reads for multi-token prediction alone, takes the positions of the labels here;
    None stands for all.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rotary_in_attention = any(getattr(module, "applies_rotary", False) for module in self.modules())

    def _preprocess(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        """Rotary angles go to `PackedAttention` with the segments, looked up once for all layers."""
        decoder_input, angles, *rest = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if self._rotary_in_attention:
            packed_seq_params.set_angles(angles, dtype=self.config.params_dtype)
            angles = None
        return (decoder_input, angles, *rest)

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.post_process and self.config.sequence_parallel:
            # Every rank computes the gradient of its share of the vocabulary for all positions, and the head sums them.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        if self.post_process and loss_mask is not None:
            hidden_states = hidden_states.index_select(0, loss_mask)
        out: torch.Tensor = super()._postprocess(hidden_states, *args, labels=labels, loss_mask=None, **kwargs)
        return out

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Loss (1, R) of labels (1, R) under logits (R, 1, V)."""
        compiled, group = self.config.bias_activation_fusion, self.pg_collection.tp
        return vocab_parallel_loss(logits[:, 0], labels[0], group=group, compiled=compiled)[None]


def build_decoder(
    config: TransformerConfig,
    llm: DecoderConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    compiled: Level = "none",
    generates: bool = False,
) -> Decoder:
    """Embedding, decoder layers and head of this pipeline stage.

    Args:
        pre_process: this stage holds the embedding.
        post_process: this stage holds the final norm and the head.
        vp_stage: number among the stages of this pipeline rank; None without virtual stages.
        compiled: what torch.compile is used for, as in `config`.
        generates: attention must read a key-value cache, which Transformer Engine's cannot.
    """
    model = Decoder(
        config=config,
        transformer_layer_spec=_block_spec(
            config, vp_stage=vp_stage, compiled="none" if generates else compiled, generates=generates
        ),
        vocab_size=llm.vocab_size,
        max_sequence_length=llm.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(llm.rope_theta),
        # The first stage scatters after the images are in place.
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
    if compiled != "none" and not generates:
        for module in model.modules():
            if type(module) is MLP:
                # megatron-core gives other classes in a specification no process group.
                module.__class__ = FusedMLP
    if post_process:
        # `Decoder` gathers the positions before it chooses among them.
        model.output_layer.sequence_parallel = False
    return model


def _block_spec(
    config: TransformerConfig, *, vp_stage: int | None, compiled: Level, generates: bool
) -> TransformerBlockSubmodules:
    """A full block spec: given only a layer spec, megatron-core picks the final norm by what is installed."""
    layer: ModuleSpec
    norm = RMSNorm if compiled == "none" else FusedNorm
    if config.transformer_impl == "transformer_engine":
        assert not generates, "Transformer Engine's attention cannot read a key-value cache"
        layer = get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm")
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if compiled == "layers" and config.tensor_model_parallel_size == 1:
            layer.module = FusedLayer
        if generates:
            attention.linear_qkv, attention.linear_proj = ColumnProjection, RowProjection
            mlp = parts_of(layer.submodules.mlp)
            mlp.linear_fc1, mlp.linear_fc2 = ColumnProjection, RowProjection
    # The final norm is ours in any case: Transformer Engine's has an extra state, which no stored key is for.
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
