"""Compares an exported Hugging Face folder, run by transformers' own classes, with the checkpoint it came from.

Both get the same tokens and the same pixels: transformers' processor rounds the low-resolution image to 8 bits, which
alone moves logits by 1e-3, so the pixel tensors are made here by the original rule.

    python tests/numerics/compare_with_transformers.py CHECKPOINT HF_FOLDER --task eval.jsonl --json report.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from megavl.config.errors import MegaVLError
from megavl.config.model import ModelConfig
from megavl.config.presets import CLIP_MEAN, CLIP_STD
from megavl.data.batch import make_batch
from megavl.generate.open_model import find_model, loaded
from megavl.generate.prompt import encode_prompt, prompt_pieces, read_canvases

TOLERANCE = 1e-5
QUESTIONS = 8
"""Questions compared, one prompt each."""


def main() -> int:
    """Print the largest difference of any logit, relative to the largest logit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", type=Path, required=True, help="questions about images, as for megavl evaluate")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # fp32 on the same processor for both, whatever the machine has.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        report = compare(arguments.checkpoint, arguments.folder, task=arguments.task)
    except MegaVLError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    arguments.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    if report["max_rel_diff"] > TOLERANCE:
        print(f"error: logits differ by {report['max_rel_diff']:.2e}, more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    print(f"{report['class']}: {report['prompts']} prompts, logits differ by at most {report['max_rel_diff']:.2e}")
    return 0


@torch.no_grad()
def compare(checkpoint: Path, folder: Path, *, task: Path) -> dict[str, Any]:
    """Logits of both for the first questions of `task`, in fp32."""
    import transformers

    source = find_model(checkpoint)
    config, geometry = source.config, source.config.image_geometry
    name = "DeepseekVLHybridForConditionalGeneration" if config.sam else "DeepseekVLForConditionalGeneration"
    reference = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    lines = task.read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    worst = 0.0
    with loaded(source, dtype="float32") as model:
        for line in lines:
            question = json.loads(line)
            canvases = read_canvases([task.parent / image for image in question["images"]], geometry=geometry)
            pieces = prompt_pieces(question["prompt"], images=len(canvases))
            ids = torch.tensor([encode_prompt(pieces, tokenizer=source.tokenizer, config=config, room=0)])
            expected = reference(input_ids=ids, **pixel_tensors(canvases, config=config)).logits[0]
            found = model.logits(make_batch(ids[0], images=canvases, image_token_id=config.image_token_id))
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return {"class": f"transformers {transformers.__version__} {name}", "prompts": len(lines), "max_rel_diff": worst}


def pixel_tensors(canvases: torch.Tensor, *, config: ModelConfig) -> dict[str, torch.Tensor]:
    """What transformers' classes take, from uint8 canvases (I, 3, C, C): the low resolution from the float canvas."""
    pixels = canvases.float() / 255
    if config.sam is None:
        return {"pixel_values": (pixels - 0.5) / 0.5}
    size = (config.siglip.image_size, config.siglip.image_size)
    low = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return {"pixel_values": (low - 0.5) / 0.5, "high_res_pixel_values": (pixels - mean) / std}


if __name__ == "__main__":
    sys.exit(main())
