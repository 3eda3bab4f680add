"""C sources of this package as libraries: built ones of a wheel, else compiled when first used and kept in the user's
cache; loaded by ctypes.

Takes a source file, gives the library or the reason why there is none; a caller then takes torch's operators instead.
A wheel for a kind of processor carries its sources' libraries in the folder `built` (docs/wheel.py). A name there says
by a digest what it was built from, so that one of other sources is never taken.
Plain C without torch's headers compiles in half a second (the sampler) to four, where torch's own loader of extensions
takes forty.

A library is compiled for one instruction set (`longspec.kernels.isa`), whose name is in its own. It is loaded only from
a folder that belongs to the user and that nobody else can write to, and if its bytes have the checksum in its name.

LONGSPEC_COMPILER names a compiler, which is taken even where a library is built; or it is `none`: nothing is compiled
or loaded then.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from longspec.kernels.isa import candidates
from longspec.machine.system import cache_folder

__all__ = ["BUILT", "FLAGS", "built_name", "library"]

FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-std=gnu11", "-pthread")
_FOLDER = Path(__file__).parent
BUILT = _FOLDER / "built"
"""Where a wheel has its libraries."""
_SECONDS = 120
"""A compiler that takes longer is given up on."""


def library(name: str | Path) -> ctypes.CDLL | str:
    """The library of a source file of this folder, or of one at a path, which may include headers of its folder and of
    this one; a sentence where it can't be had. It is for the best instructions of this processor, or what LONGSPEC_ISA
    names; a library says by its function `missing` where the system doesn't give leave to use them.
    """
    return _first(name, os.environ.get("LONGSPEC_ISA", ""))


@cache  # a pass asks eight times
def _first(name: str | Path, _asked: str) -> ctypes.CDLL | str:
    """The library for the first instruction set that it can be had for; else the first one's reason."""
    chosen = candidates()
    if isinstance(chosen, str):
        return chosen
    reasons = []
    for isa, flags in chosen:
        try:
            found = _loaded(_FOLDER / name, isa, flags)
        except _DistrustError as error:
            return str(error)
        if not isinstance(found, str) and hasattr(found, "missing") and found.missing():
            found = f"the system doesn't give leave to use {isa}"
        if not isinstance(found, str):
            return found
        reasons.append(found)
    return reasons[0]


def built_name(source: Path, flags: tuple[str, ...]) -> str:
    """What the library of a source file is called among the built ones: by its text, its headers and its flags."""
    return f"{source.stem}-{hashlib.sha256(_code(source) + repr(flags).encode()).hexdigest()[:20]}.so"


def _code(source: Path) -> bytes:
    headers = sorted({*_FOLDER.rglob("*.h"), *source.parent.glob("*.h")})
    return b"".join(file.read_bytes() for file in (source, *headers))


def _loaded(source: Path, isa: str, flags: tuple[str, ...]) -> ctypes.CDLL | str:
    name = os.environ.get("LONGSPEC_COMPILER", "")
    if name == "none":
        return "LONGSPEC_COMPILER is none"
    try:
        built = BUILT / built_name(source, flags)
        return ctypes.CDLL(str(built)) if built.exists() and not name else _compiled(source, isa, flags, name)
    except OSError as error:
        return f"{source.name} can't be built: {error}"


def _compiled(source: Path, isa: str, flags: tuple[str, ...], name: str) -> ctypes.CDLL | str:
    compiler = next(filter(None, map(shutil.which, (name,) if name else ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return f"no compiler named {name} was found" if name else "no C compiler (cc, gcc, clang) was found"
    flags = (*FLAGS, *flags)
    stamp = os.stat(compiler)
    words = repr((compiler, stamp.st_size, stamp.st_mtime_ns, flags, platform.machine())).encode()
    folder = cache_folder() / "kernels"
    known = f"{source.stem}-{isa}-{hashlib.sha256(_code(source) + words).hexdigest()[:20]}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_trust(folder)
    for place in sorted(folder.glob(f"{known}-*.so")):
        _check_trust(place)
        if place.stem == f"{known}-{_sum(place)}":
            with suppress(OSError):  # made for another system: it is made anew
                return ctypes.CDLL(str(place))
        else:
            print(f"longspec: the kernel library {place} is damaged, and is built anew", file=sys.stderr)
        place.unlink(missing_ok=True)
    built = _build([compiler, *flags], compiler, source, folder / known)
    return f"{compiler} can't build {source.name}: {built}" if isinstance(built, str) else ctypes.CDLL(str(built))


class _DistrustError(Exception):
    """What lies somewhere may have been put there by someone else."""


def _check_trust(path: Path) -> None:
    """Raises _DistrustError unless it belongs to the user, and nobody else can write to it."""
    status = path.stat()
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise _DistrustError(f"{path} belongs to another user: no kernel is loaded from it")
    if status.st_mode & 0o022:
        raise _DistrustError(f"others can write to {path}: no kernel is loaded from it (chmod go-w)")


def _sum(path: Path) -> str:
    """The checksum of a library, which its name ends with: one that was cut short would end the process at its first
    call (SIGBUS), so it is read before it is loaded.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _build(command: list[str], compiler: str, source: Path, name: Path) -> Path | str:
    """Compile and link to a file of this name, with its checksum, which is there whole or not at all. What went wrong
    else.
    """
    with tempfile.TemporaryDirectory(dir=name.parent) as folder:
        compiled, linked = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        for step in (
            [*command, "-I", str(_FOLDER), "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked), "-lm"],
        ):
            try:
                done = subprocess.run(step, capture_output=True, text=True, timeout=_SECONDS)  # noqa: S603
            except subprocess.TimeoutExpired:
                return f"it took more than {_SECONDS} seconds"
            if done.returncode:
                return (done.stderr.strip().splitlines() or ["it failed"])[0]
        linked.chmod(0o700)
        with linked.open("rb+") as file:
            os.fsync(file.fileno())
        place = name.with_name(f"{name.name}-{_sum(linked)}.so")
        os.replace(linked, place)
    return place
