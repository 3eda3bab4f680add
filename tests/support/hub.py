"""A server that speaks the hub's protocol for one repository's files: an answer may be cut short."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub(ThreadingHTTPServer):
    """files: their bytes by `owner/name/file`. cuts: bytes after which the next answers break off, in their order."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = dict(files)
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []  # of each file that was asked for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._headers()

    def do_GET(self) -> None:
        if "/resolve/" in self.path:  # the library asks for other things too
            self.server.ranges.append(self.headers.get("Range"))
        if (rest := self._headers()) is not None:
            self.wfile.write(rest[: self.server.cuts.pop(0)] if self.server.cuts else rest)

    def log_message(self, *_: object) -> None:
        """Nothing is said."""

    def _headers(self) -> bytes | None:
        """Answer with the file's headers; what is left of it behind a range's beginning."""
        repository, _, name = self.path.lstrip("/").partition("/resolve/main/")
        data = self.server.files.get(f"{repository}/{name}")
        if data is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        return data[begin:]


@contextmanager
def served(files: Mapping[str, bytes]) -> Iterator[Hub]:
    hub = Hub(files)
    Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
