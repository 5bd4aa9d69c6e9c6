"""What one version of transformers makes of an export: run by that version's interpreter, imports nothing of MegaVL.

python load_export.py FOLDER INPUTS.safetensors OUT.safetensors   writes logits, prints everything else as one JSON line
"""

from __future__ import annotations

import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which colour?"}]}]
TEXT = "User: which colour is the square, é?"


def main(folder: str, inputs: str, out: str) -> None:
    """Load everything that a folder holds and use it."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    processor, tokenizer = AutoProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    # A square of the canvas' size: versions round the sides of other pictures differently.
    side = getattr(processor.image_processor, "high_res_size", None) or processor.image_processor.size
    picture = Image.effect_mandelbrot((side["height"], side["width"]), (-2.0, -1.5, 1.0, 1.5), 100).convert("RGB")
    batch = processor(text=prompt, images=[picture], return_tensors="pt")
    with torch.no_grad():
        logits = model(**load_file(inputs)).logits
        # As trained: no end-of-sentence token of a default may cut the answer short or let it run on.
        answer = model.generate(**batch, max_new_tokens=4, do_sample=False)
    pixels = {name: value.contiguous() for name, value in batch.items() if "pixel" in name}
    save_file({"logits": logits.contiguous(), **pixels}, out)
    generation = model.generation_config
    found = {
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "loading": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "tied": model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
        "special": [generation.bos_token_id, generation.eos_token_id, generation.pad_token_id],
        "prompt": prompt,
        "input_ids": batch["input_ids"].tolist(),
        "answer": answer.tolist(),
        "vocabulary": len(tokenizer),
        "image_token_id": processor.tokenizer.image_token_id,
        "ids": tokenizer(TEXT)["input_ids"],
        "text": tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
