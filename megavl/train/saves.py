"""The saves of a run: what each of them waits for, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megavl.config.errors import StorageError
from megavl.parallel import groups
from megavl.train.progress import Progress
from megavl.train.run_plan import RunPlan
from megavl.train.state import RunState
from megavl.train.supervise.exit_status import ExitStatus


class Saves:
    """Saves between steps. Every method is collective.

    With `checkpoint.async_save`, a save is written while training goes on, and committed after the first step at whose
    end all ranks have written their part, or within an evaluation. A save before the run ends waits, and so does one
    that finds another under way.
    """

    def __init__(self, plan: RunPlan, state: RunState, *, status: ExitStatus) -> None:
        """Prepare.

        Args:
            status: told the section; its claim on the directory is confirmed before anything is written or committed.
        """
        self._plan, self._state, self._status = plan, state, status
        self._failed = 0

    def save(self, progress: Progress, *, must: bool) -> None:
        """Save, or begin to.

        Args:
            must: the run ends after this save, so it waits, and a failure ends the run at once.

        Raises:
            StorageError: the storage failed twice in a row, or once where the run must save.
        """
        self.finish()
        self._enter()
        if self._plan.recipe.checkpoint.async_save and not must:
            self._survive(lambda: self._state.begin_save(progress), must=must)
        else:
            self._survive(lambda: self._state.save(progress), must=must)

    def finish_if_written(self) -> None:
        """Commit the save under way if all ranks have written their part; after every step, and within evaluations.

        Raises:
            StorageError: as `save`.
        """
        store = self._state.store
        if store.begun is not None and not groups.on_any_rank(not store.is_written()):
            section = self._status.section
            self.finish()
            self._status.section = section

    def finish(self) -> None:
        """Wait for the save under way, if there is one, and commit it.

        Raises:
            StorageError: as `save`.
        """
        if self._state.store.begun is not None:
            self._enter()
            self._survive(self._state.store.finish, must=False)

    def _enter(self) -> None:
        self._status.section = "saving"
        self._status.claim.confirm()

    def _survive(self, action: Callable[[], Path | None], *, must: bool) -> None:
        """A failing storage is survived once in a row unless this save is the run's last chance."""
        try:
            path = action()
        except StorageError as error:
            self._failed += 1
            if must or self._failed > 1:
                raise
            self._plan.say(f"warning: {error}; training goes on without this checkpoint")
            return
        if path is not None:
            self._failed = 0
            self._plan.say(f"saved {path}")
