"""Which adaptors fit which model: every refusal names the field, the value and the remedy."""

from typing import Any

import pytest

from megavl.config.adaptor import ADAPTORS, kinds
from megavl.config.errors import UsageError
from megavl.config.load import load_model_config, model_config_from_dict, to_dict

EVEN = {"siglip": {"image_size": 96}, "sam": {"image_size": 256}}


@pytest.mark.parametrize("kind", ADAPTORS)
def test_a_kind_takes_the_towers_of_its_row(kind: str) -> None:
    both, depth = ADAPTORS[kind].both_towers, 1 if ADAPTORS[kind].one_layer else 2
    fitting = load_model_config("7b" if both else "1b", adaptor={"kind": kind, "depth": depth})
    assert model_config_from_dict(to_dict(fitting), source="saved") == fitting
    assert (fitting.image_tokens, fitting.image_geometry.tokens) == (576, 576)
    other = "1b" if both else "7b"
    with pytest.raises(UsageError) as caught:
        load_model_config(other, adaptor={"kind": kind, "depth": depth})
    verb = "needs" if both else "cannot take"
    assert f"model.adaptor.kind: {kind} {verb} a model.sam tower" in str(caught.value)
    assert all(named in str(caught.value) for named in kinds(both_towers=not both))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adaptor": {"kind": "pooled"}}, ["adaptor.kind", "'pooled'", "token_pooling_width"]),
        ({"adaptor": {"depth": 0}}, ["model: adaptor.depth: found 0", "greater than 0"]),
        ({"adaptor": {"depth": -1}}, ["model: adaptor.depth: found -1"]),
        ({"adaptor": {"depth": True}}, ["model: adaptor.depth: found True"]),
        (
            {"adaptor": {"kind": "shared_linear"}},
            ["model.adaptor.depth: 2 layers, but shared_linear has one", "depth=1"],
        ),
        ({"adaptor": {"kind": "token_pooling_width"}}, ["model.siglip.image_size: 48", "grid of 3", "even number"]),
        ({"adaptor": {"kind": "token_pooling_height"}}, ["model.siglip.image_size: 48", "model.sam.image_size"]),
        *(
            (
                {"adaptor": {"kind": kind}, "llm": {"hidden_size": 129, "num_attention_heads": 3}},
                ["model.llm.hidden_size: 129 is odd", kind, "even width"],
            )
            for kind in ("low_high_hybrid_split_mlp_gelu", "separate_mlp")
        ),
    ],
)
def test_what_a_kind_cannot_do_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_model_config("tiny-hybrid", **changes)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["token_pooling_width", "token_pooling_height"])
def test_pooling_takes_an_even_grid_and_any_width(kind: str) -> None:
    model = load_model_config(
        "tiny-hybrid", **EVEN, adaptor={"kind": kind}, llm={"hidden_size": 129, "num_attention_heads": 3}
    )
    assert [layer.positions for layer in model.adaptor_layers] == [18, 18, 36]
