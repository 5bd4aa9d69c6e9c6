"""What a task of the harness says about sampling and continuations, as the model gets it. Needs the extra `lm-eval`."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from megavl.config.errors import DataError
from megavl.generate.pretrained import Model
from megavl.generate.sampling import Sampling

if TYPE_CHECKING:
    from megavl.evaluate.harness.language_model import HarnessModel

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs megavl[lm-eval]; make test-clients runs it")


@pytest.fixture
def harness_model() -> HarnessModel:
    """Over a model of 96 positions that gives back how it was asked to sample."""
    from megavl.evaluate.harness.language_model import HarnessModel

    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_id=1, eos_id=2, encode=lambda text: [3]),
        config=SimpleNamespace(llm=SimpleNamespace(max_position_embeddings=96)),
        read_images=lambda images: None,
    )
    model = SimpleNamespace(processor=processor, request=lambda inputs, *, sampling, **_: sampling)
    return HarnessModel(lambda: cast(Model, model))


@pytest.mark.parametrize(
    ("said", "temperature", "top_p"),
    [
        ({"do_sample": True}, 1.0, 1.0),
        ({"do_sample": True, "top_p": 0.9}, 1.0, 0.9),
        ({"do_sample": True, "temperature": 0.3}, 0.3, 1.0),
        ({"temperature": 0.3}, 0.3, 1.0),
        ({"do_sample": False, "top_p": 0.9}, 0.0, 1.0),
        ({}, 0.0, 1.0),
    ],
)
def test_sampled_tasks_draw_at_temperature_one(
    harness_model: HarnessModel, said: dict[str, Any], temperature: float, top_p: float
) -> None:
    options = {"until": ["x"], "max_gen_toks": 8, **said}
    sampling = cast(Sampling, harness_model._request("a", options, number=0))
    assert (sampling.temperature, sampling.top_p) == (temperature, top_p)


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([1, 5], [], "the continuation 'b' after 'a' has no token of its own"),
        ([1, 5], [4] * 97, "the continuation 'b' after 'a' is longer than 96 tokens"),
        ([], [4] * 97, "is longer than 96 tokens"),
    ],
)
def test_unusable_continuations_are_named(
    harness_model: HarnessModel, context: list[int], continuation: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=f"{message}; leave its document out of the task"):
        harness_model._option(("a", "b"), context, continuation)


def test_too_long_a_text_loses_its_beginning(harness_model: HarnessModel) -> None:
    found = harness_model._option(("a", "b"), [*range(200)], [7] * 96)
    assert (found.ids, found.start) == ((199, *[7] * 96), 1)
