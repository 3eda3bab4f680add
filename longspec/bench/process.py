"""An engine in a process of its own (`longspec.bench.worker`), which blocks on its input while another one works: its
peak memory is its own, and its threads don't disturb the others'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspec.bench.contenders import Contender
from longspec.bench.harness import Progress, Took
from longspec.errors import LongspecError, UsageError
from longspec.text.prompt import encode

if TYPE_CHECKING:
    from longspec.model.load import Model

__all__ = ["Case", "Worker", "opened", "single", "workers"]

_PLACES = ("assistant", "file", "folder")


@dataclass(frozen=True, slots=True)
class Case:
    """The prompts of a measurement, as the worker takes them, one by one or `width` at a time."""

    name: str
    prompts: Sequence[Mapping[str, Any]]
    new: int
    width: int = 1
    ends: Sequence[int] = ()
    chat: bool = False  # one category's prompts, one by one

    @property
    def turns(self) -> list[list[Mapping[str, Any]]]:
        """The prompts grouped by call."""
        return [[prompt] for prompt in self.prompts] if self.width == 1 else [list(self.prompts)]


def single(model: Model, prompt: str | list[dict[str, Any]], new: int) -> tuple[Case, list[dict[str, Any]]]:
    """What a worker takes for one prompt, or a chat, in the model's template."""
    text = prompt if isinstance(prompt, str) else ""
    request = {"text": text, "raw": False, "tokens": encode(model.vocabulary, prompt)}
    return Case("", [request], new, ends=model.end_tokens), [request]


class Worker:
    """A contender's process, ready for prompts."""

    def __init__(self, contender: Contender) -> None:
        """Start the process. Raises LongspecError with its error message where it can't load."""
        self.contender = contender
        own = [sys.executable, "-m", "longspec.bench.worker"]
        script = [contender.python or sys.executable, str(Path(__file__).with_name("worker.py"))]
        command = script if contender.kind == "llama.cpp" else own
        environment = dict(os.environ)
        if script is command:  # its threads wait as it has them wait, and not as ours do
            environment.pop("GOMP_SPINCOUNT", None)
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
        """The timing of these prompts. Raises LongspecError where the process has ended or reports an error."""
        took = self.ask(case, prompts)
        firsts = () if took["first"] is None else (took["first"],)
        return Took(len(prompts), took["tokens"], took["seconds"], took.get("steps", 0), firsts=firsts)

    def ask(self, case: Case, prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """All that the process tells of these prompts; of one alone transformers' tells the answer and the tokens of
        each step too. The errors are those of `write`.
        """
        request = {"prompts": prompts, "new": case.new, "width": case.width, "ends": case.ends}
        assert self._process.stdin is not None
        with suppress(OSError):  # the process has ended: its stderr says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        took = self._answer()
        self.peak = took["peak_bytes"]
        return took

    def report(self) -> dict[str, Any]:
        """The contender's description: its settings without file paths, and the worker's own report."""
        return {name: value for name, value in self.contender.settings.items() if name not in _PLACES} | self.told

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._heard):
            if stream is not None:
                with suppress(OSError):  # unsent input of a dead process
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
    """The contenders' workers, or the errors of those that can't start, in order; `stack` closes them."""
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


def workers(
    contenders: Sequence[Contender | str],
    stack: ExitStack,
    report: Progress,
    say: Callable[[str], object],
    *,
    needed: bool,
) -> dict[str, Worker]:
    """The workers by name, and what is to be said of them. needed: an unavailable engine is an error, instead of a
    note.
    """
    found = {}
    for worker in opened(contenders, stack, report):
        if isinstance(worker, Worker):
            found[worker.contender.name] = worker
            if note := worker.told.get("note"):
                say(f"{note} It is measured without that.")
        elif needed:
            raise worker
        else:
            say(str(worker))
    return found


def _started(contender: Contender) -> Worker:
    """Start a contender's worker; llama.cpp's is started again without repacked weights where its tiled kernels crash
    with a segmentation fault (llama.cpp's issue 20824).
    """
    try:
        return Worker(contender)
    except LongspecError as error:
        if not (contender.settings.get("repacked") and "ended with code -" in str(error)):
            raise
        worker = Worker(replace(contender, settings={**contender.settings, "repacked": False}))
        worker.told["note"] = f"With weights laid out for this processor {error}"
        return worker
