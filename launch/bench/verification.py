"""The verification card: what of each model was verified, by which command, at which commit, and with which result.

Runs the command of every cell that this machine can run, and writes `launch/bench/results/verification_<YYYYMM>.md`. A
JSON file beside it keeps the result of each cell, also of those that are not run this time.

    python -m launch.bench.verification                       # cells without a success at this commit
    python -m launch.bench.verification tiny 7b/init          # these, whatever is kept
    python -m launch.bench.verification --write               # none; the card is written anew from what is kept

A cell is `verified` where its command ended with 0 and printed its result. Nothing else makes it so.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launch.bench.programs import ROOT, environment, git, python
from launch.bench.report import RESULTS, machine, report_path, table, table_row, write_report

MODELS = {"tiny": "tiny hybrid, the 7B's topology", "1b": "1.3B", "7b": "7B"}
ITEMS = ("init", "plan", "three stages", "layouts", "resume", "export", "clients", "evaluation", "GPU")
COLUMNS = ("item", "what", "status", "result", "commit, date, seconds", "command")
CLIENT = ROOT / ".venv-clients"
LIMIT_S = 5400
_CHANGED = " to "
"""Between two commits: the files changed while the command ran."""
PASSED = r"\d+ passed(?:, \d+ skipped)?"
"""What pytest counts of the tests that were meant."""
VERSIONS = "from launch.bench.report import versions; print(versions('torch', 'megatron-core', 'transformers'))"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One item of one model."""

    what: str
    """What the command verifies, in a few words."""
    command: tuple[str, ...] = ()
    """Empty where there is nothing that could be run."""
    result: str = PASSED
    """Pattern of the measured lines in its output."""
    missing: Callable[[], str] = lambda: ""
    """Why it cannot run here; empty where it can."""
    report: str = ""
    """Pattern of the report that the command writes; the newest one stands for a run that is not kept."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """How a cell's command ended."""

    command: str
    commit: str
    date: str
    seconds: int
    code: int
    result: str
    machine: str
    """Cores, processor, versions."""

    @property
    def verified(self) -> bool:
        """Whether it ended well and said what it measured, of one state of the files."""
        return self.code == 0 and bool(self.result) and _CHANGED not in self.commit


@functools.cache
def no_gpu() -> str:
    """Why CUDA cannot run here; empty where it can."""
    if not shutil.which("nvidia-smi"):
        return "no GPU here"
    ask = [python(), "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    found = subprocess.run(ask, env=environment(gpu=True), capture_output=True, check=False).returncode == 0
    return "" if found else "torch sees no GPU here"


def _no_client() -> str:
    """The released client has an environment of its own."""
    there = (CLIENT / "released/bin/python").is_file() and any(CLIENT.glob("xinference-*.whl"))
    return "" if there else "the released client is not installed; `make test-clients` does that"


def _no_space(gigabytes: int) -> Callable[[], str]:
    def missing() -> str:
        runs = (ROOT / "runs").resolve()
        there = next(folder for folder in (runs, *runs.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free / 1e9
        return "" if free > gigabytes else f"needs {gigabytes} GB of free disk"

    return missing


def _pytest(*words: str) -> tuple[str, ...]:
    return ("python", "-m", "pytest", "-q", *words)


def _demo(what: str, result: str) -> Cell:
    return Cell(what=what, command=("python", "launch/demo.py", "--out", "runs/verification"), result=result)


def _full_size(name: str, *, devices: int, gigabytes: int) -> dict[str, Cell]:
    """Cells of a model whose steps need GPUs."""
    needs = f"a step needs about {devices} GPUs"
    return {
        "init": Cell(
            what="every tensor's name and shape as released, and the published counts, on the meta device",
            command=_pytest(
                "tests/unit/convert/test_released_tensors.py", "tests/contract/test_recipes_build.py", "-k", name
            ),
        ),
        "plan": Cell(
            what="memory, layers and time of stage 2 as shipped",
            command=("python", "-m", "megavl", "plan", f"launch/recipes/{name}/stage2.yaml"),
            result=r"\d+ x \S+: tensor .*",
        ),
        "three stages": Cell(what="training at full size", missing=lambda: needs),
        "layouts": Cell(what="losses of several layouts at full size", missing=lambda: needs),
        "resume": Cell(what="a run at full size, killed and resumed", missing=lambda: needs),
        "export": Cell(
            what="both Hugging Face formats there and back at full size, random weights, byte for byte",
            command=("python", "-m", "launch.bench.convert_full", "--preset", name, "--scratch", "runs"),
            result=r"Every tensor came back .*",
            missing=_no_space(gigabytes),
            report=f"convert_{name}_*.md",
        ),
        "clients": Cell(
            what="the released client on an export with towers of full size and a small decoder",
            command=(
                *("env", f"MEGAVL_RELEASED_CLIENT={CLIENT.name}/xinference-0.14.4-py3-none-any.whl"),
                *(f"{CLIENT.name}/released/bin/python", "-m", "pytest", "-q"),
                *("tests/numerics/test_released_client.py", "-k", name),
            ),
            missing=_no_client,
        ),
        "evaluation": Cell(what="public benchmarks", missing=lambda: "needs trained weights of this size"),
        "GPU": Cell(
            what="training steps on one GPU, of as many layers as it holds",
            command=("python", "-m", "launch.bench.step", "--case", f"{name} whole megavl"),
            result=rf"{name} whole: MegaVL \| \w+ \| \d.*\d",
            missing=no_gpu,
        ),
    }


CELLS: dict[str, dict[str, Cell]] = {
    "tiny": {
        "init": Cell(
            what="start weights of a LLaMA folder, SigLIP and SAM compute what their sources compute",
            command=_pytest("tests/unit/convert/test_start_weights.py"),
        ),
        "plan": Cell(
            what="memory, layers and time of stage 2 as shipped",
            command=("python", "-m", "megavl", "plan", "launch/recipes/tiny/stage2.yaml", "--device", "cpu"),
            result=r"\d+ x \S+: tensor .*",
        ),
        "three stages": _demo("stages 1 to 3 on a corpus of its own", r"stage\d .*loss .*"),
        "layouts": Cell(
            what="loss and every gradient of 44 runs against one rank; resumes under other layouts",
            command=_pytest("tests/distributed/test_layouts.py"),
        ),
        "resume": _demo("stage 2, killed with -9 and started again", r"resume +after kill -9: bitwise .*"),
        "export": _demo("both Hugging Face formats; logits of transformers", r"parity +logits .*"),
        "clients": Cell(
            what="transformers on the native format and on the decoder alone: intermediates, logits, greedy tokens",
            command=_pytest(
                *("tests/numerics/test_native_parity.py", "tests/numerics/test_generate_parity.py"),
                "tests/unit/convert/test_llm.py",
            ),
        ),
        "evaluation": _demo("questions about held-out images, with and without the image", r"questions +\d+ .*"),
        "GPU": Cell(what="CUDA against the CPU", command=_pytest("tests/numerics/test_cuda.py"), missing=no_gpu),
    },
    "1b": _full_size("1b", devices=8, gigabytes=12),
    "7b": _full_size("7b", devices=64, gigabytes=34),
}


def main(argv: list[str] | None = None) -> int:
    """Run cells and write the card; 1 if a command failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="MODEL[/ITEM]", help="cells to run, whatever is kept of them")
    parser.add_argument("--write", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    try:
        named = [name for text in arguments.cells for name in cells_of(text)]
    except ValueError as error:
        parser.error(str(error))
    card = report_path("verification", where="", folder=RESULTS)
    store = card.with_suffix(".json")
    records = read_records(max(RESULTS.glob("verification_*.json"), default=store))
    commit = commit_here()
    failed = 0
    for name in named:
        if not cell(name).command or cell(name).missing():
            print(f"{name}: not run, {cell(name).missing()}", flush=True)
    # The demo answers several cells, so each command runs once.
    for command, names in [] if arguments.write else wanted(named, records, commit=commit).items():
        print(f"{', '.join(names)}: {shlex.join(command)}", flush=True)
        for name, record in run(command, names).items():
            records[name] = record
            failed += not record.verified
            print(f"  {name}: {status(name, record)}, {record.result}", flush=True)
        store.write_text(json.dumps({name: asdict(records[name]) for name in sorted(records)}, indent=1) + "\n")
    write_report(card, report(records))
    return int(failed > 0)


def cells_of(text: str) -> list[str]:
    """Names of the cells that `MODEL` or `MODEL/ITEM` means.

    Raises:
        ValueError: there is no such cell.
    """
    found = [name for name in names_of_cells() if text in (name, name.partition("/")[0])]
    if not found:
        raise ValueError(f"{text}: no such cell; choose from {', '.join((*MODELS, *names_of_cells()))}")
    return found


def names_of_cells() -> list[str]:
    """All cells, in the order of the card."""
    return [f"{model}/{item}" for model in MODELS for item in ITEMS]


def cell(name: str) -> Cell:
    """The cell of a name."""
    model, _, item = name.partition("/")
    return CELLS[model][item]


def wanted(named: list[str], records: Mapping[str, Record], *, commit: str) -> dict[tuple[str, ...], list[str]]:
    """Commands to run, with the cells that they answer: the named ones, or else those without a success at `commit`."""
    commands: dict[tuple[str, ...], list[str]] = {}
    for name in named or names_of_cells():
        kept = records.get(name)
        command = cell(name).command
        # Files that are in no commit may have changed again.
        current = kept is not None and kept.verified and kept.commit == commit and re.fullmatch("[0-9a-f]+", commit)
        if command and not cell(name).missing() and (named or not current):
            commands.setdefault(command, []).append(name)
    return commands


def run(command: tuple[str, ...], names: Iterable[str]) -> dict[str, Record]:
    """Run one command and read the result of each cell from what it prints."""
    words = [python() if word == "python" else word for word in command]
    before, began = commit_here(), time.monotonic()
    code, said = _ended(words)
    after, seconds = commit_here(), round(time.monotonic() - began)
    # A client has an environment of its own.
    installed = _ended([next(word for word in words if word.endswith("/python")), "-c", VERSIONS])[1].strip()
    shared = {
        "command": shlex.join(command),
        "commit": before if before == after else f"{before}{_CHANGED}{after}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "code": code,
        "machine": f"{machine()}, {installed}",
    }
    return {name: Record(**shared, result=measured(said, cell(name).result)) for name in names}


def _ended(words: list[str]) -> tuple[int, str]:
    """Exit code and output of a command; 124 after the time limit. Nothing that it started stays."""
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(gpu=not no_gpu()),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said = process.communicate(timeout=LIMIT_S)[0]
        except subprocess.TimeoutExpired:
            return 124, ""
        finally:
            _end_family(process.pid)
    return process.returncode, said


def _end_family(pid: int) -> None:
    """Kill a process with its group and its descendants, which may have sessions of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def measured(said: str, pattern: str) -> str:
    """Those parts of an output's lines that a pattern finds, blanks made single."""
    found = (re.search(pattern, line) for line in said.splitlines())
    return "; ".join(" ".join(match[0].split()) for match in found if match)


def read_records(store: Path) -> dict[str, Record]:
    """Kept results of the cells that still exist and have the same command."""
    if not store.is_file():
        return {}
    kept = {name: Record(**found) for name, found in json.loads(store.read_text(encoding="utf-8")).items()}
    return {
        name: kept[name]
        for name in names_of_cells()
        if name in kept and kept[name].command == shlex.join(cell(name).command)
    }


def commit_here() -> str:
    """The commit of this checkout, marked if files other than results have changed since."""
    head = git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    # The first line names the branch, so a git that fails says less than one that finds nothing.
    said = git("status", "--porcelain", "--branch", "--", ".", ":!launch/bench/results").splitlines()
    return head + ("" if len(said) == 1 else "+changes")


def status(name: str, record: Record | None) -> str:
    """A word for the card."""
    if record is not None:
        return "verified" if record.verified else "failed"
    return "reported" if earlier(name) else "not run"


def earlier(name: str) -> tuple[str, ...]:
    """Result and commit of a cell's report, or nothing."""
    pattern = cell(name).report
    for path in sorted(RESULTS.glob(pattern), reverse=True) if pattern else ():
        text = path.read_text(encoding="utf-8")
        found, result = re.search(cell(name).result, text), measured(text, cell(name).result)
        if found and result:
            brought = git("log", "-1", f"-S{found[0]}", "--format=%h, %cs", "--", str(path))
            return f"{result} ([report]({path.name}))", brought
    return ()


def report(records: Mapping[str, Record]) -> list[str]:
    """The lines of the card."""
    overview = [
        table_row(item, *(status(name, records.get(name)) for name in (f"{model}/{item}" for model in MODELS)))
        for item in ITEMS
    ]
    lines = [
        "# Verification card",
        "",
        "What of each model was verified, and how. `verified`: the command ended with 0 and printed the result. "
        "`reported`: an earlier run's report says so, at the commit that brought it. `failed`: the command ended "
        "otherwise, or the files changed meanwhile. `not run`: nothing is known. This file is written by",
        "",
        "    python -m launch.bench.verification",
        *table(f"| item | {' | '.join(MODELS.values())} |", overview),
    ]
    for model, title in MODELS.items():
        rows = [_row(f"{model}/{item}", records.get(f"{model}/{item}")) for item in ITEMS]
        lines += ["", f"## {title}", *table(table_row(*COLUMNS), rows)]
    machines: dict[str, list[str]] = {}
    for name, record in records.items():
        machines.setdefault(record.machine, []).append(name)
    # The first line is of most cells, and the others name theirs.
    for text, names in sorted(machines.items(), key=lambda item: -len(item[1])):
        lines += ["", f"Run on {text}." if lines[-1].startswith("|") else f"On {text}: {', '.join(names)}."]
    return lines


def _row(name: str, record: Record | None) -> str:
    item, what = name.partition("/")[2], cell(name).what
    if record is None:
        command = f"`{shlex.join(cell(name).command)}`" if cell(name).command else ""
        result, commit = earlier(name) or (cell(name).missing() or "not run yet", "")
        return table_row(item, what, status(name, None), result, commit, command)
    result = record.result if record.verified else ": ".join(filter(None, (f"ended with {record.code}", record.result)))
    when = f"{record.commit}, {record.date}, {record.seconds}"
    return table_row(item, what, status(name, record), result.replace("|", "\\|"), when, f"`{record.command}`")


if __name__ == "__main__":
    sys.exit(main())
