"""Warnings of megatron-core and torch that a user can do nothing about.

They say that optional parts are not installed, or that megatron-core calls something by an older name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_EXPECTED = (
    ".*Apex (is|are) not installed.*",
    "Please use DTensor instead.*",
    "full scope is deprecated.*",
    "The .grad attribute of a Tensor that is not a leaf.*",
    ".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated.*",
)


_LOGGER, _LOGGED = "megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"
"""Who logs what is no warning of Python's; 0.19 recommends another class."""


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_LOGGED)


_FILTER = _Unexpected()


def ignore_expected_warnings() -> None:
    """Leave them out from now on: for a command, whose process is its own."""
    for message in _EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger(_LOGGER).addFilter(_FILTER)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Leave them out inside of the context: for the library, in a process that belongs to the user's program."""
    with warnings.catch_warnings():
        ignore_expected_warnings()
        try:
            yield
        finally:
            logging.getLogger(_LOGGER).removeFilter(_FILTER)
