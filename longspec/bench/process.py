"""An engine in a process of its own (`longspec.bench.worker`), which waits on its input while another one works: peaks
of memory are its own, and nobody's threads disturb another's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longspec.bench.contenders import Contender
from longspec.bench.harness import Progress, Took
from longspec.errors import LongspecError, UsageError

__all__ = ["Case", "Worker", "opened"]

_PLACES = ("assistant", "file", "folder")


@dataclass(frozen=True, slots=True)
class Case:
    """What is written: prompts as the worker takes them, one by one or `width` at a time."""

    name: str
    prompts: Sequence[Mapping[str, Any]]
    new: int
    width: int = 1
    ends: Sequence[int] = ()
    chat: bool = False  # a category's prompts, one by one

    @property
    def turns(self) -> list[list[Mapping[str, Any]]]:
        """What is asked at once."""
        return [[prompt] for prompt in self.prompts] if self.width == 1 else [list(self.prompts)]


class Worker:
    """A contender's process, ready to write."""

    def __init__(self, contender: Contender) -> None:
        """Raises LongspecError where it can't be loaded, with its own words."""
        self.contender = contender
        own = [sys.executable, "-m", "longspec.bench.worker"]
        script = [contender.python or sys.executable, str(Path(__file__).with_name("worker.py"))]
        command = script if contender.kind == "llama.cpp" else own
        environment = dict(os.environ)
        if "OMP_WAIT_POLICY" not in environment:  # as the command itself: threads that wait sleep soon
            environment.setdefault("GOMP_SPINCOUNT", "10000")
        self._heard = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [*command, contender.kind, json.dumps(dict(contender.settings))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._heard, text=True, encoding="utf-8",
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._heard.close()
            raise LongspecError(f"{command[0]} can't be run for {contender.name}: {error.strerror}.") from error
        try:
            self.told = self._answer()
        except BaseException:
            self.close()
            raise
        self.peak = 0

    def write(self, case: Case, prompts: Sequence[Mapping[str, Any]]) -> Took:
        """What these prompts took. Raises LongspecError where the process has ended, or couldn't."""
        request = {"prompts": prompts, "new": case.new, "width": case.width, "ends": case.ends}
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: what it left says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        took = self._answer()
        self.peak = took["peak_bytes"]
        firsts = () if took["first"] is None else (took["first"],)
        return Took(len(prompts), took["tokens"], took["seconds"], took.get("steps", 0), firsts=firsts)

    def report(self) -> dict[str, Any]:
        """What it is: its settings but for where its files lie, and what it told of itself."""
        return {name: value for name, value in self.contender.settings.items() if name not in _PLACES} | self.told

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._heard):
            if stream is not None:
                with suppress(OSError):  # what it didn't take any more
                    stream.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in reply:
            raise LongspecError(f"{self.contender.name} can't be measured: {reply['error'].strip().rstrip('.')}.")
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        self._heard.seek(0)
        lines = self._heard.read().decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"its process ended with code {code}")


def opened(
    contenders: Sequence[Contender | str], stack: ExitStack, report: Progress
) -> Iterator[Worker | LongspecError]:
    """Their workers, or why there is none, in their order; `stack` ends them."""
    for done, contender in enumerate(contenders):
        if isinstance(contender, str):
            yield UsageError(f"{contender}.")
            continue
        report(f"loading {contender.name}", done, len(contenders))
        try:
            worker = _started(contender)
        except LongspecError as error:
            yield error
        else:
            stack.callback(worker.close)
            yield worker


def _started(contender: Contender) -> Worker:
    """Its worker; llama.cpp's a second time with weights as they lie in the file, where its kernels for tiles end it
    by a segmentation fault (llama.cpp's issue 20824).
    """
    try:
        return Worker(contender)
    except LongspecError as error:
        if not (contender.settings.get("repacked") and "ended with code -" in str(error)):
            raise
        worker = Worker(replace(contender, settings={**contender.settings, "repacked": False}))
        worker.told["note"] = f"With weights laid out for this processor {error}"
        return worker
