"""The machine: its processors, what a container allows of them, and the user's folders."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longspec.machine import system as machine


@pytest.mark.parametrize(
    ("said", "allowed"),
    [("max 100000", None), ("400000 100000", 4), ("150000 100000", 2), ("5000 100000", 1), ("", None), ("0 0", None)],
)
def test_a_quota_is_whole_processors(said: str, allowed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_lines", lambda path: [said] if path.endswith("cpu.max") else [])
    assert machine.quota() == allowed


def test_what_the_machine_has() -> None:
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert machine.processor()
    assert machine.total_bytes() >= machine.available_bytes() > 0


@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_waiting_threads_sleep_soon(environment: dict[str, str], spins: str) -> None:
    """Torch reads it when it is loaded, which nothing else of the package may do before."""
    script = "import sys, os, longspec; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", script], env=kept | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [spins, "False"]


def test_the_users_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, folder in (
        ("CACHE", machine.cache_folder),
        ("CONFIG", machine.config_folder),
        ("STATE", machine.state_folder),
    ):
        monkeypatch.setenv(f"XDG_{name}_HOME", "/somewhere")
        assert str(folder()) == "/somewhere/longspec"
        monkeypatch.setenv(f"XDG_{name}_HOME", "not/absolute")
        assert folder().is_relative_to(os.path.expanduser("~"))
