"""The command in this process and as one of its own, and a tiny checkpoint that it can run: one printable character
per token.

`inside` is for what it says, writes and returns; `call` and `started` are for what only a process has: signals, pipes
that close, files that end. Theirs is forked from one that has torch, whose import is most of what a new process costs;
`COMMAND` and `whole=True` are the new process all the same, for its memory, its imports, its locale, its terminal.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
from support import forked
from support.checkpoints import oracle, write
from support.letters import TEMPLATE, tokenizer_of

from longspec.cli.main import guarded
from longspec.machine.system import cache_folder

ROOT = Path(__file__).resolve().parents[2]
KERNELS = cache_folder() / "kernels"
COMMAND = [sys.executable, "-m", "longspec.cli.main"]
SECONDS = 300.0
"""What a process may take before it is held to hang: on two quiet cores the slowest takes 10, and nothing waits so long
that ends as it should.
"""


def write_tiny(folder: Path, context: int = 200_000) -> Path:
    """A checkpoint without an end of text: it writes as long as it may."""
    write(oracle("llama", max_position_embeddings=context, bos_token_id=1, eos_token_id=None), folder)
    names = ["<pad>", "<s>", "ß", *(chr(32 + i) for i in range(90)), "é", "世", "😀"]
    tokenizer_of(names).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def environment(
    home: Path, extra: Mapping[str, str] | None = None, given: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment without longspec's settings, and with a user's folders of its own."""
    kept = {name: value for name, value in given.items() if not name.startswith("LONGSPEC_")}
    # Compiled modules are kept for the next process, whatever the caller wants: half a second of each.
    for name in ("NO_COLOR", "PYTHONWARNINGS", "COLUMNS", "PYTHONDONTWRITEBYTECODE"):
        kept.pop(name, None)
    share_kernels(home / "cache")
    folders = {f"XDG_{name.upper()}_HOME": str(home / name) for name in ("config", "cache", "state")}
    folders["HF_HOME"] = str(home)
    return {**kept, **folders, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "xterm", **(extra or {})}


def share_kernels(cache: Path) -> None:
    """Give a user's cache folder this user's compiled kernels: to compile them takes ten seconds."""
    place = cache / "longspec" / "kernels"
    if not place.exists():
        KERNELS.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(KERNELS)


@dataclass
class Result:
    code: int
    out: bytes
    err: str


@contextmanager
def standard_streams(stdin: bytes) -> Iterator[Result]:
    """The three streams of this process as files, numbers and objects both; what was written is there at the end."""
    written = Result(-1, b"", "")
    with ExitStack() as kept:
        files = [kept.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(stdin)
        files[0].seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        objects = (sys.stdin, sys.stdout, sys.stderr)
        numbers = [os.dup(number) for number in range(3)]
        for number, file in enumerate(files):
            os.dup2(file.fileno(), number)
        streams = [
            kept.enter_context(open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
            for number in range(3)
        ]
        sys.stdin, sys.stdout, sys.stderr = streams
        try:
            yield written
        finally:
            for stream in streams:
                stream.close()
            sys.stdin, sys.stdout, sys.stderr = objects
            for number, before in enumerate(numbers):
                os.dup2(before, number)
                os.close(before)
        for file in files[1:]:
            file.seek(0)
        written.out, written.err = files[1].read(), files[2].read().decode()


def inside(
    arguments: Sequence[str | bytes],
    home: Path,
    stdin: bytes = b"",
    extra: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Result:
    """Run the command to its end in this process, with streams, environment and folder as `call` gives them, and with
    no libraries' advice to programmers, as `main` has it.
    """
    before, folder, threads = dict(os.environ), Path.cwd(), torch.get_num_threads()
    with standard_streams(stdin) as result, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.clear()
        os.environ.update(environment(home, extra, before))
        os.chdir(cwd)
        try:
            result.code = guarded([os.fsdecode(argument) for argument in arguments])
        finally:
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(before)
            torch.set_num_threads(threads)
    return result


def call(
    arguments: Sequence[str | bytes],
    home: Path,
    stdin: bytes = b"",
    extra: Mapping[str, str] | None = None,
    *,
    whole: bool = False,
) -> Result:
    """Run the command to its end."""
    done = subprocess.run(
        [*(COMMAND if whole else forked.command()), *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=environment(home, extra),
        timeout=SECONDS,
    )
    return Result(done.returncode, done.stdout, done.stderr.decode())


@contextmanager
def started(
    arguments: Sequence[str],
    home: Path,
    stdin: int = subprocess.DEVNULL,
    stderr: int = subprocess.PIPE,
    *,
    whole: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; killed if it is left running."""
    process = subprocess.Popen(
        [*(COMMAND if whole else forked.command()), *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
        env=environment(home),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@dataclass
class Terminal:
    """A pseudo-terminal's screen side, read until something stands there."""

    number: int
    seen: bytes = field(default=b"")

    def until(self, wanted: bytes | None) -> bytes:
        """All that was written so far, once `wanted` is in it, or the other side is closed."""
        end = monotonic() + SECONDS
        while wanted is None or wanted not in self.seen:
            assert monotonic() < end, f"{wanted!r} was never written, but {self.seen!r}"
            if select.select([self.number], [], [], 0.1)[0]:
                try:
                    data = os.read(self.number, 65536)
                except OSError:  # what Linux says when the last writer has closed
                    data = b""
                if not data:
                    assert wanted is None, f"{wanted!r} was never written, but {self.seen!r}"
                    break
                self.seen += data
        return self.seen
