"""Private names of torch and megatron-core are listed, and exist in the installed releases."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.releases import UNPROMISED
from megavl.parallel.first_import import import_engine

ROOT = Path(__file__).parents[2]
ENGINES = ("apex", "megatron", "torch", "transformer_engine")
OF_PYTHON = {"_exit"}
"""Names of the standard library that are documented."""


@functools.cache
def sources() -> tuple[str, ...]:
    return tuple(path.read_text() for path in (ROOT / "megavl").rglob("*.py"))


def private_names(source: str) -> Iterator[str]:
    """Full names that begin with one underscore, imported from an engine or reached through an imported module."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                if first in ENGINES:
                    names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in ENGINES:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    yield from (name for name in names.values() if "._" in name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            chain, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                chain.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in names:
                yield ".".join([names[value.id], *reversed(chain)])


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def own_names(source: str) -> Iterator[str]:
    """Names that a source gives to what is its own: functions, classes, variables, fields, and attributes of `self`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def attributes(source: str) -> Iterator[str]:
    """Private attributes of whatever object, also those named by `getattr` and the like."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and is_private(name):
                yield str(name)


def test_the_scan_sees_every_form() -> None:
    source = "import torch\nimport torch.nn as nn\nfrom torch import _a\nfrom megatron.core import tensor as t\n"
    source += "torch.x._b()\nnn._c\nt.d._e\nself._f\ntorch.__version__\n"
    assert sorted(private_names(source)) == ["megatron.core.tensor.d._e", "torch._a", "torch.nn._c", "torch.x._b"]


def test_the_scan_tells_own_names_from_others() -> None:
    source = "class _A:\n _b: int\n _c = 1\n def _d(self):\n  self._e, options._f = 1, x._g\n"
    source += "getattr(x, '_h', 0)\nhasattr(x, '__i')\nsetattr(x, f'_{j}', 1)\n"
    assert {name for name in own_names(source) if is_private(name)} == {"_A", "_b", "_c", "_d", "_e"}
    assert sorted(attributes(source)) == ["_e", "_f", "_g", "_h"]


def test_private_names_are_listed() -> None:
    found = {name for source in sources() for name in private_names(source)}
    assert found <= set(UNPROMISED)


def test_private_attributes_of_others_are_listed() -> None:
    own = {name for source in sources() for name in own_names(source)}
    listed = {name.rpartition(".")[2] for name in UNPROMISED} | OF_PYTHON
    assert {name for source in sources() for name in attributes(source)} <= own | listed


@pytest.mark.parametrize("name", UNPROMISED)
def test_private_name_exists(name: str) -> None:
    import_engine()
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            # What an instance sets is only declared in its class.
            declared = part in getattr(found, "__annotations__", {})
            found = None if declared else getattr(found, part)
        return
    pytest.fail(f"{name}: no part of it is a module")
