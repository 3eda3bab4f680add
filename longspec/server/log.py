"""Request ids and the access log: one line on standard error for each request, as words or as JSON.

ASGI middleware. It knows methods, paths, statuses and times, and no prompt: what clients write isn't logged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["FORMATS", "Log"]

FORMATS = ("none", "text", "json")

_MOST_PATH = 200


class Log:
    """Gives every response an `x-request-id`, and says each request once it is over. form: one of FORMATS."""

    def __init__(self, inner: ASGIApp, form: str, say: Callable[[str], None]) -> None:
        self.inner = inner
        self.form = form
        self.say = say

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        name, began, status = f"req_{uuid4().hex}", perf_counter(), 499  # until a response begins, the client's leaving

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            await self.inner(scope, receive, sent)
        finally:
            if self.form != "none":
                self.say(self._line(scope, name, status, perf_counter() - began))

    def _line(self, scope: Scope, name: str, status: int, seconds: float) -> str:
        client = (scope.get("client") or ["-"])[0]
        method, path = scope["method"], scope["path"][:_MOST_PATH]
        if self.form == "json":
            when = datetime.now(UTC).isoformat(timespec="milliseconds")
            fields = {"time": when, "id": name, "client": client, "method": method, "path": path, "status": status}
            return json.dumps({**fields, "seconds": round(seconds, 4)})
        return f"{client} {method} {path!r} {status} in {seconds:.3f} s ({name})"
