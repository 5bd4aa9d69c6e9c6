"""Runs the code cells of one notebook and sends back the figures; a program of its own that is run inside the sandbox.

What runs here is foreign and may do anything that the sandbox lets it: whoever reads the answer believes nothing of it.
Standard input: one JSON request. Standard output: for each figure a JSON line and the PNG file, then a JSON line.
"""

from __future__ import annotations

import glob
import io
import json
import os
import random
import re
import shutil
import sys
import types
import warnings
from typing import Any

MOST_FIGURES = 20
"""Of one cell; code in a loop may open thousands."""
NO_GLYPH = re.compile(r"Glyph \d+ .*missing from")
"""How matplotlib warns of a character that it draws as a box."""


def main() -> int:
    """Answer one request."""
    request = json.load(sys.stdin)
    # The foreign code may print as it likes.
    answers = os.fdopen(os.dup(1), "wb")
    silent = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(silent, handle)
    os.makedirs(os.environ["MPLCONFIGDIR"], exist_ok=True)
    for path in glob.glob(os.path.join(glob.escape(request["fontcache"]), "*.json")):
        shutil.copy(path, os.environ["MPLCONFIGDIR"])
    errors, unwritten = run_cells(request["cells"], dpi=request["dpi"], fonts=request["fonts"], answers=answers)
    send(answers, {"errors": errors, "no_glyph": unwritten})
    answers.close()
    # Whatever the code left behind (threads, handlers at exit) is not waited for.
    os._exit(0)


def run_cells(
    cells: list[dict[str, object]], *, dpi: int, fonts: list[str], answers: io.BufferedWriter
) -> tuple[dict[str, str], dict[str, str]]:
    """Run cells one after another in one namespace, as a notebook does; an error ends its cell only.

    Args:
        cells: number and code of each.
        dpi: pixels per inch.
        fonts: families for characters that the font of a figure lacks.
        answers: takes the figures.

    Returns:
        By cell number, errors and characters that no font has.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy

    warnings.simplefilter("ignore")
    random.seed(0)
    numpy.random.seed(0)
    plt.rcParams["font.family"] = [*plt.rcParams["font.family"], *fonts]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    errors: dict[str, str] = {}
    unwritten: dict[str, str] = {}
    for cell in cells:
        number = str(cell["number"])
        try:
            code = compile(python_only(str(cell["code"])), f"<cell {number}>", "exec")
            exec(code, module.__dict__)
            figures, lost = draw_figures(plt, dpi=dpi)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            errors[number] = f"{type(error).__name__}: {error}"[:200]
        else:
            if lost:
                unwritten[number] = lost
            for figure in figures:
                send(answers, {"cell": cell["number"], "size": len(figure)}, figure)
        plt.close("all")
    return errors, unwritten


def draw_figures(plt: Any, *, dpi: int) -> tuple[list[bytes], str]:
    """PNG files of the open figures; none, and why, where one of them would show boxes in place of characters."""
    figures = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for figure in plt.get_fignums()[:MOST_FIGURES]:
            buffer = io.BytesIO()
            plt.figure(figure).savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
            figures.append(buffer.getvalue())
    lost = next((str(warning.message) for warning in told if NO_GLYPH.match(str(warning.message))), "")
    return ([], lost[:200]) if lost else (figures, "")


def python_only(code: str) -> str:
    """A cell's code with `pass` for the commands of the notebook."""
    if code.lstrip().startswith("%%"):
        return ""
    return re.sub(r"^(\s*)[%!?].*$", r"\1pass", code, flags=re.MULTILINE)


def send(answers: io.BufferedWriter, head: dict[str, object], body: bytes = b"") -> None:
    """One JSON line and what belongs to it."""
    answers.write(json.dumps(head).encode() + b"\n" + body)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
