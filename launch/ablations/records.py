"""Notes and logs that the tasks of an ablation leave, read as files that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.ablations.graph import Task
from launch.bench.programs import git
from megavl.checkpoint.directory import candidates
from megavl.checkpoint.manifest import MANIFEST
from megavl.config.errors import DataError
from megavl.foreign.parsing import parse_json, read_json

DONE = "done.json"
"""Is there once a task is done."""
SPENT = "seconds.json"
"""Of all starts of a task until now: seconds, commits of the code, and machines with their runs at a time."""
METRICS, EVALUATION = "metrics.jsonl", "evaluation.jsonl"
_FIELDS = {METRICS: ("step", "modality", "tokens", "step_time_s"), EVALUATION: ("step",)}


def is_done(task: Task, *, cache: Path) -> bool:
    """Whether the folder of a task is complete. A damaged note counts as none, so the task runs again."""
    try:
        read_done(task, cache=cache)
    except DataError:
        return False
    return True


def read_done(task: Task, *, cache: Path) -> dict[str, Any]:
    """What is noted of a finished task: `name`, `seconds`, `commits`, `conditions`, and what `facts` finds.

    Raises:
        DataError: there is no such note, or it is damaged.
    """
    path = cache / task.address / DONE
    found = _read_mapping(path)
    if not isinstance(found.get("seconds"), int | float) or not isinstance(found.get("commits"), list):
        raise DataError(f"{path}: no note of a finished task; start the same command again")
    return found


def read_spent(folder: Path) -> dict[str, Any]:
    """`seconds`, `commits` and `conditions` of earlier starts; nothing where no file says so."""
    try:
        found = _read_mapping(folder / SPENT)
        return {"seconds": float(found["seconds"]), **{key: list(found[key]) for key in ("commits", "conditions")}}
    except (DataError, ValueError, KeyError, TypeError):
        return {"seconds": 0.0, "commits": [], "conditions": []}


def facts(folder: Path) -> dict[str, Any]:
    """What a finished run has used; nothing of other tasks."""
    rows = read_rows(folder / "run" / METRICS)
    if not rows:
        return {}
    return {
        "steps": len(rows),
        "ranks": _ranks(folder / "run/checkpoints"),
        "tokens": sum(row["tokens"] for row in rows),
        "step_seconds": round(sum(row["step_time_s"] for row in rows), 3),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a run's log; none where there is no file.

    Raises:
        DataError: names the line that is not what a run writes there.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.endswith(b"}"):
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(name in row for name in _FIELDS[path.name]):
            raise DataError(
                f"{path}: line {number} is damaged: {line[:100]!r}; remove the folder of this run from the cache, so "
                "that it runs again"
            )
        rows.append(row)
    return rows


def commit() -> str:
    """Commit of the code, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"


def _ranks(checkpoints: Path) -> int:
    """Ranks that wrote the newest checkpoint."""
    newest = candidates(checkpoints)[0]
    return int(json.loads((newest / MANIFEST).read_text(encoding="utf-8"))["world_size"])


def _read_mapping(path: Path) -> dict[str, Any]:
    """A mapping that this program wrote as JSON; DataError if it is not there, or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON mapping")
    return found
