"""Host and API-key checks before a request is read.

A web page can make its own name resolve to 127.0.0.1 (DNS rebinding) and then send requests to this server from the
user's browser: a request with a foreign Host is refused before anything is read.
"""

from __future__ import annotations

from hmac import compare_digest

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from longspec.server.refusals import RefusedError, encoded

__all__ = ["Guard"]

_OPEN = "/health"
"""Needs no key: what starts servers asks it."""


class Guard:
    """ASGI middleware. hosts: the Host names allowed (None: any); key: the API key required, if there is one."""

    def __init__(self, inner: ASGIApp, hosts: frozenset[str] | None, key: str | None) -> None:
        self.inner = inner
        self.hosts = hosts
        self.key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.inner(scope, receive, send)
        else:
            answer = Response(encoded(refusal.body()), refusal.status, refusal.headers, "application/json")
            await answer(scope, receive, send)

    def _refusal(self, scope: Scope) -> RefusedError | None:
        headers = Headers(scope=scope)
        host = _name(headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            said = f"The request is for the host {host!r}; this server is localhost, ask it under that name."
            return RefusedError(421, said, code="wrong_host")
        if self.key is not None and scope["path"] != _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if (own := headers.get("x-api-key")) is not None:  # as Anthropic's clients send it
                scheme, given = "bearer", own
            if scheme.lower() != "bearer" or not compare_digest(given.strip().encode("latin-1"), self.key.encode()):
                said = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
                return RefusedError(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return None


def _name(host: str) -> str:
    """The name in a Host header, without the port: localhost:8000, 127.0.0.1, [::1]:8000."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
