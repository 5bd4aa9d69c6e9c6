"""MegaVL against transformers' own classes, fp32: every intermediate of the vision path, logits and greedy tokens."""

from __future__ import annotations

import pytest
import torch

from launch.bench.engines.random_models import relative_error
from megavl.config.model import ModelConfig
from tests.numerics.intermediates import intermediates, recording
from tests.numerics.native_pair import EOS, TOLERANCE, native_pair, prompt_with_images
from tests.numerics.small_models import MODELS, TRUE_GRIDS
from tests.unit.generate.models import greedy_tokens

NEW_TOKENS = 12
ODD_SIZES = ((517, 301), (640, 481), (1000, 333), (333, 1000), (640, 640), (1999, 1333), (1, 90), (31, 17), (7, 7))
"""Width and height. For the first four, truncation and rounding of the short side differ."""


@torch.no_grad()
def compare(config: ModelConfig, sizes, *, report_table, title: str, attention: str = "sdpa") -> None:
    with native_pair(config, attention=attention) as pair:
        prompt = prompt_with_images(config, sizes)
        with recording(intermediates(pair)) as errors:
            logits = relative_error(pair.our_logits(prompt), pair.their_logits(prompt))
            inner = errors()
        expected = pair.their_greedy_tokens(prompt, count=NEW_TOKENS)
        images = prompt.canvases(config.image_geometry)
        tokens = greedy_tokens(pair.ours, prompt.ids, images=images, eos_id=EOS, count=NEW_TOKENS)
    worst = max(inner, key=lambda name: inner[name])
    stages = ("siglip", "sam", "adaptor", "decoder")
    peaks = {stage: [error for name, error in inner.items() if name.startswith(stage)] for stage in stages}
    shown = ", ".join(f"{stage} {max(found):.1e} ({len(found)})" for stage, found in peaks.items() if found)
    report_table(
        f"{title}: largest relative error (number of intermediates): {shown}, logits {logits:.1e}; worst at {worst}; "
        f"{len(tokens)} greedy tokens equal; limit {TOLERANCE:.0e}"
    )
    assert {name: error for name, error in inner.items() if not error < TOLERANCE} == {}
    assert logits < TOLERANCE
    assert tokens == expected and len(tokens) > 1


@pytest.mark.parametrize("name", MODELS)
def test_small_models_agree_with_transformers(name: str, report_table) -> None:
    # Three images of different shapes in one prompt; which ones depends on the model.
    start = list(MODELS).index(name)
    sizes = [ODD_SIZES[(start + 2 * step) % len(ODD_SIZES)] for step in range(3)]
    compare(MODELS[name], sizes, report_table=report_table, title=name)


def test_eager_attention_agrees(report_table) -> None:
    config = MODELS["grid 16 window 7"]
    compare(config, ODD_SIZES[:2], report_table=report_table, title="eager attention", attention="eager")


def test_true_grids_agree(report_table) -> None:
    compare(TRUE_GRIDS, ODD_SIZES[:2], report_table=report_table, title="SAM 64 / 14, SigLIP 24")
