"""Request bodies, read within limits: the size, time and values of each, and the bytes of all together.

Takes untrusted requests; gives JSON objects. Knows no field of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request

from longspec.requests.fields import parse_object
from longspec.server.refusals import BUSY, RefusedError

__all__ = [
    "ALL_NBYTES",
    "BODY_SECONDS",
    "MOST_NAMES",
    "MOST_NBYTES",
    "MOST_VALUES",
    "RATE",
    "SMALL_NBYTES",
    "VALUE_RATE",
    "Bodies",
]

MOST_NBYTES = 8 << 20
"""Of a body: ten times what a context of 128k tokens holds."""

BODY_SECONDS = 30.0
"""In which a body has to arrive: a client that sends a byte now and then must not keep a place for good."""

MOST_VALUES = 1 << 19
"""Commas and opening brackets of a body, more than any context holds: 8 MiB of `[],` would keep the event loop for
2.5 s, and take a gigabyte.
"""

MOST_NAMES = 1 << 17
"""Colons of a body, those behind quotation marks within its texts not counted: each may be a name, and names cost most.
Half a million of them keep the interpreter for .5 s, as long as nothing else of the process runs.
"""

ALL_NBYTES = 64 << 20
"""Of all bodies that are being read, or whose prompts are; beyond it only small ones are taken."""

SMALL_NBYTES = 64 << 10
"""Of a body that is always taken, so that those who send large ones slowly keep nobody out."""


RATE = 16 << 20
"""Bytes a second of all bodies that aren't small, in turns: a body that comes as fast as the loop can take it keeps the
interpreter from the thread that writes texts.
"""

VALUE_RATE = 1 << 19
"""Commas, brackets and names a second of all bodies that aren't small: what they cost is a fifth of that time."""


class Bodies:
    """The bodies of one application."""

    def __init__(self) -> None:
        self._held = 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def object(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """The body's JSON object, which counts as held while the block runs.

        Raises:
            RefusedError: it isn't JSON by its type, is too large or too slow, or the server holds too much.
            RequestError: it isn't a JSON object.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a foreign page may make a browser send other types without a preflight
            raise RefusedError(415, f"The content type is {kind!r}; send application/json.")
        data = bytearray()
        try:
            await self._read(request, data)
            yield parse_object(bytes(data), "The body")
        finally:
            self._held -= len(data)

    async def _read(self, request: Request, data: bytearray) -> None:
        values = names = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    data += piece
                    self._held += len(piece)
                    some = sum(map(piece.count, (b",", b"[", b"{")))
                    named = piece.count(b":") - piece.count(b'\\":') + piece.count(b'\\\\":')
                    values, names = values + some, names + named
                    if len(data) > MOST_NBYTES:
                        raise RefusedError(
                            413, f"The body has more than {MOST_NBYTES >> 20} MiB; send a shorter prompt."
                        )
                    if len(data) > SMALL_NBYTES and self._held > ALL_NBYTES:
                        raise RefusedError(429, "Too many large requests are being read; try again later.", **BUSY)
                    if values > MOST_VALUES:
                        sentence = f"The body has more than {MOST_VALUES:,} commas and brackets; send a shorter prompt."
                        raise RefusedError(413, sentence)
                    if names > MOST_NAMES:
                        sentence = f"The body has more than {MOST_NAMES:,} names of fields; send a shorter prompt."
                        raise RefusedError(413, sentence)
                    if len(data) > SMALL_NBYTES:
                        async with self._turn:
                            await asyncio.sleep(len(piece) / RATE + (some + named) / VALUE_RATE)
        except TimeoutError:
            raise RefusedError(408, f"The body didn't arrive within {BODY_SECONDS:g} seconds.") from None
