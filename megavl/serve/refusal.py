"""Errors of the interface, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from megavl.serve.limits import RETRY_SECONDS

_KINDS = {404: "not_found_error", 429: "rate_limit_error"}
_RETRIED = (429, 503)


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
