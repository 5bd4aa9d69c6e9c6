"""Times greedy decoding of transformers or of MegaVL in one process, on an exported folder.

`launch/bench/decode.py` starts both, gives them the same prompts in turn, and writes the report.

    python -m launch.bench.engines.decode_speed folder OUT --model wide
    python -m launch.bench.engines.decode_speed megavl OUT --dtype bfloat16 --batch-size 4 --tokens 64

`folder` writes random weights to OUT. The others load OUT, and answer each line of their input with one run and one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from launch.bench.engines.peak_memory import peak_bytes
from megavl.config.load import load_model_config
from megavl.config.model import ModelConfig

_FEWER = {"num_layers": 6, "vocab_size": 32768, "max_position_embeddings": 4096}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny-hybrid", {}),
    "medium": (
        "tiny-siglip",
        {"llm": {"hidden_size": 512, "ffn_hidden_size": 1408, "num_layers": 8, "num_attention_heads": 8}},
    ),
    "wide": ("1b", {"llm": _FEWER, "image_token_id": 3}),
    "hybrid": (
        "7b",
        {
            "llm": {"hidden_size": 1024, "ffn_hidden_size": 2816, "num_layers": 16, "num_attention_heads": 8}
            | {"vocab_size": 32768, "max_position_embeddings": 4096},
            "siglip": {"width": 256, "depth": 6, "heads": 4, "mlp_dim": 1024},
            "sam": {"width": 192, "depth": 4, "heads": 3, "mlp_dim": 768, "global_attn_indexes": [1, 3]}
            | {"neck_channels": 64},
            "image_token_id": 3,
        },
    ),
}
"""Preset, and the sizes that differ from it. `medium` has a decoder of 8 layers of width 512; a token reads 26 million
weights. `wide` is the 1.3B with 6 of its 24 layers and a smaller vocabulary; a token reads 0.38 B weights. `hybrid` has
the topology and image tokens of the 7B; a token reads 0.24 B weights."""
BOS, EOS = 0, 1


def main() -> int:
    """Write the folder, or serve runs of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("folder", "megavl", "transformers"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(arguments.threads)
    preset, changes = MODELS[arguments.model]
    config = load_model_config(preset, **changes)
    if arguments.side == "folder":
        write_folder(config, arguments.folder)
        return 0
    run = {"megavl": open_megavl, "transformers": open_transformers}[arguments.side](arguments, config)
    for _ in sys.stdin:
        print(json.dumps(run() | {"peak_bytes": peak_bytes()}), flush=True)
    return 0


def write_folder(config: ModelConfig, out: Path) -> None:
    """Random weights in the native format, with a byte-level tokenizer."""
    from launch.bench.engines.random_models import random_weights, write_tokenizer
    from megavl.convert.hf_write import write_hf
    from megavl.weights.lazy import LazyTensor

    tokenizer = write_tokenizer(out.with_name(out.name + "-tokenizer"))
    tensors = {name: LazyTensor.of(tensor) for name, tensor in random_weights(config)}
    write_hf(out, config=config, tensors=tensors, fmt="native", tokenizer_dir=tokenizer, dtype="bfloat16")


def prompts(config: ModelConfig, *, batch: int) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of one image and 40 or more tokens of text, and canvases uint8 (I, 3, C, C)."""
    generator = torch.Generator().manual_seed(0)
    ids = []
    for number in range(batch):
        text = torch.randint(4, config.llm.vocab_size, (40 + 5 * number,), generator=generator).tolist()
        ids.append([BOS, *text[:10], *[config.image_token_id] * config.image_tokens, *text[10:]])
    side = config.canvas_size
    return ids, torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)


def open_megavl(arguments: argparse.Namespace, config: ModelConfig) -> Callable[[], dict[str, Any]]:
    """Load the folder; the function that is returned generates once and reports."""
    from megavl.generate.decode import Request, generate
    from megavl.generate.pretrained import Model

    model = Model.load(arguments.folder, dtype=arguments.dtype)
    ids, canvases = prompts(config, batch=arguments.batch_size)

    def run() -> dict[str, Any]:
        requests = [
            Request(ids=one, images=canvas[None], max_new_tokens=arguments.tokens) for one, canvas in zip(ids, canvases)
        ]
        found: list[list[int]] = [[] for _ in ids]
        times, began = [], time.perf_counter()
        length = max(map(len, ids)) + arguments.tokens
        for number, token, _ in generate(model.stage, requests, eos_id=-1, rows=len(ids), length=length):
            found[number].append(token)
            if number == len(ids) - 1:
                times.append(time.perf_counter() - began)
        return report(times, found)

    return run


@torch.no_grad()
def open_transformers(arguments: argparse.Namespace, config: ModelConfig) -> Callable[[], dict[str, Any]]:
    """Load the folder; the function that is returned generates once and reports."""
    import transformers

    from megavl.generate.against_transformers import native_class, pixel_tensors

    dtype = getattr(torch, arguments.dtype)
    # The faster of its attentions on a CPU.
    how = {"dtype": dtype, "attn_implementation": "sdpa"}
    model = native_class(config).from_pretrained(arguments.folder, **how).eval()
    ids, canvases = prompts(config, batch=arguments.batch_size)
    longest = max(map(len, ids))
    padded = torch.tensor([[EOS] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])

    class Clock(transformers.StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            self.times.append(time.perf_counter() - self.began)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def run() -> dict[str, Any]:
        clock = Clock()
        clock.began = time.perf_counter()
        pixels = {name: tensor.to(dtype) for name, tensor in pixel_tensors(canvases, config=config).items()}
        out = model.generate(
            input_ids=padded,
            attention_mask=mask,
            **pixels,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=EOS,
            max_new_tokens=arguments.tokens,
            stopping_criteria=[clock],
        )
        return report(clock.times, out[:, longest:].tolist())

    return run


def report(times: list[float], tokens: list[list[int]]) -> dict[str, Any]:
    """Rate of the tokens after the first ones, from the times at which each step ended."""
    assert len(times) == len(tokens[0]), "one time a step"
    steps = len(times) - 1
    rate = len(tokens) * steps / (times[-1] - times[0])
    return {"tokens_per_s": rate, "first_token_s": times[0], "tokens": tokens}


if __name__ == "__main__":
    sys.exit(main())
