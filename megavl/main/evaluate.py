"""`megavl evaluate MODEL TASK.jsonl ... [--benchmark NAME=PATH ...] [--harness lm_eval --tasks A,B] [--out DIR]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megavl.config.errors import StorageError, UsageError
from megavl.config.evaluation import BENCHMARKS, benchmark_of
from megavl.config.recipe import ParallelConfig
from megavl.config.version import VERSION
from megavl.files.durable import replace_durably
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least
from megavl.main.device import add_device_arguments
from megavl.main.harness import add_harness_arguments, check_harness_arguments, evaluate_with_harness
from megavl.main.ledger import open_ledger as open_answers
from megavl.main.ranks import add_rank_arguments, is_speaker, run_on_ranks

if TYPE_CHECKING:
    from megavl.evaluate.endpoint import Endpoint
    from megavl.evaluate.ledger import Ledger
    from megavl.evaluate.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument(
        "tasks",
        metavar="TASK.jsonl",
        nargs="*",
        help='lines of {"id", "images", "kind"} with {"prompt", "choices", "answer"} (option of lowest perplexity), '
        '{"prompt", "answers"} (free-form answer) or {"text"} (bits per byte); images relative to the file',
    )
    parser.add_argument(
        "--benchmark",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help=f"public benchmarks as they are published, each a file, folder or quoted pattern: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--mode",
        choices=("generate", "perplexity"),
        default="generate",
        help="let the model answer benchmarks, or score their choices, as during training (default: %(default)s)",
    )
    parser.add_argument(
        "--normalize",
        choices=("token", "sum", "byte"),
        default="token",
        help="compare choices by perplexity, by log-probability, or by log-probability for each byte "
        "(default: %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="keep every answer in DIR/answers.jsonl, go on from those that are there, and write report.json, "
        "report.md and report.svg",
    )
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible endpoint for benchmarks that need a judge")
    parser.add_argument("--judge", metavar="NAME", help="model at --endpoint that judges; its key: OPENAI_API_KEY")
    parser.add_argument("--json", metavar="OUT", help="write the figures, perplexities and answers there")
    parser.add_argument(
        "--limit", metavar="N", type=int, help="ask the first N questions of each file and benchmark only"
    )
    parser.add_argument(
        "--blind",
        action="store_true",
        help="ask the choices of task files again with shuffled images, and report that too",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of --blind (default: %(default)s)")
    parser.add_argument(
        "--template",
        choices=("deepseek", "plain", "none"),
        default="deepseek",
        help="format of the prompt, as in megavl generate (default: %(default)s)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: the model's own")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=512, help="of a free-form answer (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=8, help="answers in progress at a time (default: %(default)s)"
    )
    add_harness_arguments(parser)
    add_rank_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Score the tasks and print the tables; 0."""
    require_at_least(1, arguments, "limit", "max_new_tokens", "batch_size")
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise UsageError(f"--json: {Path(arguments.json).parent} is no directory; create it first")
    check_harness_arguments(arguments)
    if arguments.harness:
        return run_on_ranks(arguments, partial(evaluate_with_harness, arguments))
    if not (arguments.tasks or arguments.benchmark):
        raise UsageError("nothing to evaluate: give a TASK.jsonl, --benchmark NAME=PATH, or --harness with --tasks")
    if (arguments.endpoint is None) != (arguments.judge is None):
        raise UsageError("--endpoint and --judge belong together; give both, or neither")
    return run_on_ranks(arguments, partial(_evaluate, arguments))


def _evaluate(arguments: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Check every line before the weights are read, then score."""
    from megavl.checkpoint import collective_errors
    from megavl.evaluate.benchmarks.ask import read_benchmarks
    from megavl.evaluate.out_folder import model_fingerprint, take_folder
    from megavl.evaluate.run_tasks import evaluate
    from megavl.evaluate.task import read_tasks
    from megavl.generate.open_model import check_layout, find_model_on_every_rank, load_stage, world
    from megavl.generate.pretrained import Model, Processor

    # What the recipe's evaluation.tasks may name, this command may be given too.
    files = [entry for entry in arguments.tasks if not benchmark_of(entry)[0]]
    entries = [*(entry for entry in arguments.tasks if benchmark_of(entry)[0]), *arguments.benchmark]
    judge = _judge(arguments)
    folder = Path(arguments.out) if arguments.out else None
    ledgers: list[Ledger] = []
    with ExitStack() as held:
        with world(parallel):
            if folder is not None:
                # Two evaluations would ask the same questions, and mix their lines.
                collective_errors.on_rank_zero(lambda: held.enter_context(take_folder(folder)) and None)
            tasks = collective_errors.on_rank_zero(lambda: read_tasks(files, limit=arguments.limit))
            benchmarks = collective_errors.on_rank_zero(lambda: read_benchmarks(entries, limit=arguments.limit))
            source = find_model_on_every_rank(arguments.model)
            check_layout(source.config, parallel)

            def open_ledger(fingerprint: Callable[[], str]) -> Ledger:
                ledgers.append(
                    open_answers(
                        folder,
                        # What changes no answer is no part of it, such as the sizes of batches.
                        identity=lambda: {
                            "model": model_fingerprint(source.path),
                            "questions": fingerprint(),
                            "mode": arguments.mode,
                            "max_new_tokens": arguments.max_new_tokens,
                            "dtype": str(next(stage.parameters()).dtype).removeprefix("torch."),
                            "blind": arguments.seed if arguments.blind else None,
                        },
                    )
                )
                return ledgers[0]

            stage = load_stage(source, dtype=arguments.dtype, parallel=parallel)
            report = evaluate(
                Model(stage, Processor(source.config, source.tokenizer)),
                tasks,
                benchmarks=benchmarks,
                template=arguments.template,
                system=arguments.system,
                blind=arguments.blind,
                seed=arguments.seed,
                max_new_tokens=arguments.max_new_tokens,
                batch_size=arguments.batch_size,
                normalize=arguments.normalize,
                mode=arguments.mode,
                open_ledger=open_ledger,
            )
        if is_speaker():
            _finish(report, arguments, folder=folder, judge=judge, ledger=ledgers[0], path=source.path)
    return 0


def _finish(
    report: Report,
    arguments: argparse.Namespace,
    *,
    folder: Path | None,
    judge: Endpoint | None,
    ledger: Ledger,
    path: Path,
) -> None:
    """Let a judge read what it must, then print and write the report."""
    from dataclasses import replace

    from megavl.evaluate.benchmarks.ask import judge_benchmark
    from megavl.evaluate.out_folder import write_report

    if judge is not None:
        judged = (judge_benchmark(one, judge=judge, ledger=ledger) for one in report.benchmarks)
        report = replace(report, benchmarks=tuple(judged))
    say(*report.table().splitlines())
    if arguments.json:
        _write(Path(arguments.json), json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")
    if folder is not None:
        about = {
            "model": str(path),
            "tasks": ", ".join([*arguments.tasks, *arguments.benchmark]),
            "normalization": arguments.normalize,
            "template": arguments.template,
            "megavl": VERSION,
        }
        write_report(folder, report, about=about)
        say(f"report: {folder / 'report.md'}")


def _judge(arguments: argparse.Namespace) -> Endpoint | None:
    if arguments.endpoint is None:
        return None
    from megavl.evaluate.endpoint import Endpoint

    return Endpoint(arguments.endpoint, arguments.judge)


def _write(path: Path, text: str) -> None:
    try:
        replace_durably(path, text.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot write the report ({error.strerror}); choose a writable place") from error
