"""Counts and FLOPs against published figures and against an independent counter run over transformers' models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    SamVisionConfig,
    SamVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers import __version__ as release

from megavl.config.load import load_model_config
from megavl.config.recipe import TRAINABLE_BY_STAGE, RecomputeConfig
from megavl.planner.cost.blocks import Block, vision_blocks
from megavl.planner.cost.flops import mfu, step_flops
from megavl.planner.cost.work import layer_work, vision_work
from megavl.planner.scenario import make_scenario
from tests.unit.planner.recipes import parameter_counts, recipe_of

PUBLISHED_COUNTS = {
    "1b": {"llm": 1_652_656_128, "siglip": 303_688_704, "adaptor": 6_295_552},
    "7b": {
        "llm": 6_910_365_696,
        "siglip": 303_688_704,
        "sam_trunk": 88_883_456,
        "sam_neck": 787_456,
        "sam_hd": 787_456 + 1,
        "sam_downsamples": 5_898_240,
        "adaptor": 20_979_712,
    },
}
TOTALS = {"1b": 1_962_640_384, "7b": 7_331_390_721}


def forward_flops(preset: str, prefix: str) -> int:
    return sum(block.forward for block in vision_blocks(load_model_config(preset)) if block.name.startswith(prefix))


@pytest.mark.parametrize("preset", ["1b", "7b"])
def test_parameter_counts_equal_the_released_models(preset: str) -> None:
    counts = parameter_counts(load_model_config(preset))
    assert {part: count for part, count in counts.items() if count} == PUBLISHED_COUNTS[preset]
    assert sum(counts.values()) == TOTALS[preset]


@pytest.mark.parametrize(("prefix", "published"), [("sam", 0.995), ("siglip", 0.381)])
def test_encoder_forward_flops_equal_the_published_figures(prefix: str, published: float) -> None:
    assert round(forward_flops("7b", prefix) / 1e12, 3) == published


@pytest.mark.parametrize(
    ("preset", "tokens_per_s", "text_only", "with_encoders"),
    [("7b", 1792, 0.241, 0.244), ("1b", 5201, 0.164, 0.167)],
)
def test_mfu_of_the_published_runs(preset: str, tokens_per_s: int, text_only: float, with_encoders: float) -> None:
    """Published: tokens/s per A100 and the MFU they give, without and with the encoders of 30% of the sequences."""
    model, seconds = load_model_config(preset), 4096 / tokens_per_s
    sizes = {"seq_length": 4096, "sequences": 1, "trainable_parts": TRAINABLE_BY_STAGE[2]}
    text = step_flops(model, images=0, **sizes)
    multimodal = step_flops(model, images=5, **sizes)
    assert round(mfu(text, seconds=seconds, devices=1, peak_flops=312e12), 3) == text_only
    mean = 0.7 * text + 0.3 * multimodal
    assert round(mfu(mean, seconds=seconds, devices=1, peak_flops=312e12), 3) == with_encoders


def test_causal_convention_of_a_trained_language_model() -> None:
    """6 x (body + head) + 6 x L x S x d FLOPs per token."""
    llm = load_model_config("7b").llm
    body = llm.num_layers * (4 * llm.hidden_size**2 + 3 * llm.hidden_size * llm.ffn_hidden_size)
    head = llm.vocab_size * llm.hidden_size
    expected = 6 * (body + head) + 6 * llm.num_layers * 4096 * llm.hidden_size
    flops = step_flops(
        load_model_config("7b"), seq_length=4096, sequences=3, images=0, trainable_parts=TRAINABLE_BY_STAGE[2]
    )
    assert flops == expected * 4096 * 3


def test_shorter_sequences_cost_less_attention() -> None:
    model = load_model_config("7b")
    sizes = {"images": 0, "trainable_parts": ("llm",)}
    whole = step_flops(model, seq_length=4096, sequences=1, **sizes)
    halves = step_flops(model, seq_length=2048, sequences=2, **sizes)
    assert whole - halves == 6 * 30 * 2048 * 4096 * 4096


def counted(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return counter.get_total_flops()


def test_siglip_equals_an_independent_count() -> None:
    config = SiglipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
        vision_use_head=False,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = SiglipVisionModel(config)
        measured = counted(model, torch.empty(1, 3, 384, 384))
    assert forward_flops("7b", "siglip") == measured
    assert parameter_counts(load_model_config("7b"))["siglip"] == sum(p.numel() for p in model.parameters())


def test_sam_equals_an_independent_count_without_position_bias() -> None:
    config = SamVisionConfig(attn_implementation="eager")
    with torch.device("meta"):
        measured = counted(SamVisionModel(config), torch.empty(1, 3, 1024, 1024))
    # Two products (rows, columns) of every query with a table of `side` rows: 8 windowed and 4 global blocks.
    bias = 2 * 2 * 768 * (8 * 25 * 14**2 * 14 + 4 * 64**2 * 64)
    ours = sum(forward_flops("7b", prefix) for prefix in ("sam.patch_embed", "sam.blocks", "sam.neck."))
    assert ours + bias == measured
    assert bias / forward_flops("7b", "sam") == pytest.approx(0.005, abs=0.0005)


def test_decoder_equals_an_independent_causal_count() -> None:
    model, tokens = load_model_config("tiny-hybrid"), 512
    llm = model.llm
    config = LlamaConfig(
        hidden_size=llm.hidden_size,
        intermediate_size=llm.ffn_hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_attention_heads,
        vocab_size=llm.vocab_size,
        attn_implementation="eager",
    )
    reference = LlamaForCausalLM(config)
    measured = counted(reference, torch.zeros(1, tokens, dtype=torch.long))
    forward = step_flops(model, seq_length=tokens, sequences=1, images=0, trainable_parts=())
    upper_triangle = llm.num_layers * 2 * tokens**2 * llm.hidden_size
    # In transformers 4 the counter also sees the rotary embedding's outer product, half a head for each token.
    rotary = tokens * llm.head_dim if release.startswith("4.") else 0
    assert forward + upper_triangle + rotary == measured
    assert parameter_counts(model)["llm"] == sum(parameter.numel() for parameter in reference.parameters())


def test_frozen_weights_take_no_weight_gradient() -> None:
    block = Block(name="b", part="siglip", parameters=1, linear=10, attention=3, below=frozenset({"adaptor"}))
    assert block.backward(frozenset()) == 0
    assert block.backward(frozenset({"llm"})) == 0
    assert block.backward(frozenset({"siglip"})) == 10 + 6
    assert block.backward(frozenset({"adaptor"})) == 10 + 6
    assert block.backward(frozenset({"siglip", "adaptor"})) == 20 + 6


def test_stage_one_passes_gradients_through_frozen_llm() -> None:
    model = load_model_config("7b")
    sizes = {"seq_length": 1088, "sequences": 1}
    forward = step_flops(model, images=0, trainable_parts=(), **sizes)
    vision = sum(block.forward for block in vision_blocks(model))
    frozen = step_flops(model, images=1, trainable_parts=(), **sizes)
    trained = step_flops(model, images=1, trainable_parts=TRAINABLE_BY_STAGE[1], **sizes)
    assert frozen == forward + vision
    attention = 30 * 2 * 1088**2 * 4096
    decoder_backward = forward + attention
    below = sum(block.backward(frozenset(TRAINABLE_BY_STAGE[1])) for block in vision_blocks(model))
    assert trained == frozen + decoder_backward + below
    assert step_flops(model, images=0, trainable_parts=TRAINABLE_BY_STAGE[1], **sizes) == forward


def test_frozen_encoders_cost_one_third_of_trained() -> None:
    siglip = [block for block in vision_blocks(load_model_config("7b")) if block.part == "siglip"]
    for stage in (1, 2):
        assert not any(block.backward(frozenset(TRAINABLE_BY_STAGE[stage])) for block in siglip)
    forward = sum(block.forward for block in siglip)
    backward = sum(block.backward(frozenset(TRAINABLE_BY_STAGE[3])) for block in siglip)
    assert backward == 2 * forward - siglip[0].linear, "the pixels need no gradient"


def test_recompute_repeats_what_it_names() -> None:
    def backward(**settings: object) -> float:
        recompute = RecomputeConfig(**settings)  # type: ignore[arg-type]
        return layer_work(make_scenario(recipe_of(recompute=recompute)), "text").backward.flops

    def extra(**settings: object) -> float:
        return backward(**settings) - backward()

    attention, mlp = 2 * 4096**3, 2 * 4096 * 3 * 4096 * 11008
    assert extra() == 0
    assert extra(granularity="selective") == attention
    assert extra(granularity="selective", modules=("core_attn", "mlp")) == attention + mlp
    assert extra(granularity="full") == attention + mlp + 2 * 4096 * 4 * 4096**2


def test_vision_recompute_repeats_the_blocks_of_trained_encoders() -> None:
    def backward(stage: int, *, recompute: bool) -> float:
        scenario = make_scenario(recipe_of(stage=stage, recompute=RecomputeConfig(vision=recompute)))
        return sum(block.backward.flops for block in vision_work(scenario, "multimodal"))

    assert backward(2, recompute=True) == backward(2, recompute=False)
    assert backward(3, recompute=True) - backward(3, recompute=False) == forward_flops("7b", "siglip.blocks")
