"""C sources of this package as libraries: compiled when first used, kept in the user's cache, loaded by ctypes.

Takes a source file, gives the library or the reason why there is none; a caller then takes torch's operators instead.
Plain C without torch's headers compiles in a second or two, where torch's own loader of extensions takes forty.

OpenMP is compiled in and not linked: its calls find the library that torch has loaded, so that the process has one pool
of threads. Where they find none (another compiler's OpenMP), the source is compiled without.

LONGSPEC_COMPILER names a compiler, or is `none`: nothing is compiled or loaded then.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from longspec.machine.system import cache_folder

__all__ = ["library"]

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-std=gnu11")
_HEADERS = Path(__file__).parent
_SECONDS = 120
"""A compiler that takes longer is given up on."""


@cache
def library(name: str | Path) -> ctypes.CDLL | str:
    """The library of a source file of this folder, or of one at a path, which may include headers of its folder and of
    this one; a sentence where it can't be had. One that needs tiles says by its function `missing` whether this
    processor lacks them.
    """
    found = _loaded(_HEADERS / name)
    if not isinstance(found, str) and hasattr(found, "missing") and found.missing():
        return "this processor has no tiles (AMX), or the system doesn't give them"
    return found


def _loaded(source: Path) -> ctypes.CDLL | str:
    name = os.environ.get("LONGSPEC_COMPILER", "")
    if name == "none":
        return "LONGSPEC_COMPILER is none"
    compiler = next(filter(None, map(shutil.which, (name,) if name else ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return f"no compiler named {name} was found" if name else "no C compiler (cc, gcc, clang) was found"
    try:
        headers = sorted([*_HEADERS.glob("*.h"), *source.parent.glob("*.h")])
        code = b"".join(file.read_bytes() for file in (source, *headers))
        stamp = os.stat(compiler)
        words = repr((compiler, stamp.st_size, stamp.st_mtime_ns, _FLAGS, platform.machine(), _processor())).encode()
        place = cache_folder() / "kernels" / f"{source.stem}-{hashlib.sha256(code + words).hexdigest()[:20]}.so"
        if place.exists():
            try:
                return ctypes.CDLL(str(place))
            except OSError:  # damaged, or made for another system: it is made anew
                place.unlink()
        reason = ""
        for threads in (("-fopenmp",), ()):
            reason = _build(compiler, source, place, threads)
            if not reason:
                try:
                    return ctypes.CDLL(str(place))
                except OSError as error:  # calls of an OpenMP that isn't loaded
                    reason = str(error)
                    place.unlink()
        return f"{compiler} can't build {source.name}: {reason}"
    except OSError as error:
        return f"{source.name} can't be built: {error}"


def _build(compiler: str, source: Path, place: Path, threads: tuple[str, ...]) -> str:
    """Compile and link to `place`, which is there whole or not at all. What went wrong, or nothing."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made, linked = Path(folder, "made.o"), Path(folder, "made.so")
        for command in (
            [compiler, *_FLAGS, *threads, "-I", str(_HEADERS), "-c", str(source), "-o", str(made)],
            [compiler, "-shared", str(made), "-o", str(linked)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
            except subprocess.TimeoutExpired:
                return f"it took more than {_SECONDS} seconds"
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["it failed"])[0]
        os.replace(linked, place)
    return ""


def _processor() -> str:
    """What this processor can do: a library made for another one may not run here."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
