"""`megavl evaluate MODEL TASK.jsonl ... [--json OUT]`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from megavl.config.errors import StorageError, UsageError
from megavl.main.device import add_device_arguments, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument(
        "tasks",
        metavar="TASK.jsonl",
        nargs="+",
        help='one {"id", "images", "prompt", "choices", "answer", "kind"} a line; images relative to the file',
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures and every question's perplexities there")
    parser.add_argument("--limit", metavar="N", type=int, help="ask the first N questions of each file only")
    parser.add_argument(
        "--blind", action="store_true", help="ask again with the images of other questions, and report that too"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of --blind (default: %(default)s)")
    parser.add_argument(
        "--template",
        choices=("deepseek", "plain", "none"),
        default="deepseek",
        help="format of the prompt, as in megavl generate (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: DeepSeek-VL's own")
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Ask the questions, print the table; 0."""
    choose_device(arguments.device)
    from megavl.config.chat import SYSTEM_PROMPT
    from megavl.evaluate.multiple_choice import evaluate_choices
    from megavl.evaluate.task import read_tasks
    from megavl.generate.open_model import find_model, loaded

    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit: {arguments.limit} must be at least 1")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UsageError(f"--json: {Path(arguments.json).parent} is no directory; create it first")
    questions = read_tasks(arguments.tasks, limit=arguments.limit)
    source = find_model(arguments.model)
    with loaded(source, dtype=arguments.dtype) as model:
        report = evaluate_choices(
            model,
            questions,
            tokenizer=source.tokenizer,
            config=source.config,
            template=arguments.template,
            system=SYSTEM_PROMPT if arguments.system is None else arguments.system,
            blind=arguments.blind,
            seed=arguments.seed,
        )
    print(report.table())
    if arguments.json:
        _write(Path(arguments.json), json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return 0


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot write the report ({error.strerror}); choose a writable place") from error
