"""Runs tasks of lm-evaluation-harness by their names; prompts, data and metrics are the harness's own."""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from megavl.config.errors import DataError, MegaVLError, UsageError, one_line
from megavl.evaluate.harness.language_model import HarnessModel
from megavl.evaluate.out_folder import write_files

VERSION = f"lm_eval {lm_eval.__version__}"


class Tasks(TaskManager):
    """Tasks by name, of the harness and of a folder; a task that cannot be loaded is one clear error."""

    def load(self, task_list: Any) -> Any:
        """Tasks and groups with their data.

        Raises:
            DataError: a file of a task is wrong, or its data cannot be had.
        """
        try:
            return super().load(task_list)
        except Exception as error:  # YAML, data sets and the network raise nearly anything
            raise DataError(
                f"--tasks: {', '.join(task_list)}: cannot be loaded ({type(error).__name__}: {one_line(error)}); check "
                "the task's file and its data, and that data from the Hub are in its cache or can be fetched"
            ) from error


def find_tasks(wanted: Sequence[str], *, include_path: Path | None) -> tuple[Tasks, list[str]]:
    """The harness's tasks with those of a folder, and the names that are meant.

    Args:
        wanted: names of tasks, groups or tags; `*` stands for any characters.
        include_path: folder of further tasks. A task may name Python functions beside it, which are run.

    Raises:
        UsageError: no such folder or name.
        DataError: a file in the folder is wrong.
    """
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path: {include_path} is no folder; give the folder with the tasks' YAML files")
    try:
        tasks = Tasks(include_path=None if include_path is None else str(include_path))
    except Exception as error:  # see Tasks.load
        raise DataError(f"--include-path: {include_path}: {type(error).__name__}: {one_line(error)}") from error
    names: list[str] = []
    for word in wanted:
        found = sorted(fnmatch.filter(tasks.all_tasks, word)) if "*" in word else [word]
        if not found or found[0] not in tasks.all_tasks:
            near = difflib.get_close_matches(word, tasks.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists the harness's own"
            raise UsageError(f"--tasks: {word!r} is no task of lm-evaluation-harness or of --include-path; {hint}")
        names += [name for name in found if name not in names]
    return tasks, names


def run_tasks(
    model: HarnessModel,
    tasks: Tasks,
    names: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    allow_code: bool = False,
    speaks: bool = True,
) -> dict[str, Any]:
    """The harness's results: figures by task, their settings, and every sample. Every rank makes the same call.

    Args:
        num_fewshot: examples in front of each question; None takes what the task says.
        limit: most documents of each task.
        allow_code: run code that the model writes, for tasks that do.
        speaks: whether warnings of the harness are shown on this rank.

    Returns:
        The results; on ranks that are not first on their machine, nothing.

    Raises:
        DataError: a task cannot be loaded or does not fit the model, or it runs code and may not.
        NumericsError: the model's logits are not finite.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING if speaks else logging.CRITICAL)
    try:
        found = simple_evaluate(
            model,
            tasks=list(names),
            task_manager=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            confirm_run_unsafe_code=allow_code,
        )
    except MegaVLError:
        raise
    except Exception as error:  # templates and metrics of tasks raise nearly anything
        if model.running:
            raise
        said = one_line(error)
        if "confirm_run_unsafe_code" in said:
            said += "; --confirm-run-unsafe-code runs what the model writes on this machine"
        raise DataError(f"--tasks: {', '.join(names)}: {type(error).__name__}: {said}") from error
    return dict(found or {})


def table(results: dict[str, Any]) -> str:
    """The harness's own table of tasks, and that of groups where there are some, in Markdown."""
    tables = [make_table(results), make_table(results, "groups") if results.get("groups") else ""]
    return "\n\n".join(filter(None, (one.strip() for one in tables)))


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write `report.json` with the figures, `report.md` with the table, and `samples.jsonl` with a line per sample.

    Raises:
        StorageError: they cannot be written.
    """
    figures = {name: value for name, value in results.items() if name != "samples"}
    lines = [
        json.dumps({"task": task, **sample}, default=handle_non_serializable, ensure_ascii=False)
        for task, samples in results.get("samples", {}).items()
        for sample in samples
    ]
    files = {
        "samples.jsonl": "".join(f"{line}\n" for line in lines),
        "report.md": table(results) + "\n",
        "report.json": json.dumps(figures, indent=1, default=handle_non_serializable, ensure_ascii=False) + "\n",
    }
    write_files(out, files)
