"""The machine: memory in bytes (parsed sizes, the process's use, the available part), processors, and the user's
folders.

Knows no model. Every value is read from the system at the call; nothing heavy is imported, so that the command line
can parse a size before it loads anything.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from math import ceil
from pathlib import Path

from longspec.errors import UsageError

__all__ = [
    "available_bytes",
    "cache_folder",
    "config_folder",
    "cores",
    "has_large_pages",
    "parse_bytes",
    "peak_bytes",
    "processor",
    "quota",
    "resident_bytes",
    "shown",
    "state_folder",
    "total_bytes",
]

_UNITS = {
    "B": 1,
    **{f"{letter}B": 1000**i for i, letter in enumerate("kMGT", 1)},
    **{f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]i?B|B)?", re.ASCII)


def parse_bytes(text: str | int) -> int:
    """Bytes of a size such as 50MiB, 6GB, 1.5GiB, or a plain number of bytes.

    Raises:
        UsageError: it is none of these.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = match[2] or "B" if match else ""
    unit = "kB" if unit == "KB" else unit
    if match is None or unit not in _UNITS:
        raise UsageError(f"{text!r} is no size of memory; write bytes, or a number with a unit: 50MiB, 6GB, 1.5GiB.")
    nbytes = int(float(match[1]) * _UNITS[unit]) if "." in match[1] else int(match[1]) * _UNITS[unit]
    if nbytes < 1:
        raise UsageError(f"{text!r} is no memory at all; give the size that the process may have, such as 6GiB.")
    return nbytes


def shown(nbytes: float) -> str:
    """A size for display, rounded up: 36 bytes, 5 KiB, 612 MiB, 57.3 GiB."""
    if nbytes <= 2**20 - 2**10:
        count = ceil(nbytes)
        return f"{count:,} byte{'' if count == 1 else 's'}" if count < 2**10 else f"{ceil(count / 2**10):,} KiB"
    return f"{ceil(nbytes / 2**20):,} MiB" if nbytes < 10 * 2**30 else f"{ceil(nbytes / 2**30 * 10) / 10:,} GiB"


def resident_bytes() -> int:
    """The process's resident memory, mapped files' pages included. Takes some microseconds."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak is the nearest value available
        return peak_bytes()


def peak_bytes() -> int:
    """The process's peak resident memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that can be allocated without swapping, within the container's limit."""
    free = _field("/proc/meminfo", "MemAvailable:") * 1024
    if not free:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    limit = _number("/sys/fs/cgroup/memory.max")
    if limit is not None:
        used = _number("/sys/fs/cgroup/memory.current") or 0
        files = sum(_field("/sys/fs/cgroup/memory.stat", name) for name in ("active_file", "inactive_file"))
        free = min(free, max(0, limit - used + files))
    return free


def total_bytes() -> int:
    """The machine's physical memory, whatever the container's limit."""
    return _field("/proc/meminfo", "MemTotal:") * 1024 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def processor() -> str:
    """The processor's model name."""
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota() -> int | None:
    """The container's CPU quota in processors, rounded up; None without a quota."""
    for line in _lines("/sys/fs/cgroup/cpu.max"):
        words = line.split()
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):
            return ceil(int(words[0]) / int(words[1]))
    return None


def _field(path: str, name: str) -> int:
    for line in _lines(path):
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _number(path: str) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def has_large_pages() -> bool:
    """Whether the system gives 2 MiB pages on request (Linux: transparent huge pages)."""
    said = " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled"))
    return "[madvise]" in said or "[always]" in said


def cache_folder() -> Path:
    """The program's folder in the user's cache directory: XDG_CACHE_HOME, else ~/.cache."""
    return _users("XDG_CACHE_HOME", ".cache")


def config_folder() -> Path:
    """The program's folder in the user's config directory: XDG_CONFIG_HOME, else ~/.config."""
    return _users("XDG_CONFIG_HOME", ".config")


def state_folder() -> Path:
    """The program's folder for dispensable state such as histories: XDG_STATE_HOME, else ~/.local/state."""
    return _users("XDG_STATE_HOME", ".local/state")


def _users(name: str, usual: str) -> Path:
    """The program's folder below an XDG variable or its default; a relative path is ignored, as the XDG standard
    says.
    """
    base = os.environ.get(name, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / usual) / "longspec"
