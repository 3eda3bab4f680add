"""The eye on real memory while texts grow: what `--memory` says is kept, by a smaller cache or by an earlier end.

Takes sessions between two passes. A plan is made from above, so this is for what it couldn't know: other texts beside
the planned one, a library that keeps more than it did when it was measured. Then, in this order:

    memory that is free already goes back to the system
    a dense cache becomes int8 or int4, if it was left to auto (the session's notes say so: its text may differ)
    the longest text ends, with what it has
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch

from longspec.cache import CACHES
from longspec.engine.session import Session
from longspec.errors import BudgetError
from longspec.machine.system import peak_bytes, resident_bytes, shown
from longspec.memory.plan import Plan
from longspec.model.load import DTYPES

__all__ = ["Watch"]

STEPS = 16
"""Between two looks: looking takes 20 microseconds, a step milliseconds."""


class Watch:
    """Keeps a plan's budget. `moves`: caches may become smaller ones. `is_read`: all weights are in memory already."""

    def __init__(self, plan: Plan, *, moves: bool, is_read: bool = False) -> None:
        self.plan = plan
        self.moves, self.is_read = moves, is_read
        self._steps = 0
        self._peak = peak_bytes()
        self._passing = 0  # what a pass was seen to take and to give back

    def used(self) -> int:
        device = self.plan.request.device
        return resident_bytes() if device.type == "cpu" else torch.cuda.memory_reserved(device)

    def after_chunk(self, session: Session, rows: int) -> None:
        """A prefill chunk is done, and the next has so many rows.

        Raises:
            BudgetError: it would not fit, and there is no answer yet to end with.
        """
        c, mapped = self.plan.request.config, self.plan.request.device.type == "cpu" and not self.is_read
        # The first step reads the pages of the head, which prefill leaves alone.
        head = c.vocabulary * c.width * DTYPES[self.plan.request.dtype].itemsize if mapped else 0
        self._learn()
        if not self._has_room([session], rows, head):
            raise BudgetError(
                f"The process has {shown(self.used())} after {session.cache.length:,} tokens of the prompt, and the "
                f"memory budget is {shown(self.plan.budget)}; give more memory, or a shorter prompt."
            )

    def after_step(self, sessions: Sequence[Session]) -> Session | None:
        """The session that has to end here; None, nearly always, where all may go on."""
        going = [session for session in sessions if session.finish_reason is None and session.error is None]
        self._steps += 1
        if self._steps % STEPS != 1 or not going:
            return None
        self._learn()
        if self._has_room(going, STEPS * (self.plan.request.draft_tokens + 1) * len(going)):
            return None
        longest = max(going, key=lambda session: session.cache.nbytes)
        longest.notes.append(
            f"the text ended after {len(longest.answer):,} tokens: the process has {shown(self.used())}, and the "
            f"memory budget is {shown(self.plan.budget)}"
        )
        return longest

    def _learn(self) -> None:
        """What the last pass took beyond what it left behind."""
        peak = peak_bytes()
        if peak > self._peak:
            self._peak, self._passing = peak, max(self._passing, peak - self.used())

    def _has_room(self, sessions: Sequence[Session], rows: int, more: int = 0) -> bool:
        """Whether so many more rows can't pass the budget, once what can be given up for it is given up."""
        if self._excess(rows, more) <= 0:
            return True
        _release()
        for session in sessions if self.moves else ():
            if (excess := self._excess(rows, more)) <= 0:
                return True
            if session.cache.can_become:
                self._shrink(session, excess)
                _release()
        self._peak = peak_bytes()  # what moving took is no pass's
        return self._excess(rows, more) <= 0

    def _excess(self, rows: int, more: int) -> int:
        """Beyond the budget: what there is, the rows, a layer that grows, and what a pass gives back."""
        shape = self.plan.request.shape
        coming = rows * shape.row_bytes + self.plan.choice.need.cache // shape.layers + more
        passing = self._passing if shape.device.type == "cpu" else 0
        return self.used() + coming + passing - self.plan.budget

    def _shrink(self, session: Session, excess: int) -> None:
        """Turn a cache into the largest kind that it can become and that gives `excess` bytes back, or the smallest."""
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


def _release() -> None:
    """Give the system what malloc keeps and nobody uses."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
