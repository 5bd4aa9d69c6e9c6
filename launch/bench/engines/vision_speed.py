"""Times one full-size vision tower of MegaVL and of transformers in one process, or measures the memory of one.

Prints one JSON line. `launch/bench/vision.py` calls it and writes the report.

    python -m launch.bench.engines.vision_speed {sam,siglip} [--only megavl]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from launch.bench.engines.peak_memory import peak_bytes, reset_peak, resident_bytes
from launch.bench.engines.random_models import random_tensors, relative_error, transformers_model
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig
from megavl.model.vision import VisionEncoder

IMPLEMENTATIONS = ("megavl", "eager", "sdpa")
LLM = {"hidden_size": 64, "ffn_hidden_size": 64, "num_layers": 1, "num_attention_heads": 1, "vocab_size": 64}
Run = Callable[[torch.Tensor], torch.Tensor]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tower", choices=["sam", "siglip"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="run one alone, for its peak memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = load_model_config("7b", llm=LLM, image_token_id=3)
    names = (arguments.only,) if arguments.only else IMPLEMENTATIONS
    weights = random_tensors(config)
    towers = {name: build(name, arguments.tower, config, weights) for name in names}
    del weights
    size = config.canvas_size if arguments.tower == "sam" else config.siglip.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    reset_peak()
    result: dict[str, Any] = {"rest_mib": resident_bytes() / 2**20}
    outputs, seconds = {}, {name: [] for name in names}
    for repeat in range(arguments.repeats + 1):
        for name, run in towers.items():
            start = time.perf_counter()
            with torch.inference_mode():
                outputs[name] = run(pixels)
            if repeat or arguments.only:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
        if arguments.only:
            break
    result["seconds"] = {name: min(values) for name, values in seconds.items()}
    result["peak_mib"] = peak_bytes() / 2**20
    if not arguments.only:
        result["error"] = {name: relative_error(outputs["megavl"], outputs[name]) for name in names[1:]}
    print(json.dumps(result))
    return 0


def build(name: str, tower: str, config: ModelConfig, weights: dict[str, torch.Tensor]) -> Run:
    """The call of a tower."""
    if name == "megavl":
        encoder = VisionEncoder(config)
        flat = {key.removeprefix("vision."): value for key, value in weights.items() if key.startswith("vision.")}
        encoder.load_state_dict(flat)
        return encoder.get_submodule(tower)
    model = transformers_model(config, weights, attention=name).model
    if tower == "siglip":
        features = model.get_low_res_image_features
    else:
        features = model.get_high_res_image_features
        for part in ("vision_model", "language_model", "aligner"):
            setattr(model, part, None)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        found = features(pixels)
        # Transformers 4 returns the tensor itself.
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state

    return run


if __name__ == "__main__":
    sys.exit(main())
