"""What a task of the harness says about sampling, as the decoder gets it. Needs the extra `lm-eval`."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megavl.generate.pretrained import Model
from megavl.generate.sampling import Sampling

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs megavl[lm-eval]; make test-clients runs it")


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
def test_sampled_tasks_draw_at_temperature_one(said: dict[str, Any], temperature: float, top_p: float) -> None:
    from megavl.evaluate.harness.language_model import HarnessModel

    processor = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_id=1, eos_id=2, encode=lambda text: [3]),
        config=SimpleNamespace(llm=SimpleNamespace(max_position_embeddings=96)),
        read_images=lambda images: None,
    )
    model = SimpleNamespace(processor=processor, request=lambda inputs, *, sampling, **_: sampling)
    options = {"until": ["x"], "max_gen_toks": 8, **said}
    found = HarnessModel(lambda: cast(Model, model))._request("a", options, number=0)
    sampling = cast(Sampling, found)
    assert (sampling.temperature, sampling.top_p) == (temperature, top_p)
