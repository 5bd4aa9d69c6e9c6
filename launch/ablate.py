"""Runs ablations of the paper at small scale and judges their claims.

    python launch/ablate.py launch/ablations/NAME.yaml [--smoke]

Every cell of the ablation, an arm with a seed, is a chain of `megavl train` runs. All state is in files: killed at any
moment and started again, the same command goes on. It writes a page, JSON with every value, and a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.ablations.definition import Ablation, read_ablation  # noqa: E402
from launch.ablations.figures import draw, require_matplotlib  # noqa: E402
from launch.ablations.graph import Graph, Task, build_graph  # noqa: E402
from launch.ablations.records import is_done  # noqa: E402
from launch.ablations.results import cost_of, page, read_results  # noqa: E402
from launch.ablations.runner import Runner, Stopped, TaskFailed  # noqa: E402
from launch.ablations.simulations import check_simulations, simulate  # noqa: E402
from launch.ablations.slurm import require_queued, submit  # noqa: E402
from megavl.config.errors import EXIT_INTERRUPTED, DataError, MegaVLError, UsageError  # noqa: E402
from megavl.files.durable import replace_durably, storage_errors  # noqa: E402
from megavl.foreign.printing import VisibleParser, say, say_error  # noqa: E402

SIZE, SMOKE = "tiny", "smoke"
CACHE = "runs/ablations/cache"


@dataclass(frozen=True, kw_only=True)
class Work:
    """An ablation file at one size, and where its files go."""

    path: Path
    ablation: Ablation
    graph: Graph
    size: str
    cache: Path
    out: Path

    @property
    def name(self) -> str:
        """Of the files of the report."""
        return self.path.stem


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        return _run(_parser().parse_args(arguments))
    except (TaskFailed, Stopped) as error:
        say_error(error)
        return error.code
    except MegaVLError as error:
        say_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = VisibleParser(prog="ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="launch/ablations/NAME.yaml; several share runs"
    )
    parser.add_argument("--size", help=f"one of the file's sizes ({SIZE})")
    parser.add_argument("--smoke", action="store_true", help=f"the same as --size {SMOKE}: every run takes two steps")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="number of seeds (the file's)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time (one for each core)")
    parser.add_argument("--out", type=Path, help="folder of page, JSON and figure (runs/ablations/SIZE)")
    parser.add_argument("--cache", type=Path, default=ROOT / CACHE, help=f"folder of all runs ({CACHE})")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--list", action="store_true", help="print the tasks with their numbers and folders, and stop")
    modes.add_argument("--slurm", action="store_true", help="queue the tasks as SLURM job arrays, and stop")
    parser.add_argument("--sbatch", default="", metavar="OPTIONS", help="further options of sbatch for all jobs")
    modes.add_argument("--cell", type=int, metavar="N", help="run task N of --list alone, with what it needs")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    if options.smoke and options.size not in (None, SMOKE):
        raise UsageError(f"--smoke: is a size of its own; leave --size {options.size} out")
    require_matplotlib()
    files = [path.absolute() for path in options.files]
    options.cache, options.out = options.cache.absolute(), options.out and options.out.absolute()
    # Recipes and data have paths from here, as in every run.
    os.chdir(ROOT)
    size = SMOKE if options.smoke else options.size or SIZE
    works = [_work(path, options, size=size) for path in files]
    if len({work.name for work in works}) < len(works):
        raise UsageError("FILE: two files have the same name, by which results are named; name each once")
    # Runs of several files are one queue, so that all cores are busy to the end.
    found = {task.address: task for work in works for task in work.graph.tasks}
    tasks = sorted(found.values(), key=lambda task: task.level)
    if options.list:
        say(*(f"{number} {task.address} {task.name}" for number, task in enumerate(tasks)))
        return 0
    if options.slurm:
        _submit(works, tasks, options)
        return 0
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))
    if options.cell is not None:
        if not 0 <= options.cell < len(tasks):
            raise UsageError(f"--cell {options.cell}: the tasks have the numbers 0 to {len(tasks) - 1}; see --list")
        require_queued(tasks[options.cell], cache=options.cache)
        _runner(works, tasks[options.cell].with_inputs(), options=options, signals=signals).run()
        return 0
    failure: TaskFailed | MegaVLError | None = None
    try:
        _runner(works, tasks, options=options, signals=signals).run()
    except TaskFailed as error:
        failure = error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    # A failure in one ablation leaves the reports of the others alone.
    for work in works:
        if all(is_done(task, cache=work.cache) for task in work.graph.tasks):
            try:
                _report(work, seeds=options.seeds)
            except MegaVLError as error:
                failure = failure or _in_file(work.path, error)
    if failure is not None:
        raise failure
    return 0


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped.by(number)


def _in_file(path: Path, error: MegaVLError) -> MegaVLError:
    """The error with the file that it is about, because one command may have several."""
    text = str(error)
    return error if text.startswith(f"{path}: ") else type(error)(f"{path}: {text}")


def _work(path: Path, options: argparse.Namespace, *, size: str) -> Work:
    ablation = read_ablation(path)
    try:
        check_simulations(ablation)
        graph = build_graph(ablation, size=size, seeds=options.seeds)
    except (UsageError, DataError) as error:
        raise _in_file(path, error) from None
    out = options.out or ROOT / "runs/ablations" / size
    return Work(path=path, ablation=ablation, graph=graph, size=size, cache=options.cache, out=out)


def _title(works: Sequence[Work]) -> str:
    return works[0].name if len(works) == 1 else "ablations"


def _runner(works: Sequence[Work], tasks: Sequence[Task], *, options: argparse.Namespace, signals: list[int]) -> Runner:
    work = works[0]
    launchers = {one.ablation.sizes[one.size].launcher for one in works}
    if len(launchers) > 1:
        raise UsageError(f"--size {work.size}: has another launcher in some files; run these by a command of their own")
    launcher = launchers.pop()
    if launcher is not None and shutil.which("sbatch") and "SLURM_JOB_ID" not in os.environ:
        raise UsageError(f"--size {work.size}: its launch scripts would queue jobs of their own here; add --slurm")
    jobs = options.jobs or (1 if launcher else len(os.sched_getaffinity(0)))
    with storage_errors(f"--cache {work.cache}"):
        work.cache.mkdir(parents=True, exist_ok=True)
    return Runner(tasks=tasks, cache=work.cache, jobs=jobs, launcher=launcher, title=_title(works), signals=signals)


def _submit(works: Sequence[Work], tasks: Sequence[Task], options: argparse.Namespace) -> None:
    work, name = works[0], _title(works)
    words = ["launch/ablate.py", *(str(one.path) for one in works), "--size", work.size, "--cache", str(work.cache)]
    words += ["--out", str(work.out), *_seeds(options.seeds)]
    done = [is_done(task, cache=work.cache) for task in tasks]
    jobs = submit(tasks, done, command=words, name=name, cache=work.cache, extra=options.sbatch)
    pages = ", ".join(f"{one.out}/{one.name}.md" for one in works)
    say(f"{name}: {done.count(False)} tasks in the jobs {', '.join(jobs)}; the last one writes {pages}")


def _seeds(count: int | None) -> list[str]:
    return [] if count is None else ["--seeds", str(count)]


def _report(work: Work, *, seeds: int | None) -> None:
    """Write JSON, figure and page; the page is last, so that where it is, all are."""
    found = read_results(work.ablation, work.graph, size=work.size, cache=work.cache)
    # What was trained is reported where the planner fails, too.
    simulations: Mapping[str, float] = {}
    failure: MegaVLError | None = None
    try:
        simulations = simulate(work.ablation, cache=work.cache)
    except MegaVLError as error:
        failure = error
    words = ["launch/ablate.py", os.path.relpath(work.path, ROOT), "--size", work.size, *_seeds(seeds)]
    command = f"python {shlex.join(words)}"
    lines = page(
        found, name=work.name, command=command, cost=cost_of(work.graph, cache=work.cache), simulations=simulations
    )
    content = {
        "json": json.dumps(found.to_dict(simulations=simulations), indent=1) + "\n",
        "svg": draw(found).decode(),
        "md": "\n".join(lines) + "\n",
    }
    with storage_errors(f"--out {work.out}"):
        work.out.mkdir(parents=True, exist_ok=True)
        for ending, text in content.items():
            replace_durably(work.out / f"{work.name}.{ending}", text.encode())
    for row in (*found.claims(), *found.speeds()):
        say(f"{work.name}: {row['text']}: {row['verdict']}")
    say(f"{work.name}: {work.out / work.name}.md")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    sys.exit(main())
