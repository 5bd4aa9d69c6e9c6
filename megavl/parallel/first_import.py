"""Imports torch and megatron-core in half the time that their own import statements take.

megatron-core marks some thirty functions for torch.compile, which imports the whole compiler, whether or not one of
them is ever called. And the garbage collector walks through all modules again and again while they are made.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from typing import Any, cast

import megavl.config.releases  # noqa: F401  # before megatron-core


def import_engine() -> None:
    """Import both; to be called before any module that does. Further calls do nothing.

    Functions that megatron-core marks are compiled when they are first called.
    """
    if "megatron.core" in sys.modules:
        return
    gc.disable()
    try:
        import torch

        compile_now = torch.compile
        torch.compile = functools.partial(_compile_later, compile_now)  # type: ignore[assignment]
        try:
            # It keeps the name, under which its other modules find it later.
            import megatron.core  # noqa: F401
        finally:
            torch.compile = compile_now
    finally:
        gc.enable()
    # What was imported stays.
    gc.freeze()


def _compile_later(
    compile_now: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    import torch

    if function is None or options:
        return cast(Callable[..., Any], compile_now(function, **options))

    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        # The compiler of a function around this one sees through it.
        if torch.compiler.is_compiling():
            return function(*arguments, **named)
        if not compiled:
            compiled.append(compile_now(function))
        return compiled[0](*arguments, **named)

    return call
