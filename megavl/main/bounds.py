"""Bounds of options that are numbers."""

from __future__ import annotations

import argparse

from megavl.config.errors import UsageError


def require_at_least(least: int, arguments: argparse.Namespace, *names: str) -> None:
    """Refuse options below a bound; one that was not given is None and passes.

    Raises:
        UsageError: naming the first option and its value.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise UsageError(f"--{name.replace('_', '-')}: {value} must be at least {least}")
