"""A run's claim on its directories: rank 0 owns both, and every rank knows whether they are still this run's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from megavl.config.errors import MegaVLError, UsageError
from megavl.config.recipe import Recipe
from megavl.files.owner import Owner
from megavl.files.ownership import Ownership, current_owner, take
from megavl.files.process import Process

T = TypeVar("T")

_LEAVING_S = 5.0
"""Added to `parallel.timeout_s`, within which the ranks of a killed launcher leave, seconds."""


class RunClaim:
    """Ownership of `run.dir` and `checkpoint.dir`; they may be the same directory."""

    def __init__(self, run_dir: str | Path, *, launcher: Process | None = None) -> None:
        """Claim nothing yet.

        Args:
            launcher: this rank's torchrun.
        """
        self._run_dir, self._launcher = Path(run_dir), launcher
        self._held: list[Ownership] = []
        self._token: str | None = None
        self.refusal: MegaVLError | None = None
        """Why rank 0 did not get the directories; known to the others after `agree`."""

    def take(self, recipe: Recipe, *, on_lost: Callable[[UsageError], None]) -> None:
        """Take both directories, or keep the reason for `agree`; rank 0 alone does this.

        Args:
            on_lost: called from a thread if another run takes over, because this process stood still.
        """
        owner, patience_s = Owner.this_process(launcher=self._launcher), recipe.parallel.timeout_s + _LEAVING_S
        wanted = {"run.dir": self._run_dir, "checkpoint.dir": Path(recipe.checkpoint_dir)}
        try:
            for name, directory in wanted.items():
                if self._held and _is_same(directory, self._run_dir):
                    continue
                self._held.append(take(directory, owner, name=name, patience_s=patience_s, on_lost=on_lost))
        except MegaVLError as error:
            self.refusal = error
            self.release()
            return
        self._token = owner.token

    def agree(self) -> None:
        """Tell all ranks whether rank 0 got the directories. Collective.

        Raises:
            UsageError: another run has them; on every rank.
            StorageError: they cannot be written; on every rank.
        """
        try:
            self._token = _on_rank_zero(self._result)
        except MegaVLError as error:
            self.refusal = error
            raise

    def confirm(self) -> None:
        """Check that the directories are still this run's. Collective.

        Raises:
            UsageError: another run took over while rank 0 stood still; on every rank.
        """
        _on_rank_zero(self._confirm_held)

    def permits_status(self) -> bool:
        """Whether the run directory is this run's, or nobody's.

        A rank that was not told yet may not write into an owned directory, unless both have the same launcher.
        """
        owner = current_owner(self._run_dir)
        if owner is None or owner.token == self._token:
            return True
        if self._token is not None or self.refusal is not None:
            return False
        return owner.process.is_alive() is False or (self._launcher is not None and owner.launcher == self._launcher)

    def release(self) -> None:
        """Give up what this process owns."""
        while self._held:
            self._held.pop().release()

    def _confirm_held(self) -> None:
        for held in self._held:
            held.confirm()

    def _result(self) -> str:
        if self.refusal is not None:
            raise self.refusal
        assert self._token is not None, "rank 0 takes the directories first"
        return self._token


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def _on_rank_zero(action: Callable[[], T]) -> T:
    # It imports torch, without which the end of a run is recorded if the recipe is wrong.
    from megavl.checkpoint import collective_errors

    return collective_errors.on_rank_zero(action)
