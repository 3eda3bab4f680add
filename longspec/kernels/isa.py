"""Instruction sets that the kernels are compiled for, and which of them this processor has.

Takes what the system says of the processor; gives compiler flags. LONGSPEC_ISA names a lower one than the processor's
best. Results have the same bits with all of them (`dot.h`), but for AMX's denormals.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from itertools import combinations

__all__ = ["ISAS", "Isa", "candidates", "processor_features", "variants"]


@dataclass(frozen=True, slots=True)
class Isa:
    """A set of instructions, as `dot.h` tells them apart."""

    name: str
    needs: frozenset[str]  # as the system names what a processor has
    flags: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()  # what a processor may have besides, and its flag

    def flags_for(self, features: frozenset[str]) -> tuple[str, ...]:
        return (*self.flags, *(flag for feature, flag in self.more if feature in features))


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_HAS_AVX512 = frozenset({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"})

_X86 = (
    Isa(
        "amx",
        _HAS_AVX512 | {"avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
        (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-DISA_AMX"),
    ),
    Isa("avx512", _HAS_AVX512, _AVX512, (("avx512_vnni", "-mavx512vnni"),)),
    Isa("avx2", frozenset({"avx2", "fma", "f16c"}), _AVX2, (("avx_vnni", "-mavxvnni"),)),
    Isa("scalar", frozenset(), ()),
)
_ARM = (
    Isa("neon", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",)),
    Isa("scalar", frozenset(), ()),
)
_OTHER = (Isa("scalar", frozenset(), ()),)
ISAS = tuple(dict.fromkeys(each.name for each in (*_X86, *_ARM)))
"""Names that LONGSPEC_ISA may have."""


def candidates() -> list[tuple[str, tuple[str, ...]]] | str:
    """Names and compiler flags of what this processor runs, best first; a sentence where what LONGSPEC_ISA names is not
    among them. Named, it is the only one.
    """
    return _candidates(os.environ.get("LONGSPEC_ISA", ""))


@cache  # every call of a kernel asks
def _candidates(asked: str) -> list[tuple[str, tuple[str, ...]]] | str:
    features = processor_features()
    runs = [(isa.name, isa.flags_for(features)) for isa in _known(platform.machine()) if isa.needs <= features]
    if not asked:
        return runs
    if asked not in ISAS:
        return f"LONGSPEC_ISA is {asked}, which is none of {', '.join(ISAS)}"
    named = [each for each in runs if each[0] == asked]
    return (
        named or f"LONGSPEC_ISA is {asked}, which this processor doesn't have: it has {', '.join(n for n, _ in runs)}"
    )


def variants(machine: str) -> list[tuple[str, ...]]:
    """Compiler flags of everything that `candidates` can ask for on processors of this kind (as uname names it)."""
    found = []
    for isa in _known(machine):
        more = [frozenset(each) for n in range(len(isa.more) + 1) for each in combinations(dict(isa.more), n)]
        found += [isa.flags_for(features) for features in more]
    return found


def _known(machine: str) -> tuple[Isa, ...]:
    machine = machine.lower()
    return _X86 if machine in ("x86_64", "amd64") else _ARM if machine in ("aarch64", "arm64") else _OTHER


@cache
def processor_features() -> frozenset[str]:
    """What the processor has, by Linux' names."""
    if sys.platform == "darwin":
        return _of_a_mac()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            line = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        line = ""
    return frozenset(line.partition(":")[2].split())


def _of_a_mac() -> frozenset[str]:
    if platform.machine() == "arm64":  # all of Apple's have it
        return frozenset({"asimddp"})
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(done.stdout.lower().split())
