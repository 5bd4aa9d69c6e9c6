"""`tracker_NAME.json` of a run directory: which run of a service goes on there, and what the service must remember."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.files.durable import replace_durably
from megavl.train.growing_file import free_for_file


class TrackerNotes:
    """What stands in the file. Damaged content counts as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = _read(path)

    @property
    def identifier(self) -> str:
        """Id of the service's run; empty if there is none."""
        return str(self._found.get("id", ""))

    @property
    def recipe(self) -> object:
        """Digest of what determines the rows."""
        return self._found.get("recipe")

    def copied_from(self) -> Path | None:
        """The directory of which this one is a copy; None if it is no copy, or the other has gone or another run."""
        noted = self._found.get("dir")
        if not isinstance(noted, str) or noted == self._here():
            return None
        other = Path(noted) / self.path.name
        with contextlib.suppress(OSError, ValueError):
            # One directory may be mounted in two places.
            if _read(other).get("id") == self.identifier and not other.samefile(self.path):
                return Path(noted)
        return None

    def begin(self, *, identifier: str, recipe: str) -> None:
        """Note the run of this start. Another run than before begins without memories.

        Raises:
            OSError: the file cannot be written.
        """
        kept = self._found if identifier == self.identifier else {}
        self._found = {**kept, "id": identifier, "recipe": recipe, "dir": self._here()}
        self._write()

    def memory(self, name: str) -> Mapping[str, Any]:
        """What was remembered under a name; empty if nothing was."""
        found = self._found.get(name)
        return found if isinstance(found, dict) else {}

    def remember(self, name: str, value: Mapping[str, Any]) -> None:
        """Remember values for later starts.

        Raises:
            OSError: the file cannot be written.
        """
        self._found[name] = value
        self._write()

    def _here(self) -> str:
        return str(self.path.parent.resolve())

    def _write(self) -> None:
        free_for_file(self.path)
        replace_durably(self.path, json.dumps(self._found).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if re.fullmatch("[0-9a-f]{32}", found["id"]) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
