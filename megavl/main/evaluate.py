"""`megavl evaluate MODEL TASK.jsonl ... [--json OUT]`."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from megavl.config.errors import StorageError, UsageError
from megavl.config.recipe import ParallelConfig
from megavl.files.durable import replace_durably
from megavl.foreign.printing import say
from megavl.main.device import add_device_arguments
from megavl.main.ranks import add_rank_arguments, is_speaker, run_on_ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument(
        "tasks",
        metavar="TASK.jsonl",
        nargs="+",
        help='lines of {"id", "images", "kind"} with {"prompt", "choices", "answer"} (option of lowest perplexity), '
        '{"prompt", "answers"} (free-form answer) or {"text"} (bits per byte); images relative to the file',
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures, perplexities and answers there")
    parser.add_argument("--limit", metavar="N", type=int, help="ask the first N questions of each file only")
    parser.add_argument(
        "--blind",
        action="store_true",
        help="ask questions with choices again with shuffled images, and report that too",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of --blind (default: %(default)s)")
    parser.add_argument(
        "--template",
        choices=("deepseek", "plain", "none"),
        default="deepseek",
        help="format of the prompt, as in megavl generate (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: DeepSeek-VL's own")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=512, help="of a free-form answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="answers in progress at a time (default: %(default)s)"
    )
    add_rank_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score the tasks and print the tables; 0."""
    for name in ("limit", "max_new_tokens", "batch_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: {getattr(arguments, name)} must be at least 1")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UsageError(f"--json: {Path(arguments.json).parent} is no directory; create it first")
    return run_on_ranks(arguments, partial(_evaluate, arguments))


def _evaluate(arguments: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Check every line before the weights are read, then score."""
    from megavl.checkpoint import collective_errors
    from megavl.config.chat import SYSTEM_PROMPT
    from megavl.evaluate.run_tasks import evaluate
    from megavl.evaluate.task import read_tasks
    from megavl.generate.open_model import check_layout, find_model_on_every_rank, load_stage, world
    from megavl.generate.pretrained import Model, Processor

    with world(parallel):
        tasks = collective_errors.on_rank_zero(lambda: read_tasks(arguments.tasks, limit=arguments.limit))
        source = find_model_on_every_rank(arguments.model)
        check_layout(source.config, parallel)
        stage = load_stage(source, dtype=arguments.dtype, parallel=parallel)
        report = evaluate(
            Model(stage, Processor(source.config, source.tokenizer)),
            tasks,
            template=arguments.template,
            system=SYSTEM_PROMPT if arguments.system is None else arguments.system,
            blind=arguments.blind,
            seed=arguments.seed,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
        )
    if is_speaker():
        say(report.table())
        if arguments.json:
            _write(Path(arguments.json), json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        replace_durably(path, text.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot write the report ({error.strerror}); choose a writable place") from error
