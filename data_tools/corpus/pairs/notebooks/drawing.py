"""Figures drawn again from a notebook's code, in a sandbox; the answer is foreign data like any other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus.pairs.fonts import SYSTEM_FOLDERS, find_faces, is_stand_in, writes_chinese
from data_tools.corpus.pairs.notebooks import chart_worker
from data_tools.corpus.pairs.notebooks.figures import Notebook
from data_tools.corpus.pairs.sandbox import INSIDE, PYTHON, Limits, isolation_problem, run_limited
from megavl.config.errors import UsageError

LIMITS = Limits(
    seconds=60,
    cpu_seconds=30,
    memory=3 << 30,
    file_size=32 << 20,
    output=64 << 20,
    # The one that is running: it may start no other, within the sandbox or without.
    processes=1,
)
"""Of all cells of one notebook."""
_PREPARATION = Limits(seconds=120, cpu_seconds=60, memory=4 << 30, file_size=32 << 20, output=1 << 16)
_FAULTS = {"errors": "cell_error", "no_glyph": "no_glyph"}
"""Word under which an answer's faults are counted."""
_CODE, _CACHE = "/megavl-chart-worker.py", "/megavl-fontcache"


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Where figures are drawn."""

    isolated: bool
    fontcache: Path
    """matplotlib's list of fonts, made once: each process would otherwise look through all fonts again."""
    dpi: int
    fonts: list[str]
    """Families for what the font of a figure lacks: the Chinese ones of this machine."""

    def draw(self, notebook: Notebook) -> tuple[dict[int, list[bytes]], dict[str, str]]:
        """Figures by cell number, and what went wrong: by `cell_error`, `no_glyph` or `not_run`."""
        cells = [{"number": cell.number, "code": cell.code} for cell in notebook.cells]
        cache = _CACHE if self.isolated else str(self.fontcache)
        request = json.dumps({"cells": cells, "dpi": self.dpi, "fontcache": cache, "fonts": self.fonts}).encode()
        with tempfile.TemporaryDirectory(prefix="megavl-charts-") as folder:
            outcome = run_limited(
                [PYTHON, "-I", _CODE if self.isolated else chart_worker.__file__],
                request=request,
                limits=LIMITS,
                folder=Path(folder),
                isolated=self.isolated,
                files={_CODE: Path(chart_worker.__file__), _CACHE: self.fontcache},
                environment={"MPLBACKEND": "Agg", "MPLCONFIGDIR": f"{INSIDE if self.isolated else folder}/matplotlib"},
            )
        figures, errors = parse_answer(outcome.output)
        if not outcome.good:
            how = {"time": "its time", "output": "its output"}.get(outcome.ended, f"code {outcome.code}")
            errors["not_run"] = f"ended by {how} {outcome.message.strip()[-200:]}"
        return figures, errors


@contextmanager
def open_studio(*, isolated: bool, dpi: int) -> Iterator[Studio]:
    """Prepare a place to draw.

    Args:
        isolated: shut the code off; otherwise it runs within limits of time and memory, but with the user's rights.
        dpi: pixels per inch of a figure.

    Raises:
        UsageError: isolation is asked for and impossible here, or matplotlib does not work.
    """
    problem = isolation_problem() if isolated else None
    if problem:
        raise UsageError(
            f"--render: {problem}; code from notebooks would run with your rights. Install or permit bubblewrap, "
            "or accept that with --weak-sandbox on a machine that holds nothing of value"
        )
    with tempfile.TemporaryDirectory(prefix="megavl-fonts-") as folder:
        outcome = run_limited(
            [PYTHON, "-I", "-c", "import matplotlib.font_manager"],
            request=b"",
            limits=_PREPARATION,
            folder=Path(folder),
            environment={"MPLCONFIGDIR": folder},
        )
        if not outcome.good:
            raise UsageError(f"--render: matplotlib does not start ({outcome.message.strip()[-300:] or outcome.ended})")
        fonts = [face.family for face in find_faces(SYSTEM_FOLDERS) if writes_chinese(face) and not is_stand_in(face)]
        yield Studio(isolated=isolated, fontcache=Path(folder), dpi=dpi, fonts=sorted(set(fonts)))


def parse_answer(answer: bytes) -> tuple[dict[int, list[bytes]], dict[str, str]]:
    """Figures by cell number and errors by kind; whatever is not in the expected form ends the reading."""
    figures: dict[int, list[bytes]] = {}
    position = 0
    while position < len(answer):
        end = answer.find(b"\n", position)
        try:
            head = json.loads(answer[position : end if end >= 0 else len(answer)])
            if "errors" in head:
                return figures, {reason: told for key, reason in _FAULTS.items() if (told := _told(head.get(key, {})))}
            number, size = int(head["cell"]), int(head["size"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return figures, {"not_run": "the answer is not in the expected form"}
        body = answer[end + 1 : end + 1 + size]
        if size < 0 or end < 0 or len(body) != size:
            return figures, {"not_run": "the answer is cut off"}
        figures.setdefault(number, []).append(body)
        position = end + 1 + size
    return figures, {"not_run": "the answer is cut off"}


def _told(faults: dict[str, str]) -> str:
    return "; ".join(f"cell {number}: {text}" for number, text in faults.items())
