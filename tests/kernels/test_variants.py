"""The kernels for all instruction sets: they compile, give the same bits, and touch no memory that isn't theirs.

What this processor has is run; ARM's under qemu where it and a cross compiler are there; the others are only compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.programs import KERNELS, compiled

from longspec.kernels import build, isa
from longspec.kernels.build import library

HERE = Path(__file__).parent
SOURCES = ["layer", "attention", "mixers"]
COMPILER = shutil.which("cc") or shutil.which("gcc") or ""
pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler was found")


def bits(source: str, flags: tuple[str, ...], compiler: str = COMPILER, under: tuple[str, ...] = ()) -> str:
    """By -O1 where the flags don't say otherwise: it compiles faster than -O2, and the bits must not depend on it."""
    program = compiled(compiler, ["-O1", *flags], HERE / f"bits_{source}.c")
    done = subprocess.run([*under, str(program)], capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain() -> dict[str, str]:
    return {source: bits(source, ()) for source in SOURCES}


@pytest.mark.parametrize("source", SOURCES)
def test_what_runs_here_gives_the_bits_of_plain_c(source: str, plain: dict[str, str]) -> None:
    runs = isa.candidates()
    assert not isinstance(runs, str)
    for name, flags in runs:
        # `scalar` is plain C; for AMX's tiles the system's leave is asked: test_exact_rows has it.
        if name not in ("scalar", "amx"):
            assert bits(source, ("-O2", *flags)) == plain[source], name


@pytest.mark.parametrize("source", SOURCES)
def test_tiles_give_the_bits_of_plain_c(source: str, plain: dict[str, str]) -> None:
    """AMX's forms with its tiles in C: they are run wherever there is AVX-512."""
    runs = isa.candidates()
    assert not isinstance(runs, str)
    flags = dict(runs).get("avx512")
    if flags is None or "-mavx512vnni" not in flags:
        pytest.skip("it takes AVX-512 with VNNI")
    emulated = ("-DISA_AMX", "-include", str(HERE / "emulated_tiles.h"))
    assert bits(source, (*flags, *emulated)) == plain[source]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("-march=armv8.2-a+dotprod",), id="dotprod"),
        pytest.param((), id="baseline", marks=pytest.mark.full),
    ],
)
def test_arm_gives_the_same_bits(source: str, flags: tuple[str, ...], plain: dict[str, str]) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("it takes gcc-aarch64-linux-gnu and qemu-user")
    got = bits(source, ("-static", *flags), compiler, (emulator, "-cpu", "max"))
    assert got == plain[source]


@pytest.mark.parametrize("source", SOURCES)
def test_no_memory_is_touched_that_is_not_theirs(
    source: str, tmp_path: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sanitizers of addresses and of undefined behaviour, in the best instructions of this processor."""
    known = isa.candidates()
    assert not isinstance(known, str), known
    runs = [flags for name, flags in known if name != "amx"]
    flags = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover", *runs[0])
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    if subprocess.run([COMPILER, *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("this compiler has no sanitizers")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    assert bits(source, flags) == plain[source]


@pytest.mark.parametrize("source", ["layer.c", "attention.c", "clover.c", "mixers.c"])
@pytest.mark.parametrize(
    "each", [isa._X86[0], isa.Isa("avx512 alone", frozenset(), isa._AVX512)], ids=lambda each: each.name
)
def test_they_compile_for_processors_that_are_not_here(source: str, each: isa.Isa) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("for x86-64")
    flags = each.flags_for(frozenset(feature for feature, _ in each.more))
    try:
        compiled(COMPILER, [*flags, "-Wall", "-Wextra", "-Werror", "-O1", "-c"], KERNELS / source)
    except subprocess.CalledProcessError as error:
        if "unrecognized" in error.stderr or "unknown argument" in error.stderr:
            pytest.skip(error.stderr.splitlines()[0])
        raise AssertionError(error.stderr) from error


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPEC_ISA", "avx9000")
    assert library("layer.c") == f"LONGSPEC_ISA is avx9000, which is none of {', '.join(isa.ISAS)}"
    monkeypatch.setenv("LONGSPEC_ISA", "neon" if os.uname().machine == "x86_64" else "avx2")
    assert "which this processor doesn't have" in str(library("layer.c"))


def test_nothing_is_loaded_from_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.c"
    source.write_text("int seven(void) { return 7; }")
    folder = tmp_path / "longspec" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert "others can write to" in str(library(source))
    assert not any(folder.iterdir())
    folder.chmod(0o700)
    build._first.cache_clear()
    assert not isinstance(library(source), str)
    (kernel,) = folder.glob("*.so")
    kernel.chmod(0o722)
    build._first.cache_clear()
    assert "others can write to" in str(library(source))
    kernel.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    build._first.cache_clear()
    assert "belongs to another user" in str(library(source))
