"""Training runs whose ranks note every process group that they make, and when they step, save and end.

torchrun runs this module in place of `megavl`; each rank appends a word to its file for each of these.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_run import environment, run_training

FOLDER = "NOTED_GROUPS"
"""Environment variable: the folder of the ranks' files."""


def run_noted(dataset: Path, run: Path, *overrides: str, processes: int) -> subprocess.CompletedProcess[str]:
    """`run_training` with notes."""
    notes = _notes_of(run)
    notes.mkdir()
    env = {**environment(), FOLDER: str(notes)}
    return run_training(dataset, run, *overrides, processes=processes, env=env, module="tests.noted_groups")


def check_groups_made_once(run: Path, *, processes: int) -> None:
    """All process groups of a noted run were made before its first step, the same number on every rank."""
    words = [(_notes_of(run) / str(rank)).read_text().split() for rank in range(processes)]
    numbers = {found.index("step") for found in words}
    assert len(numbers) == 1 and min(numbers) > 1, numbers
    for found in words:
        assert found[: min(numbers)] == ["group"] * min(numbers)
        assert "group" not in found[min(numbers) :] and "save" in found and found[-1] == "end", found


def _notes_of(run: Path) -> Path:
    return run.with_name(f"{run.name} groups")


def _note(owner: Any, name: str, word: str) -> None:
    called: Callable[..., Any] = getattr(owner, name)
    notes = Path(os.environ[FOLDER]) / os.environ["RANK"]

    @functools.wraps(called)
    def noted(*arguments: Any, **named: Any) -> Any:
        with notes.open("a") as out:
            out.write(f"{word}\n")
        return called(*arguments, **named)

    setattr(owner, name, noted)


def main() -> int:
    """Run the command that was given, with notes."""
    from torch.distributed import distributed_c10d

    from megavl.main import cli
    from megavl.parallel import groups
    from megavl.train import saves, stage_steps

    # The group of the world is made here, and each of `new_group`.
    _note(distributed_c10d, "_new_process_group_helper", "group")
    _note(stage_steps, "train_step", "step")
    _note(saves.Saves, "save", "save")
    _note(groups, "stop", "end")
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
