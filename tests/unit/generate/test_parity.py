"""The exported model in transformers' own implementation against the same weights here."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.nn import functional as F
from transformers import DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration

from megavl.config.presets import CLIP_MEAN, CLIP_STD
from megavl.data.batch import make_batch
from megavl.generate.decode import Request, generate
from megavl.generate.prompt import encode_prompt, prompt_pieces, read_canvases
from tests.unit.generate import models

CLASSES = {"tiny-hybrid": DeepseekVLHybridForConditionalGeneration, "tiny-siglip": DeepseekVLForConditionalGeneration}
SIZES = [(120, 90), (90, 120), (640, 481)]
TOLERANCE = 1e-5


def pixel_tensors(canvases: torch.Tensor, preset: str) -> dict[str, torch.Tensor]:
    """What the reference's towers take, made by the original rule: the low resolution from the unrounded canvas."""
    pixels = canvases.float() / 255
    if preset == "tiny-siglip":
        return {"pixel_values": (pixels - 0.5) / 0.5}
    side = models.config_of(preset).siglip.image_size
    low = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return {"pixel_values": (low - 0.5) / 0.5, "high_res_pixel_values": (pixels - mean) / std}


@pytest.mark.parametrize("preset", models.PRESETS)
@torch.no_grad()
def test_logits_and_greedy_tokens(preset, tokenizer_dir, tokenizer, tmp_path, report_table):
    folder = models.write_folder(preset, tmp_path / "hf", tokenizer=tokenizer_dir, fmt="native")
    reference = CLASSES[preset].from_pretrained(folder, attn_implementation="sdpa").eval()
    config = models.config_of(preset)
    errors = []
    with models.built(preset) as model:
        for number, size in enumerate(SIZES):
            paths = [models.write_picture(tmp_path / f"{number}{i}.png", seed=number + i, size=size) for i in range(2)]
            canvases = read_canvases(paths, geometry=config.image_geometry)
            text = "<image_placeholder>red <image_placeholder>which colour is it?"
            ids = encode_prompt(prompt_pieces(text, images=2), tokenizer=tokenizer, config=config, room=16)
            inputs = {"input_ids": torch.tensor([ids]), **pixel_tensors(canvases, preset)}
            expected = reference(**inputs).logits[0]
            found = model.logits(make_batch(torch.tensor(ids), images=canvases, image_token_id=config.image_token_id))
            errors.append(float((found - expected).abs().max() / expected.abs().max()))
            answer = reference.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
            request = Request(ids=ids, images=canvases, max_new_tokens=16)
            tokens = [token for _, token, _ in generate(model, [request], eos_id=tokenizer.eos_id)]
            assert tokens == answer
    report_table([preset, "logits against transformers, relative", max(errors), f"limit {TOLERANCE:g}"])
    assert expected.std() > 0.1
    assert all(error < TOLERANCE for error in errors)
