"""Errors of the interface, in OpenAI's form."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

from megavl.foreign.printing import visible
from megavl.serve.limits import RETRY_SECONDS

_KINDS = {404: "not_found_error", 429: "rate_limit_error"}
_RETRIED = (429, 503)
_VALUES = Repr()
_VALUES.maxstring = _VALUES.maxother = 100


class Refusal(Exception):
    """A request that gets no answer."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        """What is wrong and what to do.

        Args:
            status: of HTTP.
            param: the field that is wrong.
            code: a word for programs.
        """
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in _RETRIED else {}


def excerpt(text: str, most: int = 100) -> str:
    """The first `most` characters of a text, with control characters visible; a long text takes no longer."""
    return visible(text[:most])[:most]


def written(value: object) -> str:
    """The beginning of how a value is written, with control characters visible; a large value takes no longer."""
    return excerpt(_VALUES.repr(value))
