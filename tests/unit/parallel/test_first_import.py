"""megatron-core is imported without torch's compiler, and what it marks is compiled when called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megavl.parallel.first_import import _compile_later
from tests.tiny_run import environment

CODE = """
import sys
from megavl.parallel.first_import import import_engine
import_engine()
import gc, torch, megavl.train.loop
from megatron.core.fusions.fused_bias_swiglu import swiglu
print("torch._dynamo" in sys.modules, torch.compile.__module__, gc.isenabled())
print(swiglu(torch.ones(1, 4)).shape)
"""

WITHOUT = """
import sys
from megavl.main.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""


class Compiler:
    """Counts what is compiled and what is called."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.calls = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled.append(function.__name__)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            return function(*arguments, **named)

        return call


def double(value: int, *, more: int = 0) -> int:
    return 2 * value + more


def test_first_call_compiles_once() -> None:
    compiler = Compiler()
    marked = _compile_later(compiler, double)
    assert (marked.__name__, compiler.compiled) == ("double", [])
    assert (marked(3), marked(4, more=1), compiler.compiled, compiler.calls) == (6, 9, ["double"], 2)


def test_compiler_around_it_sees_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    compiler = Compiler()
    assert _compile_later(compiler, double)(3) == 6 and not compiler.compiled


def test_training_starts_without_the_compiler() -> None:
    environ = environment() | {"TORCHDYNAMO_DISABLE": "1"}
    # Not forked: the fork server has imported the compiler.
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["False torch True", "torch.Size([1, 2])"], done.stderr


@pytest.mark.parametrize("arguments", [["train", "--keys"], ["plan", "launch/recipes/7b/stage2.yaml"]])
def test_commands_that_compute_nothing_do_without_torch(arguments: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
