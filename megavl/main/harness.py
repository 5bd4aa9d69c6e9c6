"""`megavl evaluate MODEL --harness lm_eval --tasks a,b`: tasks of lm-evaluation-harness, in process, on any layout."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megavl.config.errors import UsageError
from megavl.config.recipe import ParallelConfig
from megavl.files.durable import replace_durably, storage_errors
from megavl.foreign.printing import say
from megavl.main.bounds import require_at_least
from megavl.main.ledger import open_ledger
from megavl.main.ranks import is_speaker

if TYPE_CHECKING:
    from megavl.generate.pretrained import Model

_OWN = ("benchmark", "mode", "normalize", "endpoint", "judge", "blind", "template", "system", "max_new_tokens", "seed")
"""Options of `megavl evaluate` that only its own tasks follow."""


def add_harness_arguments(parser: argparse.ArgumentParser) -> None:
    """--harness and the options that go with it; after the command's own options."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness (extra `lm-eval`)")
    group.add_argument("--harness", choices=("lm_eval",), help="run --tasks of this harness instead of task files")
    group.add_argument("--tasks", dest="harness_tasks", metavar="A,B", help="names of tasks or groups; * is allowed")
    group.add_argument("--include-path", metavar="DIR", type=Path, help="folder with further tasks as YAML files")
    group.add_argument("--num-fewshot", metavar="N", type=int, help="examples before a question; default: the task's")
    group.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="run the code that the model writes, on this machine, for tasks such as mbpp",
    )
    parser.set_defaults(own_defaults={name: parser.get_default(name) for name in _OWN})


def check_harness_arguments(arguments: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: naming the option.
    """
    if arguments.harness is None:
        for name, option in (
            ("harness_tasks", "--tasks"),
            ("include_path", "--include-path"),
            ("num_fewshot", "--num-fewshot"),
        ):
            if getattr(arguments, name) is not None:
                raise UsageError(f"{option}: belongs to a harness; add --harness lm_eval")
        return
    if arguments.tasks:
        raise UsageError(f"{arguments.tasks[0]}: a task file; --harness runs the tasks of --tasks instead")
    if not [name for name in (arguments.harness_tasks or "").split(",") if name.strip()]:
        raise UsageError("--harness: name its tasks, such as --tasks hellaswag,mmlu")
    require_at_least(0, arguments, "num_fewshot")
    for name in _OWN:
        if getattr(arguments, name) != arguments.own_defaults[name]:
            raise UsageError(f"--{name.replace('_', '-')}: tasks of a harness say that themselves; leave it out")


def evaluate_with_harness(arguments: argparse.Namespace, parallel: ParallelConfig) -> int:
    """Load the tasks before the weights, run them, print the table and write the report; 0."""
    try:
        from megavl.evaluate.harness import run
        from megavl.evaluate.harness.language_model import HarnessModel
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("megavl"):
            raise
        raise UsageError(f"--harness lm_eval: {error.name} is not installed; pip install 'megavl[lm-eval]'") from error
    from megavl.checkpoint import collective_errors
    from megavl.evaluate.out_folder import model_fingerprint, take_folder
    from megavl.generate.open_model import check_layout, find_model_on_every_rank, load_stage, world
    from megavl.generate.pretrained import Model, Processor

    words = [word.strip() for word in arguments.harness_tasks.split(",")]
    tasks, names = run.find_tasks([word for word in words if word], include_path=arguments.include_path)
    folder = Path(arguments.out) if arguments.out else None
    with world(parallel), ExitStack() as held:
        if folder is not None:
            collective_errors.on_rank_zero(lambda: held.enter_context(take_folder(folder)) and None)
        source = find_model_on_every_rank(arguments.model)
        check_layout(source.config, parallel)

        def load() -> Model:
            stage = load_stage(source, dtype=arguments.dtype, parallel=parallel)
            return Model(stage, Processor(source.config, source.tokenizer))

        ledger = open_ledger(
            folder,
            identity=lambda: {
                "harness": run.VERSION,
                "model": model_fingerprint(source.path),
                "dtype": arguments.dtype or "default",
            },
        )
        results = run.run_tasks(
            HarnessModel(load, ledger=ledger, batch_size=arguments.batch_size),
            tasks,
            names,
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            allow_code=arguments.confirm_run_unsafe_code,
            speaks=is_speaker(),
        )
    if is_speaker():
        say(*run.table(results).splitlines())
        if folder is not None:
            run.write_report(results, folder)
            say(f"report: {folder / 'report.md'}")
        if arguments.json:
            figures = json.dumps(results["results"], indent=1, default=str) + "\n"
            with storage_errors(f"{arguments.json}: cannot write the report"):
                replace_durably(Path(arguments.json), figures.encode())
    return 0
