"""Runs the programs that the benchmarks measure, each in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
"""One thread a process. Without a GPU nothing is compiled, and importing torch's compiler takes seconds."""


def environment(*, gpu: bool = False) -> dict[str, str]:
    """Variables of a program that finds this repository's modules; `gpu` leaves devices and threads as they are."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), **({} if gpu else CPU)}


def python() -> str:
    """The interpreter of the programs; `PYTHON_EXEC` replaces this one, as it does for torchrun's ranks."""
    return os.environ.get("PYTHON_EXEC", sys.executable)


def run(module: str, *words: object, gpu: bool = False, limit: float | None = None) -> tuple[str, str]:
    """Run `python -m module words`.

    Args:
        gpu: leave CUDA and the compiler to the program.
        limit: seconds after which it is ended.

    Returns:
        Standard output, and why it failed; empty where it ended well.
    """
    command = [python(), "-W", "ignore", "-m", module, *map(str, words)]
    variables = environment(gpu=gpu)
    if {"--compile", "--compiled"} & set(map(str, words)):
        variables.pop("TORCHDYNAMO_DISABLE", None)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        try:
            done = subprocess.run(command, cwd=ROOT, env=variables, stdout=out, stderr=errors, timeout=limit)
            failure = f"code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"not done after {limit:.0f} s"
        out.seek(0)
        errors.seek(0)
        if failure.startswith("code"):
            said = errors.read().splitlines()
            named = [line for line in said if re.match(r"\S*(Error|Exception|error)\b", line)]
            failure = " ".join((named or said or [failure])[-1].split())[:300]
        return out.read(), failure


def output(module: str, *words: object, gpu: bool = False, limit: float | None = None) -> str:
    """Standard output of a program that must end well; arguments as of `run`."""
    text, failure = run(module, *words, gpu=gpu, limit=limit)
    if failure:
        raise SystemExit(f"error: {module}: {failure}")
    return text


def ask(module: str, *words: object, gpu: bool = False, limit: float | None = None) -> list[dict[str, Any]]:
    """The JSON lines of a program that must end well; arguments as of `run`."""
    return json_lines(output(module, *words, gpu=gpu, limit=limit))


def json_lines(text: str) -> list[dict[str, Any]]:
    """Those lines of a text that are JSON objects."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def ask_plan(recipe: str, *words: object) -> dict[str, Any]:
    """What `megavl plan RECIPE ... --json` says."""
    found: dict[str, Any] = json.loads(output("megavl", "plan", recipe, *words, "--json"))
    return found


def git(*words: str) -> str:
    """Output of git on this repository, without blanks around it; empty without git or a checkout."""
    command = ["git", "-c", "safe.directory=*", *words]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def launcher(module: str, *, processes: int) -> list[str]:
    """Command that starts a module on a number of ranks."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return [python(), "-W", "ignore", *ranks, "-m", module]
