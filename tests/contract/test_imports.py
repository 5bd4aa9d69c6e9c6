"""Who may import whom: every import statement is read, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Package -> packages of megavl that it may import, its own aside. The folders are the data flow.
ARROWS: dict[str, set[str]] = {
    "foreign": set(),
    "config": {"foreign"},
    "files": {"config", "foreign"},
    "weights": {"config", "files"},
    "planner": {"config", "foreign"},
    "parallel": {"config"},
    "data": {"config", "files", "foreign"},
    "model": {"config", "parallel", "data"},
    "checkpoint": {"config", "files", "foreign", "weights"},
    "convert": {"config", "files", "foreign", "weights", "checkpoint"},
    "generate": {"config", "foreign", "planner", "parallel", "data", "model", "checkpoint", "convert", "weights"},
    "evaluate": {"config", "files", "foreign", "generate", "data", "model", "parallel"},
}
ARROWS["train"] = set(ARROWS)
ARROWS["serve"] = {"config", "foreign", "generate", "data", "parallel"}
ARROWS["main"] = set(ARROWS)
ARROWS["data_tools"] = {"config", "files", "foreign", "data"}
ARROWS["launch"] = set(ARROWS) - {"main"}
# (importer, package): the only module of that package which it may import.
NARROW = {("model", "data"): "megavl.data.batch"}
# Third-party engine -> packages that may import it; tests may import anything.
SEAMS = {
    "megatron": {"parallel", "model", "train", "checkpoint", "generate", "launch"},
    "transformers": {"generate", "launch"},
    "lm_eval": {"evaluate", "launch"},
    "torch": set(ARROWS) - {"config", "files", "foreign", "planner", "data_tools"} | {"launch"},
}


def package_of(path: Path, root: Path) -> str:
    """`megavl/data/x.py` -> data; `data_tools/x.py` -> data_tools; `megavl/__main__.py` -> main."""
    parts = path.relative_to(root).parts
    if parts[0] != "megavl":
        return parts[0]
    return parts[1] if len(parts) > 2 else "main"


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported; `from a import b` gives a.b, of which b may be a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*module.split(".")[: -node.level], base]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


@pytest.fixture(scope="module")
def found(python_files: list[Path], root: Path) -> list[tuple[Path, int, str]]:
    """File, line and name of every import outside the tests."""
    return [
        (path, line, name)
        for path in python_files
        if path.parent != root and path.relative_to(root).parts[0] != "tests"
        for line, name in imports(ast.parse(path.read_text()), module_of(path, root))
    ]


def test_every_package_has_a_row(python_files: list[Path], root: Path) -> None:
    packages = {package_of(path, root) for path in python_files if path.parent not in (root, root / "megavl")}
    assert packages - {"tests"} <= set(ARROWS)


def test_arrows(found: list[tuple[Path, int, str]], root: Path) -> None:
    wrong = []
    for path, line, name in found:
        package = package_of(path, root)
        parts = name.split(".")
        if parts[0] == "megavl":
            target = parts[1] if len(parts) > 1 else ""
            allowed = target in ARROWS.get(package, ()) and name.startswith(NARROW.get((package, target), "megavl."))
            if target in ARROWS and target != package and not allowed:
                wrong.append(f"{path.relative_to(root)}:{line}: {package} may not import {name}")
        elif parts[0] == "data_tools" and package == "launch":
            continue
        elif parts[0] in ("data_tools", "launch", "tests") and parts[0] != package:
            wrong.append(f"{path.relative_to(root)}:{line}: nobody imports {parts[0]}, found {name}")
    assert not wrong, "\n".join(wrong)


def test_engines_are_used_through_their_seams(found: list[tuple[Path, int, str]], root: Path) -> None:
    wrong = [
        f"{path.relative_to(root)}:{line}: {name} belongs in {sorted(SEAMS[engine]) or 'tests'}"
        for path, line, name in found
        if (engine := name.split(".")[0]) in SEAMS and package_of(path, root) not in SEAMS[engine]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycles(found: list[tuple[Path, int, str]], python_files: list[Path], root: Path) -> None:
    modules = {module_of(path, root) for path in python_files}
    graph: dict[str, set[str]] = {}
    for path, _, name in found:
        source = module_of(path, root)
        target = name if name in modules else name.rpartition(".")[0]
        if target in modules and target != source:
            graph.setdefault(source, set()).add(target)
    cycle = find_cycle(graph)
    assert not cycle, " -> ".join(cycle)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Names along one cycle, or nothing."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_the_cycle_finder_finds_one() -> None:
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []


# What takes longest to import, and programs that do without it.
HEAVY = ("torch", "megatron", "transformers")
LIGHT = {"data_tools/preprocess.py": (*HEAVY, "pydantic", "yaml", "pyarrow")}


def imported(code: str, *arguments: str, among: tuple[str, ...], root: Path) -> list[str]:
    """Which of these modules Python holds after running the code."""
    code = f"import importlib, runpy, sys\n{code}\nprint([name for name in {among!r} if name in sys.modules])"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = ast.literal_eval(done.stdout)
    return found


def test_data_tools_start_without_torch(python_files: list[Path], root: Path) -> None:
    modules = [module_of(path, root) for path in python_files if path.relative_to(root).parts[0] == "data_tools"]
    # A folder named like a file, for old command lines, is run and never imported.
    modules = [name for name in modules if not name.endswith("__main__")]
    code = "for name in sys.argv[1:]: importlib.import_module(name)"
    assert imported(code, *modules, among=HEAVY, root=root) == []


@pytest.mark.parametrize("program", LIGHT)
def test_short_programs_import_nothing_heavy(program: str, root: Path) -> None:
    assert imported("runpy.run_path(sys.argv[1])", program, among=LIGHT[program], root=root) == []
