"""Runs the code cells of one notebook and sends back the figures; a program of its own that is run inside the sandbox.

What runs here is foreign and may do anything that the sandbox lets it: whoever reads the answer believes nothing of it.
Standard input: one JSON request. Standard output: for each figure a JSON line and the PNG file, then a JSON line.
"""

from __future__ import annotations

import contextlib
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

MOST_FIGURES = 20
"""Of one cell; code in a loop may open thousands."""


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
    errors = run_cells(request["cells"], dpi=request["dpi"], answers=answers)
    send(answers, {"errors": errors})
    answers.close()
    # Whatever the code left behind (threads, handlers at exit) is not waited for.
    os._exit(0)


def run_cells(cells: list[dict[str, object]], *, dpi: int, answers: io.BufferedWriter) -> dict[str, str]:
    """Run cells one after another in one namespace, as a notebook does; an error ends its cell only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy

    warnings.simplefilter("ignore")
    random.seed(0)
    numpy.random.seed(0)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    errors: dict[str, str] = {}
    for cell in cells:
        number = str(cell["number"])
        try:
            code = compile(python_only(str(cell["code"])), f"<cell {number}>", "exec")
            exec(code, module.__dict__)
        except BaseException as error:  # SystemExit and KeyboardInterrupt too
            errors[number] = f"{type(error).__name__}: {error}"[:200]
        else:
            for figure in plt.get_fignums()[:MOST_FIGURES]:
                with contextlib.suppress(Exception):
                    buffer = io.BytesIO()
                    plt.figure(figure).savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
                    send(answers, {"cell": cell["number"], "size": len(buffer.getvalue())}, buffer.getvalue())
        plt.close("all")
    return errors


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
