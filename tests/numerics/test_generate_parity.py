"""`megavl generate --json` gives the same tokens as transformers' `generate`, on the same exported folder.

The ids of a prompt come from the exported processor and chat template. Each case runs with two kinds of pixels: those
of the exported processor, as any client uses it, and those of the released rule. With two towers, transformers'
processor rounds the low-resolution image to 8 bits and pads in another colour. So there the processor's images are
squares.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from PIL import Image

from launch.bench.engines.compare_processors import PILLOW
from launch.bench.engines.random_models import write_tokenizer
from megavl.config.chat import SYSTEM_PROMPT
from megavl.generate.against_transformers import pixel_tensors
from megavl.generate.prompt import read_canvases
from megavl.main.cli import main
from tests.unit.generate import models

CLASSES = {
    "tiny-hybrid": transformers.DeepseekVLHybridForConditionalGeneration,
    "tiny-siglip": transformers.DeepseekVLForConditionalGeneration,
}
PROMPTS = {
    "text only": ("Which colour is it, and why?", 0),
    "one image": ("<image_placeholder>which colour is the picture?", 1),
    "three images": ("<image_placeholder>red or <image_placeholder>green, or is it <image_placeholder>blue?", 3),
}
TOKENS = 40


@pytest.fixture(scope="module", params=models.PRESETS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, transformers.PreTrainedModel]:
    root = tmp_path_factory.mktemp(request.param)
    tokenizer = write_tokenizer(root / "tokenizer")
    seed = models.TALKATIVE[request.param]
    folder = models.write_folder(request.param, root / "hf", tokenizer=tokenizer, fmt="native", seed=seed)
    model = CLASSES[request.param].from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return request.param, folder, model


def reference(
    model: transformers.PreTrainedModel, folder: Path, preset: str, *, text: str, pictures: list[Path], own: bool
) -> tuple[int, list[int]]:
    """Number of prompt tokens, and the greedy tokens after them."""
    processor = transformers.AutoProcessor.from_pretrained(folder, **PILLOW)
    parts = [{"type": "text", "text": text}]
    chat = [{"role": "user", "content": parts}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert SYSTEM_PROMPT in prompt
    images = [Image.open(path).convert("RGB") for path in pictures] or None
    inputs = processor(text=prompt, images=images, return_tensors="pt")
    ids = inputs["input_ids"]
    if pictures and not own:
        config = models.config_of(preset)
        inputs |= pixel_tensors(read_canvases(pictures, geometry=config.image_geometry), config=config)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return ids.shape[1], out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("own", [False, True], ids=["pixels by the rule", "pixels of the processor"])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(exported, name, own, tmp_path, capsys, report_table):
    preset, folder, model = exported
    text, images = PROMPTS[name]
    sizes = [(128, 128)] * images if own and preset == "tiny-hybrid" else [(120, 90), (90, 120), (64, 64)][:images]
    pictures = [models.write_picture(tmp_path / f"{i}.png", seed=40 + i, size=size) for i, size in enumerate(sizes)]
    words = [word for path in pictures for word in ("--image", str(path))]
    tokens = ("--max-new-tokens", str(TOKENS))
    assert main(["generate", str(folder), "--device", "cpu", "--prompt", text, *words, *tokens, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prompt_tokens, expected = reference(model, folder, preset, text=text, pictures=pictures, own=own)
    report_table([preset, name, own, f"{len(expected)} greedy tokens, {len(set(expected))} of them different"])
    assert found["prompt_tokens"] == prompt_tokens
    assert found["token_ids"] == expected
    assert len(set(expected)) > 4
