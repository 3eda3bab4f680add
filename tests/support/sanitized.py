"""The C kernels as the sanitizers of addresses and of undefined behaviour build them, for a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SOURCES = sorted(path.name for path in (Path(__file__).parents[2] / "longspec" / "kernels").glob("*.c"))
_FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"


def sanitized(folder: Path) -> dict[str, str]:
    """Settings for a process whose kernels are built so, in a cache of its own; skips the test where no compiler can.

    The compiler is a script that adds the flags; the sanitizer's library must be loaded before Python's own.
    """
    found = shutil.which("gcc")
    if found is None:
        pytest.skip("there is no gcc here")
    library = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("this gcc has no sanitizer of addresses")
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\nexec {found} "$@" {_FLAGS}\n')
    script.chmod(0o700)
    settings = {
        "LONGSPEC_COMPILER": str(script),
        "LD_PRELOAD": str(Path(library).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    # Built now, which takes two minutes on two cores: a mutant has ten seconds.
    build = f"from longspec.kernels.build import library as l; print([l(name) for name in {_SOURCES}])"
    given = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, env=given)
    assert done.stdout.count("CDLL") == len(_SOURCES), (
        done.stdout + done.stderr
    )  # now, lest a mutant's ten seconds pay for it
    return settings
