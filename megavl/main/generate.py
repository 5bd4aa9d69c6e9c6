"""`megavl generate MODEL --image F --prompt TEXT`."""

from __future__ import annotations

import argparse
import json

from megavl.config.errors import UsageError
from megavl.main.device import add_device_arguments, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument("--prompt", required=True, help="text; <image_placeholder> marks where an image stands")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="image file; repeat it for several images"
    )
    parser.add_argument(
        "--template",
        choices=("deepseek", "plain", "none"),
        default="deepseek",
        help="deepseek: one turn of a chat; plain: continue the text after BOS; none: the text alone "
        "(default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: DeepSeek-VL's own")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=512, help="default: %(default)s")
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="draw tokens at this temperature; default: greedy"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw from the likeliest tokens that reach this share"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON line: prompt_tokens, token_ids, text")
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer a prompt; 0.

    The prompt and its images are read before the weights, so that a mistake there is told at once.
    """
    choose_device(arguments.device)
    from megavl.data.template import SYSTEM_PROMPT
    from megavl.generate.decode import generate
    from megavl.generate.prompt import answer_text, encode_prompt, prompt_pieces, read_canvases
    from megavl.generate.sampling import Sampling
    from megavl.main.open_model import find_model, loaded

    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens: {arguments.max_new_tokens} must be at least 1")
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    pieces = prompt_pieces(
        arguments.prompt,
        images=len(arguments.image),
        template=arguments.template,
        system=SYSTEM_PROMPT if arguments.system is None else arguments.system,
    )
    source = find_model(arguments.model)
    ids = encode_prompt(pieces, tokenizer=source.tokenizer, config=source.config, room=arguments.max_new_tokens)
    images = read_canvases(arguments.image, geometry=source.config.image_geometry)
    with loaded(source, dtype=arguments.dtype) as model:
        eos_id = source.tokenizer.eos_id
        tokens = list(
            generate(
                model, ids, images=images, eos_id=eos_id, max_new_tokens=arguments.max_new_tokens, sampling=sampling
            )
        )
    text = answer_text(tokens, tokenizer=source.tokenizer)
    if arguments.json:
        print(json.dumps({"prompt_tokens": len(ids), "token_ids": tokens, "text": text}, ensure_ascii=False))
    else:
        print(text.strip() if arguments.template == "deepseek" else text)
    return 0
