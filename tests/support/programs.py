"""C programs of the tests, compiled once for what they are made of and kept beside this user's kernels.

A change of a source, a header, the compiler or its flags makes another program.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longspec.kernels import build
from longspec.machine.system import cache_folder

KERNELS = Path(build.__file__).parent
FLAGS = [*(flag for flag in build.FLAGS if flag != "-fPIC"), "-I", str(KERNELS)]


def compiled(compiler: str, flags: Sequence[str], source: Path) -> Path:
    """The program, or with `-c` the object. Raises CalledProcessError with what the compiler says."""
    files = sorted({*KERNELS.rglob("*.[ch]"), *source.parent.glob("*.[ch]")})
    stamp = os.stat(compiler)
    made_of = (compiler, stamp.st_size, stamp.st_mtime_ns, *FLAGS, *flags, *((str(f), f.read_bytes()) for f in files))
    folder = cache_folder() / "tests"
    place = folder / f"{source.stem}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:20]}"
    if not place.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside, "made")
            command = [compiler, *FLAGS, *flags, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True)
            made.replace(place)  # there whole or not at all, whoever else compiles it
    return place
