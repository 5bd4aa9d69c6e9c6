"""Private names of torch and megatron-core are listed, and exist in the installed releases."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavl.config.releases import UNPROMISED
from megavl.parallel.first_import import import_engine

ROOT = Path(__file__).parents[2]
ENGINES = ("apex", "megatron", "torch", "transformer_engine")


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
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            chain, value = [node.attr], node.value
            while isinstance(value, ast.Attribute):
                chain.append(value.attr)
                value = value.value
            if isinstance(value, ast.Name) and value.id in names:
                yield ".".join([names[value.id], *reversed(chain)])


def test_the_scan_sees_every_form() -> None:
    source = "import torch\nimport torch.nn as nn\nfrom torch import _a\nfrom megatron.core import tensor as t\n"
    source += "torch.x._b()\nnn._c\nt.d._e\nself._f\ntorch.__version__\n"
    assert sorted(private_names(source)) == ["megatron.core.tensor.d._e", "torch._a", "torch.nn._c", "torch.x._b"]


def test_private_names_are_listed() -> None:
    found = {name for path in (ROOT / "megavl").rglob("*.py") for name in private_names(path.read_text())}
    assert found <= set(UNPROMISED)


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
            found = getattr(found, part)
        return
    pytest.fail(f"{name}: no part of it is a module")
