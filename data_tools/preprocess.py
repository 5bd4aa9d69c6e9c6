"""Raw data to a packed dataset: `python data_tools/preprocess.py --input data.jsonl --output out --tokenizer tok`.

Text, captions, interleaved documents and conversations become Megatron `.bin`/`.idx` shards with tables and manifests.
data_tools/README.md describes the input formats, megavl/data/README.md the output. The same command resumes a run that
was stopped.
"""

from __future__ import annotations

import os

# The processes already use every core, so neither BLAS nor the tokenizer needs threads; both look when they are loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.pipeline.balance import balance_lines, check_balance
from data_tools.pipeline.engine import Workers
from data_tools.pipeline.extras import require
from data_tools.pipeline.finish import check_rejected, dry_run_report, finish
from data_tools.pipeline.first_images import check_first_images
from data_tools.pipeline.histograms import histogram_lines
from data_tools.pipeline.image_map import open_image_map
from data_tools.pipeline.image_source import is_address
from data_tools.pipeline.job import Input, Job, Task, needs_image_token, open_input, plan_tasks, sampled, tokenizer_at
from data_tools.pipeline.output import Output
from data_tools.readers.files import NoRecordsError, check_columns, first_with_image
from data_tools.readers.formats import COLUMN_NAMES, FORMATS
from data_tools.readers.input_paths import counted, input_files
from megavl.config.chat import SYSTEM_PROMPT
from megavl.config.errors import MegaVLError, UsageError
from megavl.config.presets import IMAGE_PRESETS
from megavl.data.image import MAX_ASPECT
from megavl.foreign.printing import VisibleParser, say, say_error


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False, [], "") else action.help


def build_parser() -> argparse.ArgumentParser:
    """All options, with their defaults."""
    parser = VisibleParser(
        prog="preprocess.py",
        description="Turn text, captions and conversations into a packed dataset for megavl train.",
        formatter_class=_Defaults,
    )
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("input and output").add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="SRC",
        help="JSONL, JSON, tar, Parquet or Arrow files, folders of them, or patterns",
    )
    add("--output", required=True, metavar="DIR", help="folder of the dataset")
    add("--tokenizer", required=True, metavar="PATH", help="folder with tokenizer.json, or a SentencePiece .model")
    add(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="format of all records; otherwise each is read in the one that it has",
    )
    add(
        "--columns",
        nargs="+",
        default=[],
        type=_column,
        metavar="NAME=COLUMN",
        help="keys or columns that are called otherwise, such as image=photo text=alt; NAME is one of "
        + ", ".join(COLUMN_NAMES),
    )
    add("--ignore", nargs="+", default=[], metavar="KEY", help="keys of records to leave out, with all below them")
    add(
        "--image-root",
        nargs="+",
        metavar="DIR",
        help="folders that image paths start from and may not leave; the first that holds a file wins "
        "(default: the input's)",
    )
    add("--follow-links", action="store_true", help="let symbolic links lead out of the image roots")
    add("--image-map", metavar="FILE", help="lines of address, tab and path, for images named by address")
    add(
        "--limit",
        type=_positive,
        metavar="N",
        help="read only the first N records; with --dry-run N records spread over the inputs, for an estimate",
    )

    add = parser.add_argument_group("samples and sequences").add_argument
    add("--template", choices=("deepseek", "plain", "none"), help="default: deepseek for turns, plain for documents")
    add("--system-prompt", default=SYSTEM_PROMPT, metavar="TEXT", help="model.system_prompt of recipes; '' adds none")
    add("--seq-length", type=_positive, default=4096, metavar="S", help="tokens per sequence")
    add("--pack", action=flag, default=True, help="put several samples into one sequence")
    add("--max-images-per-sequence", type=_positive, default=5, metavar="K", help="images per sequence")
    add(
        "--over-long",
        choices=("drop", "cut"),
        default="drop",
        help="reject a conversation above S or K, or truncate it after an answer that fits; documents are divided",
    )

    add = parser.add_argument_group("images").add_argument
    add("--image-preset", choices=tuple(IMAGE_PRESETS), default="hybrid-1024", help="image geometry of the model")
    add("--max-side", type=int, default=1024, metavar="PIXELS", help="re-encode larger images; 0: never")
    add("--max-aspect", type=float, default=MAX_ASPECT, metavar="R", help="largest ratio of the sides of an image")
    add(
        "--verify",
        choices=("header", "scaled", "full"),
        default="scaled",
        help="how much of an image is decoded",
    )

    add = parser.add_argument_group("the run").add_argument
    add("--workers", type=_positive, metavar="N", help="processes (default: one per core; 1 in a SLURM task)")
    add("--engine", choices=("local", "slurm"), default="local", help="here, or as a SLURM array of --num-tasks")
    add("--sbatch", default="", metavar="OPTIONS", help="further options of sbatch, such as '--partition=cpu'")
    add("--task", type=int, default=0, metavar="I", help="number of this array task, 0 to num-tasks - 1")
    add(
        "--num-tasks",
        type=_positive,
        default=1,
        metavar="N",
        help="array tasks that share the work, each a run of this command",
    )
    add("--finish", action=flag, default=True, help="make the dataset when all shards are done")
    add("--resume", action=flag, default=True, help="keep finished shards; otherwise start anew")
    add("--dry-run", action="store_true", help="count, pack and report without writing")
    add(
        "--on-error",
        choices=("skip", "fail"),
        default="skip",
        help="reject a record that cannot be used, or end the run",
    )
    add("--max-bad-frac", type=float, default=0.5, metavar="F", help="largest share of rejected records")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.engine == "slurm":
            return _on_slurm(options, sys.argv[1:] if arguments is None else arguments)
        return _run(options)
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here", to_errors=True)
        return 130


def _on_slurm(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Queue the SLURM jobs, or inside one of them do its part."""
    if options.num_tasks == 1 or options.dry_run or options.task:
        raise UsageError(
            "--engine slurm: needs --num-tasks of 2 or more, and neither --task nor --dry-run; "
            "use --engine local for these"
        )
    require("datatrove", extra="slurm")
    from data_tools.pipeline import submit as slurm

    if folder := os.environ.get(slurm.JOB_FOLDER):
        changes: dict[str, Any] = {"resume": True, "finish": False, "workers": options.workers or 1}
        if Path(folder).name == slurm.MERGE:
            changes |= {"finish": True, "num_tasks": 1, "workers": 1}
        slurm.run_array_task(
            Path(folder),
            array_tasks=options.num_tasks,
            work=lambda task: _run(argparse.Namespace(**(vars(options) | changes | {"task": task}))),
        )
        return 0
    job = _job(options)
    tasks = plan_tasks(job)
    output = Output(job.output)
    if not (options.resume and output.is_begun):
        check_first_images(job, tasks)
    locks = output.lock(array_task=0, array_tasks=1)
    output.begin(job.config, resume=options.resume, alone=True)
    todo = sorted({task.number % options.num_tasks for task in _left(job, tasks)})
    # Released before anything is queued, because an array task may start at once.
    locks.close()
    jobs = slurm.submit(
        arguments,
        output=job.output,
        todo=todo,
        array_tasks=options.num_tasks,
        workers=options.workers or 1,
        extra=options.sbatch,
    )
    array = (
        f"job array {jobs.array} of {len(todo)} tasks, and " if jobs.array else "no task, all shards being there, but "
    )
    say(
        f"submitted {array}job {jobs.merge}, which makes the dataset when all have ended well; "
        f"output goes to {jobs.folder}"
    )
    return 0


def _run(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if not 0 <= options.task < options.num_tasks:
        raise UsageError(f"--task {options.task}: must be from 0 to --num-tasks {options.num_tasks} less 1")
    workers = options.workers or len(os.sched_getaffinity(0))
    job = _job(options)
    tasks = plan_tasks(replace(job, limit=None) if job.dry_run else job)
    for item in job.inputs:
        recognised = " (recognised)" if options.format == "auto" else ""
        say(f"{item.path}: format {item.format}{recognised}, template {item.template}")
    mine = [task for task in tasks if task.number % options.num_tasks == options.task]
    if job.dry_run:
        records = [
            sum(task.split.records for task in mine if task.input == number) for number in range(len(job.inputs))
        ]
        if job.limit is not None and job.limit < sum(records):
            mine = sampled(mine, limit=job.limit)
        check_first_images(job, tasks)
        with Workers(workers, tasks=len(mine)) as processes:
            summaries = processes.run(job, mine, count=len(tasks))
        report = dry_run_report(job, mine, summaries, records=records)
        _print_report(report)
        check_balance(report["balance"])
        check_rejected(report, max_bad_frac=options.max_bad_frac, where="dry run")
        return 0
    output = Output(job.output)
    with Workers(workers, tasks=len(mine)) as processes:
        if not (options.resume and output.is_begun):
            check_first_images(job, tasks)
        locks = output.lock(array_task=options.task, array_tasks=options.num_tasks)
        output.begin(job.config, resume=options.resume, alone=options.num_tasks == 1)
        todo = _left(job, mine) if options.resume else mine
        if len(todo) < len(mine):
            say(f"{len(mine) - len(todo)} of {len(mine)} shards are done already")
        try:
            processes.run(job, todo, count=len(tasks))
        except BaseException:
            if options.num_tasks == 1:
                output.remove_leftovers()
            raise
    if left := _left(job, tasks):
        say(f"task {options.task} of {options.num_tasks} is done; {len(left)} of {len(tasks)} shards wait for others")
        return 0
    if not options.finish:
        say(f"task {options.task} of {options.num_tasks} is done, and all shards are there")
        return 0
    with output.alone():
        report = finish(job, tasks, max_bad_frac=options.max_bad_frac)
    _print_report(report)
    say(f"wrote {job.output} in {time.monotonic() - started:.1f} s, fingerprint {report['fingerprint'][:16]}")
    locks.close()
    return 0


def _left(job: Job, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that are not done."""
    output = Output(job.output)
    return [task for task in tasks if not output.is_done(task.number, task.split, config_sha256=job.config_sha256)]


def _job(options: argparse.Namespace) -> Job:
    tokenizer = tokenizer_at(options.tokenizer)
    for root in options.image_root or ():
        if not os.path.isdir(root):
            raise UsageError(f"--image-root {root}: no such folder; give folders that image paths start from")
    columns = dict(options.columns)
    if twice := [name for name, count in Counter(name for name, _ in options.columns).items() if count > 1]:
        raise UsageError(f"--columns: names {twice[0]} twice; give each name one column")
    left_out: Counter[str] = Counter()
    paths = input_files(options.input, left_out=left_out)
    check_columns(paths, columns)
    inputs: list[Input] = []
    for path in paths:
        try:
            inputs.append(open_input(path, format=options.format, template=options.template, columns=columns))
        except NoRecordsError as error:
            if path == paths[-1] and not inputs:
                raise
            say(error)
    for item in inputs:
        first = partial(
            first_with_image,
            item.path,
            container=item.container,
            format=item.only,
            columns=columns,
            ignore=options.ignore,
        )
        if tokenizer.image_id is None and (found := first()):
            raise needs_image_token(options.tokenizer, where=f"{item.path}:{found}")
        if (
            options.image_map is None
            and item.format == "obelics"
            and first(wanted=lambda image: is_address(image.name))
        ):
            raise UsageError(
                "--image-map: format obelics names images by address; fetch them and give a file with lines of "
                "address, tab and path"
            )
    geometry = IMAGE_PRESETS[options.image_preset]
    if any(item.format != "text" for item in inputs) and geometry.tokens >= options.seq_length:
        raise UsageError(
            f"--seq-length {options.seq_length}: cannot hold one image of {geometry.tokens} tokens "
            f"(--image-preset {options.image_preset}); choose a longer sequence or a smaller preset"
        )
    own = {item.name for item in fields(Job)}
    return Job(
        inputs=tuple(inputs),
        files_left_out=tuple(sorted(left_out.items())),
        tokenizer_sha256=tokenizer.sha256,
        packed=options.pack,
        max_images=options.max_images_per_sequence,
        image_root=None if options.image_root is None else tuple(options.image_root),
        image_map_sha256=None if options.image_map is None else open_image_map(options.image_map).sha256,
        fail_on_error=options.on_error == "fail",
        columns=tuple(sorted(columns.items())),
        ignore=tuple(sorted(set(options.ignore))),
        **{name: value for name, value in vars(options).items() if name in own - {"image_root", "columns", "ignore"}},
    )


def _print_report(report: dict[str, Any]) -> None:
    say(
        f"{report['records']} records to {report['samples']} samples: {report['tokens']} tokens, "
        f"{report['images']} images ({report['image_tokens']} image tokens)"
    )
    for kind in ("text", "multimodal"):
        part = report[kind]
        if part["sequences"]:
            images = f", {part['images_per_sequence']:.2f} images each" if part["images_per_sequence"] else ""
            filler = f", {part['filler_tokens']} tokens of text as filler" if part["filler_tokens"] else ""
            say(f"{kind}: {part['sequences']} sequences, {100 * part['fill']:.2f}% full{images}{filler}")
    for line in histogram_lines(report["histograms"]):
        say(line)
    if estimate := report.get("estimate"):
        say(
            f"estimate for all {estimate['records']:,} records: {estimate['samples']:,} samples, "
            f"{estimate['tokens']:,} tokens, {estimate['images']:,} images, about {estimate['sequences']:,} sequences "
            f"{100 * estimate['fill']:.2f}% full"
        )
    for line in balance_lines(report["balance"]):
        say(line)
    if report["images_without_tag"]:
        say(f"{report['images_without_tag']} images without a tag stand first in their records")
    if report["records_with_empty_image"]:
        say(f"{report['records_with_empty_image']} records whose image is null or empty are stored as text")
    if files := report["files_left_out"]:
        say(f"files of the folders that are not read: {counted(files)}")
    if report["rejected"]:
        reasons = ", ".join(f"{reason} {entry['count']}" for reason, entry in report["rejected"].items())
        say(f"rejected: {reasons} (rejects.jsonl names each)")


def _column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if name not in COLUMN_NAMES or not column:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=COLUMN, with NAME one of {', '.join(COLUMN_NAMES)}")
    return name, column


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
