"""Texts written side by side, and the time that it takes once their prompts have been read.

Takes an engine and its open sessions; gives seconds. Knows no case and no contender.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from longspec.engine.engine import Engine
from longspec.engine.scheduler import Schedule
from longspec.engine.session import Session

__all__ = ["write_all"]


def write_all(engine: Engine, sessions: Sequence[Session], width: int) -> float:
    """Read all prompts, then write every answer to its end, `width` in a pass: the seconds of the writing.

    Raises the error of a session that fails: without its tokens the rate would be wrong.
    """
    schedule = Schedule(engine, width)
    for session in sessions:
        for _ in engine.prefill(session):
            pass
        schedule.add(session)
    began = perf_counter()
    while schedule:
        for _, event in schedule.step():
            if isinstance(event, Exception):
                raise event
    return perf_counter() - began
