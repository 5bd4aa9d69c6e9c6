"""Options of the programs: a parser that reports mistakes like every other error, and types for bounded numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from megavl.config.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one message with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{self.prog}: {message}; see --help")


def whole(least: int, most: int) -> Callable[[str], int]:
    """A type for whole numbers from `least` to `most`."""

    def convert(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give a whole number from {least} to {most}")
        return value

    return convert


def share(most: float) -> Callable[[str], float]:
    """A type for numbers from 0 to `most`."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is out of range; give a number from 0 to {most:g}")
        return value

    return convert
