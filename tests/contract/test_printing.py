"""Commands print through `megavl.foreign.printing`, which shows what a terminal would obey in the text of a file."""

from __future__ import annotations

import ast
from pathlib import Path

ALLOWED = {
    ("megavl/foreign/printing.py", "print"): "the one place that prints",
    ("data_tools/view.py", "print"): "colours, around text that was made visible",
    ("data_tools/corpus/pairs/documents/page_worker.py", "sys.stdout.write"): "JSON for the process that started it",
    ("data_tools/inspect.py/__main__.py", "print"): "a text of its own, in a file that must not import anything",
}
BARE = ("print", "sys.stdout.write", "sys.stderr.write", "tqdm.write")


def called(path: Path) -> set[str]:
    """Functions of BARE that a file calls, unless their first argument is made visible."""
    text = path.read_text(encoding="utf-8")
    if not any(f"{name}(" in text for name in BARE):
        return set()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return {
        name
        for call in calls
        if (name := ast.unparse(call.func)) in BARE
        and not (call.args and ast.unparse(call.args[0]).startswith("visible("))
    }


def test_commands_print_through_one_function(python_files: list[Path], root: Path) -> None:
    files = [path for path in python_files if path.relative_to(root).parts[0] in ("megavl", "data_tools")]
    found = {(path.relative_to(root).as_posix(), name) for path in files for name in called(path)}
    assert len(files) > 200 and found == set(ALLOWED)
