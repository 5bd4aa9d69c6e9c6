"""`megavl generate MODEL --image F --prompt TEXT`, or `--prompts FILE.jsonl`; on one process or on several ranks."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from megavl.config.errors import UsageError
from megavl.config.recipe import ParallelConfig
from megavl.foreign.printing import json_line, say
from megavl.main.bounds import require_at_least
from megavl.main.device import add_device_arguments
from megavl.main.ranks import add_rank_arguments, is_speaker, run_on_ranks
from megavl.main.sampling import add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    import torch

    from megavl.generate.decode import Request
    from megavl.generate.pretrained import Answer, Model, Processor
    from megavl.generate.prompts_file import Prompt
    from megavl.generate.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument("--prompt", help="text; <image_placeholder> marks where an image stands")
    parser.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="image file; repeat it for several images"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help='many prompts, one {"prompt", "images", "system", "seed", "id"} a line; prints one JSON line for each',
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="answers in progress at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--template",
        choices=("deepseek", "plain", "none"),
        default="deepseek",
        help="deepseek: one turn of a chat; plain: continue the text after BOS; none: the text alone "
        "(default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: the model's own")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; may be repeated"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line: prompt_tokens, token_ids, text")
    add_rank_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answer; returns 0."""
    require_at_least(1, arguments, "batch_size")
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UsageError("give either --prompt with one question, or --prompts with a file of them")
    if arguments.prompts is not None and arguments.image:
        raise UsageError("--image: it belongs to --prompt; the lines of --prompts name their own images")
    return run_on_ranks(arguments, partial(_answer, arguments))


def _answer(arguments: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Check every prompt before the weights are read, then answer."""
    from megavl.checkpoint import collective_errors
    from megavl.generate.open_model import check_layout, find_model_on_every_rank, load_stage, world
    from megavl.generate.pretrained import Model, Processor

    sampling = sampling_of(arguments)
    with world(parallel):
        source = find_model_on_every_rank(arguments.model)
        check_layout(source.config, parallel)
        processor = Processor(source.config, source.tokenizer)
        prompts = collective_errors.on_rank_zero(lambda: _prompts(arguments))
        ids = collective_errors.on_rank_zero(lambda: [_encode(arguments, processor, prompt) for prompt in prompts])
        first = _canvases(processor, prompts[0])
        model = Model(load_stage(source, dtype=arguments.dtype, parallel=parallel), processor)
        requests = _requests(arguments, model, prompts, ids, first=first, sampling=sampling)
        if arguments.prompts is not None:
            length = max(map(len, ids)) + arguments.max_new_tokens
            _print_all(arguments, model, requests, prompts, length=length)
        elif arguments.json:
            _print_one(model, requests)
        else:
            _print_stream(arguments, model, next(requests))
    return 0


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    from pathlib import Path

    from megavl.generate.prompts_file import Prompt, read_prompts

    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    images = tuple(map(Path, arguments.image))
    return [Prompt(location="", text=arguments.prompt, images=images, system=None, seed=None, id=None)]


def _encode(arguments: argparse.Namespace, processor: Processor, prompt: Prompt) -> list[int]:
    from megavl.generate.json_lines import naming
    from megavl.generate.prompt import prompt_pieces

    systems = (prompt.system, arguments.system, processor.config.system_prompt)
    system = next(text for text in systems if text is not None)
    with naming(prompt.location):
        pieces = prompt_pieces(prompt.text, images=len(prompt.images), template=arguments.template, system=system)
        return processor.encode(pieces, room=arguments.max_new_tokens)


def _canvases(processor: Processor, prompt: Prompt) -> torch.Tensor:
    """Images of a prompt on the ranks that encode them; a damaged image ends all ranks alike."""
    from megavl.checkpoint import collective_errors
    from megavl.generate.json_lines import naming
    from megavl.parallel import groups

    found: list[torch.Tensor] = []

    def read() -> None:
        with naming(prompt.location):
            found.append(processor.read_images(prompt.images if groups.position().first_stage else ()))

    collective_errors.on_every_rank(read)
    return found[0]


def _requests(
    arguments: argparse.Namespace,
    model: Model,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    *,
    first: torch.Tensor,
    sampling: Sampling,
) -> Iterator[Request]:
    """Requests in order; images are read when needed, and `first` holds those of the first prompt."""
    from megavl.generate.decode import Request
    from megavl.generate.stop import StopTexts

    for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        yield Request(
            ids=tokens,
            images=_canvases(model.processor, prompt) if number else first,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling if prompt.seed is None else replace(sampling, seed=prompt.seed),
            stop=StopTexts(arguments.stop, model.processor.tokenizer) if arguments.stop else None,
        )


def _print_all(
    arguments: argparse.Namespace, model: Model, requests: Iterator[Request], prompts: Sequence[Prompt], *, length: int
) -> None:
    from tqdm import tqdm

    answers = model.answers(requests, batch_size=min(arguments.batch_size, len(prompts)), length=length)
    # On a terminal only, because a file would fill with half lines; and on one rank.
    quiet = None if is_speaker() else True
    with tqdm(total=len(prompts), unit="prompt", desc="generate", disable=quiet) as bar:
        tokens = 0
        for prompt, answer in zip(prompts, answers):
            row: dict[str, Any] = {} if prompt.id is None else {"id": prompt.id}
            _say_json(row | _row(answer))
            tokens += len(answer.token_ids)
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)
            bar.update()


def _print_one(model: Model, requests: Iterator[Request]) -> None:
    (answer,) = model.answers(requests, batch_size=1)
    _say_json(_row(answer))


def _print_stream(arguments: argparse.Namespace, model: Model, request: Request) -> None:
    for piece in model.stream(request, strip=arguments.template == "deepseek"):
        _say(piece)
    _say("\n")


def _row(answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens": answer.prompt_tokens, "token_ids": answer.token_ids, "text": answer.text}


def _say_json(row: dict[str, Any]) -> None:
    _say(json_line(row) + "\n")


def _say(text: str) -> None:
    if text and is_speaker():
        say(text, end="", keep="\n\t")
