"""Processors: what a container allows bounds the threads, and what the user says goes before."""

from __future__ import annotations

import os

import pytest

from longspec import machine
from longspec.cli import main


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
    ("quota", "own", "threads"), [(3, None, "3"), (3, "5", "5"), (8, None, None), (9, None, None), (None, None, None)]
)
def test_threads_are_as_many_as_a_container_allows(
    quota: int | None, own: str | None, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if own is None else {"OMP_NUM_THREADS": own}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(main, "quota", lambda: quota)
    monkeypatch.setattr(main, "cores", lambda: 8)
    main._set_threads()
    assert environment.get("OMP_NUM_THREADS") == threads
    assert environment["GOMP_SPINCOUNT"] == "10000"
