"""The command as a process of its own without the second that importing torch takes: forked from one that has torch.

`command()` is started in place of `python -m longspec.cli.main`: a small process (support.stand_in) that stands for one
which a server of this test process forks. That isn't the right one for what only a whole process has: its imports, its
memory and other limits, its locale, its terminal's foreground. After `kill -9` of the small process the other one is
gone when their pipes end.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from support import stand_in

WARM = ("longspec.engine.engine", "longspec.cli.commands.serve", "tokenizers", "safetensors", "jinja2", "llguidance")
LARGEST = 1 << 17
"""Bytes of arguments and environment."""


def command(module: str = "longspec.cli.main") -> list[str]:
    """What to start; arguments follow, for the function `main` of this module."""
    if (name := server()) is None:
        return [sys.executable, "-m", module]
    return [sys.executable, "-I", "-S", str(stand_in.__file__), name, module]


@cache
def server() -> str | None:
    """The name of a server, which ends when its standard input does: with this process, however that ends."""
    if not hasattr(os, "pidfd_open"):  # it is Linux that has it
        return None
    name = f"longspec-tests-{os.getpid()}"
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "support.forked", str(listener.fileno())],
            cwd=tests, stdin=subprocess.PIPE, pass_fds=[listener.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        )  # fmt: skip
    atexit.register(process.communicate)
    return name


@dataclass(frozen=True)
class Child:
    pid: int
    ended: int
    """A file that is readable when it has."""
    caller: socket.socket


def serve(listener: socket.socket) -> None:
    for name in WARM:
        import_module(name)
    children: list[Child] = []
    while True:
        numbers = [number for child in children for number in (child.ended, child.caller.fileno())]
        ready, _, _ = select.select([0, listener.fileno(), *numbers], [], [])
        if 0 in ready:
            return
        for child in [*children]:
            if child.ended in ready:
                children.remove(child)
                report(child)
            elif child.caller.fileno() in ready:  # a signal; or the caller is gone
                os.kill(child.pid, ord(child.caller.recv(1) or bytes([signal.SIGKILL])))
        if listener.fileno() in ready:
            children.append(forked(listener))


def report(child: Child) -> None:
    _, status = os.waitpid(child.pid, 0)
    with child.caller, suppress(OSError):
        child.caller.send(status.to_bytes(4, "little"))
    os.close(child.ended)


def forked(listener: socket.socket) -> Child:
    caller, _ = listener.accept()
    asked, files, _, _ = socket.recv_fds(caller, LARGEST, 3)
    pid = os.fork()
    if pid == 0:
        try:
            become(asked, files)
            os._exit(0)
        finally:  # after an error
            traceback.print_exc()
            os._exit(70)
    for file in files:
        os.close(file)
    return Child(pid, os.pidfd_open(pid), caller)


def become(asked: bytes, files: list[int]) -> None:
    """Make of this process what a new one finds, and run the module's `main` in it."""
    arguments, folder, settings, streams, ignored = json.loads(asked)
    for number in range(3):
        os.close(number)
    for number, file in zip(streams, files, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (stream(number) if number in streams else None for number in range(3))
    for number in stand_in.FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(settings)
    sys.argv = arguments
    import_module(arguments[0]).main()
    print(end="", flush=True)


def stream(number: int) -> Any:
    """As Python makes them: standard error and terminals by the line."""
    by_line = number == 2 or os.isatty(number)
    return open(number, "r" if number == 0 else "w", buffering=1 if by_line else -1, closefd=False)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
