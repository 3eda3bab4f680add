"""The memory guard: holds the process within `--memory` while sequences grow, by a smaller cache or by ending one.

Takes sessions between two passes. A plan is an upper estimate, so the guard is for what it couldn't know: sequences
beside the planned one, or a library that keeps more than was measured. Its measures, in this order:

    let go of finished texts' rows that were kept for prompts to come, and return free heap memory to the system
    let go of drafters that rest, as nothing that they drafted paid (noted; the text is the same without them)
    convert a dense cache to int8 or int4, if the cache was left to auto (noted in the session: its output may differ)
    end the longest sequence, with the answer so far
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence

import torch

from longspec.cache import CACHES
from longspec.engine.session import Session
from longspec.errors import BudgetError
from longspec.machine.system import peak_bytes, resident_bytes, shown
from longspec.memory.plan import Plan
from longspec.model.load import DTYPES

__all__ = ["Watch", "release"]

STEPS = 16
"""Between two looks: looking takes 20 microseconds, a step milliseconds."""


class Watch:
    """Holds a plan's budget. moves: caches may be converted. is_read: all weight pages are resident already."""

    def __init__(self, plan: Plan, *, moves: bool, is_read: bool = False) -> None:
        self.plan = plan
        self.moves, self.is_read = moves, is_read
        self.let_go: Callable[[], bool] = lambda: False  # frees rows that nobody is writing behind, if there are any
        self.give_back: Callable[[], str | None] = lambda: None  # lets go of a drafter that rests; its name
        self._steps = 0
        self._peak = peak_bytes()
        self._passing = 0  # bytes that a pass was seen to allocate and to free again

    def used(self) -> int:
        device = self.plan.request.device
        return resident_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)

    def after_chunk(self, session: Session, rows: int) -> None:
        """Check the budget after a prefill chunk, before the next one of `rows` tokens.

        Raises:
            BudgetError: it would not fit, and there is no answer yet to end with.
        """
        c, mapped = self.plan.request.config, self.plan.request.device.type == "cpu" and not self.is_read
        # The first step touches the LM head's pages, which prefill doesn't.
        head = c.vocabulary * c.width * DTYPES[self.plan.request.dtype].itemsize if mapped else 0
        self._learn()
        if not self._has_room([session], rows, head):
            raise BudgetError(
                f"The process has {shown(self.used())} after {session.cache.length:,} tokens of the prompt, and the "
                f"memory budget is {shown(self.plan.budget)}; give more memory, or a shorter prompt."
            )

    def after_step(self, sessions: Sequence[Session]) -> Session | None:
        """The session that must end for the others to fit; None where all fit."""
        going = [session for session in sessions if session.finish_reason is None and session.error is None]
        self._steps += 1
        if self._steps % STEPS != 1 or not going:
            return None
        self._learn()
        if self._has_room(going, STEPS * (self.plan.choice.draft_tokens + 1) * len(going)):
            return None
        longest = max(going, key=lambda session: session.cache.nbytes)
        longest.notes.append(
            f"the text ended after {len(longest.answer):,} tokens: the process has {shown(self.used())}, and the "
            f"memory budget is {shown(self.plan.budget)}"
        )
        return longest

    def _learn(self) -> None:
        """Update the estimate of the bytes that a pass allocates temporarily."""
        peak = peak_bytes()
        if peak > self._peak:
            self._peak, self._passing = peak, max(self._passing, peak - self.used())

    def _has_room(self, sessions: Sequence[Session], rows: int, more: int = 0) -> bool:
        """Whether `rows` more tokens fit the budget, after freeing what may be freed."""
        if self._excess(rows, more) <= 0:
            return True
        release()
        while self._excess(rows, more) > 0 and self.let_go():
            release()
        while self._excess(rows, more) > 0 and (gone := self.give_back()) is not None:
            release()
            for session in sessions:
                session.notes.append(
                    f"{gone} drafts no more: nothing paid, and its memory was needed to stay below "
                    f"{shown(self.plan.budget)}"
                )
        for session in sessions if self.moves else ():
            if (excess := self._excess(rows, more)) <= 0:
                return True
            if session.cache.can_become:
                self._shrink(session, excess)
                release()
        self._peak = peak_bytes()  # memory used by the conversion isn't a pass's
        return self._excess(rows, more) <= 0

    def _excess(self, rows: int, more: int) -> int:
        """Bytes beyond the budget: resident memory, the new rows, a layer that is reallocated, and a pass's temporary
        bytes.
        """
        shape = self.plan.request.shape
        coming = rows * shape.row_bytes + self.plan.choice.need.cache // max(shape.layers, 1) + more
        passing = self._passing if shape.device.type == "cpu" else 0
        return self.used() + coming + passing - self.plan.budget

    def _shrink(self, session: Session, excess: int) -> None:
        """Convert a cache to the largest kind that frees `excess` bytes, or else to the smallest."""
        old = session.cache
        nbytes, length = old.nbytes, old.length
        for name in old.can_become:
            smaller = CACHES[name](self.plan.request.shape)
            if nbytes - smaller.room(length).device >= excess:
                break
        smaller.take_rows(old)
        session.cache, session.cache_name = smaller, name
        session.notes.append(
            f"the cache became {name} after {len(session.tokens):,} tokens, to stay below "
            f"{shown(self.plan.budget)}: the text may differ from dense's"
        )


def release() -> None:
    """Return malloc's unused memory to the system."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
