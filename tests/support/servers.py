"""Servers in this process and as one of their own."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import openai
from support import forked
from support.commands import COMMAND, ROOT, SECONDS, call, environment

from longspec.engine.engine import Engine
from longspec.server.api import open_to_clients
from longspec.server.desk import Desk
from longspec.server.hosts import names
from longspec.server.listen import Listener, bind
from longspec.server.models import Models, Start
from longspec.server.worker import Worker


class Served:
    """A server in this process, on a thread of its own."""

    def __init__(
        self,
        made: Engine,
        key: str | None = None,
        most: int = 40,
        seconds: float = SECONDS,
        kept: int = 0,
        also: Mapping[str, Start] | None = None,
        idle: float | None = None,
        **options: Any,
    ) -> None:
        self.engine = made
        self.began: list[Worker] = []  # of further models, for tests that count them
        self.said: list[str] = []
        self.worker = Worker(lambda: made, 8, kept)
        self.worker.loaded.result(SECONDS)
        self.desk = Desk(most, seconds)
        models = Models(self.desk, {"tiny": lambda _: self.worker, **(also or {})}, idle)
        models.begin()
        door = bind("127.0.0.1", 0)
        self.port = door.getsockname()[1]
        app = open_to_clients(self.desk, models, names("127.0.0.1"), key, self.said.append, **options)
        self.listener = Listener(self.desk, [(app, door)], grace=0.2)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=[self.listener.run()])
        self.thread.start()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def ask(self, body: object, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        """Status and body of the answer to a request that OpenAI's client wouldn't send."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        sent = {"content-type": "application/json", **given}
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)) as connection:
            connection.request("POST", path, data, {name: value for name, value in sent.items() if value})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.listener.stop)
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        self.loop.close()
        self.worker.stop(SECONDS)


@contextmanager
def serving(made: Engine, **options: Any) -> Iterator[Served]:
    served = Served(made, **options)
    try:
        yield served
    finally:
        if served.thread.is_alive():
            served.stop()


@contextmanager
def server(
    arguments: list[str], home: Path, extra: Mapping[str, str] | None = None, *, whole: bool = False
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address once it listens."""
    process = subprocess.Popen(
        [*(COMMAND if whole else forked.command()), "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(home, extra),
    )
    try:
        assert process.stderr is not None
        seen = ""
        while (found := re.search(r"http://\S+/v1", seen)) is None:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def loads(arguments: list[str], home: Path, extra: Mapping[str, str] | None = None) -> tuple[int, bytes, str, bool]:
    """Exit code, stdout, stderr, and whether `longspec run` imported torch."""
    done = call(arguments, home, extra={"PYTHONPROFILEIMPORTTIME": "1", **(extra or {})}, whole=True)
    lines = [line for line in done.err.splitlines(keepends=True) if not line.startswith("import time:")]
    imported = re.search(r"\| +torch$", done.err, re.MULTILINE) is not None
    return done.code, done.out, "".join(lines), imported


def until(true: Callable[[], bool]) -> None:
    end = monotonic() + SECONDS
    while not true():
        assert monotonic() < end, "it never came true"
        sleep(0.01)
