"""`longspec doctor`: this machine's hardware and software, with longspec's use of each and the reasons against it.

It reports and changes nothing. Anything missing or broken is a line of the report, never an error.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from longspec import __version__
from longspec.cli.options.groups import Only
from longspec.cli.options.reporting import Reporting
from longspec.cli.options.settings import config_path
from longspec.errors import LongspecError
from longspec.machine.system import cores, processor, quota, total_bytes
from longspec.methods import options

__all__ = ["EPILOG", "doctor"]

EPILOG = """\b
The report goes to stdout and the exit code is 0: it is an answer, not a verdict.
"""

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "gguf", "typer", "rich", "numpy")


def doctor(reporting: Annotated[Reporting, Only("as_json")]) -> None:
    """Show what this machine has, and what longspec uses of it."""
    report = {
        "versions": _versions(),
        "machine": _machine(),
        "torch": _torch(),
        "kernels": _kernels(),
        "attention": _attention(),
        "model": _model(),
        "methods": _methods(),
        "settings": _settings(),
    }
    if reporting.as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    for title, values in report.items():
        typer.echo(f"{title}:")
        width = max(map(len, values), default=0)
        for name, value in values.items():
            typer.echo(f"  {name.removesuffix('_bytes').replace('_', ' '):{width}}  {_shown(name, value)}".rstrip())


def _versions() -> dict[str, str | None]:
    return {
        "longspec": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # takes 15 ms, too long for every command's start

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    memory = _meminfo()
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "usable_cores": cores(),
        "core_quota": quota(),
        "memory_bytes": total_bytes(),
        "memory_read_mb_per_second": _memory_rate(),
        "available_bytes": memory.get("MemAvailable"),
        "limit_bytes": _memory_limit(),
    }


def _memory_rate() -> int | None:
    """How fast memory is read, which is what a token's weights are read at."""
    try:
        from longspec.machine.bandwidth import memory_rate

        rate = memory_rate()
    except (ImportError, OSError):  # torch says why, below
        return None
    return None if rate is None else round(rate / 1e6)


def _meminfo() -> dict[str, int]:
    """The fields of /proc/meminfo in bytes (the file has KiB)."""
    fields = [line.split() for line in _lines("/proc/meminfo")]
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) >= 2 and field[1].isdigit()}


def _memory_limit() -> int | None:
    """The container's memory limit."""
    for line in _lines("/sys/fs/cgroup/memory.max"):
        return int(line) if line.strip().isdigit() else None
    return None


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _torch() -> dict[str, Any]:
    try:
        import torch

        from longspec.model.load import choose_device
    except (ImportError, OSError) as error:
        return {"problem": f"torch can't be imported: {error}"}
    device = choose_device("auto")
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _kernels() -> dict[str, Any]:
    """The C kernels: the instructions that they were compiled for, or the reason why torch's operators run instead."""
    try:
        from longspec.kernels.build import library
        from longspec.kernels.isa import candidates
    except (ImportError, OSError) as error:
        return {"problem": f"the kernels need torch, which can't be imported: {error}"}
    named = candidates()
    found = {name: library(f"{name}.c") for name in ("layer", "attention", "sampler")}
    used = {name: f"not used: {built}" if isinstance(built, str) else "used" for name, built in found.items()}
    runs = named if isinstance(named, str) else ", ".join(name for name, _ in named)
    best = _instructions(found["layer"])
    return {"processor_runs": runs, "instructions": best, **used}


def _instructions(built: Any) -> str:
    """The set of instructions in a loaded library's name, which the build gave it."""
    if isinstance(built, str):
        return "none"
    from longspec.kernels.isa import ISAS

    words = Path(str(built._name)).stem.replace("-", "_").replace(".", "_").split("_")
    return next((name for name in ISAS if name in words), "unknown")


def _attention() -> dict[str, str]:
    """The attention backend in use, and the reasons against the others."""
    try:
        from longspec.attention import backends
    except (ImportError, OSError) as error:
        return {"problem": f"attention needs torch, which can't be imported: {error}"}
    return {name: f"{'used' if usable else 'not used'}: {reason}" for name, usable, reason in backends()}


def _model() -> dict[str, Any]:
    from longspec.model.files.hub import SHORT_NAMES, installed

    default = next(iter(SHORT_NAMES))
    try:
        model = next(model for model in installed() if model.name == default)
    except OSError as error:
        return {"name": default, "state": f"can't be read: {error}"}
    return {
        "name": default,
        "state": "here" if model.here else f"not here: longspec pull {default}, or the first longspec run, fetches it",
        "weights": model.format or "none",
        "disk_bytes": model.nbytes,
        "read_mb_per_second": _read_rate(),
        **(_run(default) if model.here else {}),
    }


def _run(model: str) -> dict[str, Any]:
    """What a run of the model multiplies where --dtype is left open, what a token reads then, and how many tokens a
    second that makes without drafts.
    """
    try:
        from longspec.machine.bandwidth import kept_rate
        from longspec.memory.forecast import forecast
        from longspec.memory.plan import choice, request_of
        from longspec.model.load import auto_dtype, open_model

        opened = open_model(model, offline=True)
        dtype, why = auto_dtype(opened.device, opened.checkpoint, opened.config, opened.fit)
        request = request_of(opened, None)
        told = forecast(request, choice(request, "dense", 512), kept_rate()).report()
    except (ImportError, OSError, LongspecError) as error:
        return {"run": f"can't be told: {error}"}
    rate = told["tokens_per_second"]
    return {
        "dtype": f"{dtype}, if --dtype is left open: {why}",
        "token_reads_mb": round(told["bytes_per_token"] / 1e6),
        "tokens_per_second": rate and round(rate),
    }


def _read_rate() -> int | None:
    """How fast the disk of the models is read, which is what weights on disk are written at."""
    from longspec.machine.disk import read_rate
    from longspec.model.files.store import models_folder

    files = [path for path in models_folder().rglob("*") if path.is_file()]
    rate = read_rate(max(files, key=lambda path: path.stat().st_size)) if files else None
    return None if rate is None else round(rate / 1e6)


def _methods() -> dict[str, list[str]]:
    """The methods of the literature that are here, by the option that asks for them."""
    return {option: [method.reference for method in methods] for option, methods in options().items()}


def _settings() -> dict[str, Any]:
    path = config_path()
    return {
        "config_file": str(path),
        "config_file_exists": path.is_file(),
        "environment": sorted(
            name for name in os.environ if name.startswith("LONGSPEC_") or name in ("HF_HOME", "HF_HUB_OFFLINE")
        ),
        "python": sys.executable,
    }


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none" if name.endswith(("_bytes", "_second", "_quota")) else "not installed"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return str(value)
