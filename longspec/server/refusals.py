"""Refused requests: the status and the message, in OpenAI's error format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["BUSY", "RefusedError", "encoded"]

BUSY: Mapping[str, Any] = {"code": "rate_limit_exceeded", "headers": {"retry-after": "5"}}
"""Of status 429. When one who was sent away may ask again: about what a short answer takes on a processor."""

_MOST_SAID = 1000


class RefusedError(Exception):
    """A refused request: HTTP status and message."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        said, param = str(self), self.param  # they may quote what a stranger sent, of any length
        said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]}..."
        return {"error": {"message": said, "type": kind, "param": param and param[:_MOST_SAID], "code": self.code}}


def encoded(value: object) -> bytes:
    """JSON on one line in UTF-8; a lone surrogate, which a body may contain, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")
