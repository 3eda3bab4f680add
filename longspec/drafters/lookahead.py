"""Bets on runs of tokens that the target itself was seen to continue, in guesses that are carried along.

Lookahead decoding (Fu et al., 2402.02057), training-free: beside the bets a pass carries a window of guessed tokens, W
columns of N - 1 tokens. What the target chooses after a column is the column's next guess (Jacobi iteration), and the
column with it is a run of N tokens that goes into a pool. Bets are the pool's runs that begin with the last token.

Window and bets are one draft, so that the step needs no second mask: the columns' first tokens are a chain, and the
rest of column j hangs behind its first token, at the depth where it would stand in the text. A window's node that turns
out right is kept like any other.

Takes committed tokens and verdicts; gives trees that are verified whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from longspec.errors import UsageError
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Lookahead"]


@dataclass(slots=True)
class _Guesses:
    """What one session carries along."""

    columns: list[list[int]]  # W of N - 1 tokens
    pool: dict[int, dict[tuple[int, ...], None]] = field(default_factory=dict)  # runs by first token, the newest last
    sent: int = 0  # nodes of the draft under way
    ends: list[int] = field(default_factory=list)  # its columns' last nodes


class Lookahead(Drafter):
    """window: W; length: N, tokens of a run; guesses: G, runs that are kept and bet on for one first token.

    A draft has (W + G) (N - 1) nodes at most. A smaller limit gives half to each, whole columns and runs only.
    """

    serves = False  # its drafts are more than bets, and must be verified as they are

    def __init__(self, window: int = 7, length: int = 4, guesses: int = 7) -> None:
        self.window = window
        self.length = length
        self.guesses = guesses
        self._carried: WeakKeyDictionary[Writing, _Guesses] = WeakKeyDictionary()

    @classmethod
    def make(
        cls, model: Any, inner: Drafter | None = None, *, window: int = 7, length: int = 4, guesses: int = 7
    ) -> Drafter:
        if window < 1 or length < 2 or guesses < 1:
            raise UsageError("lookahead takes a window and guesses of at least 1, and a length of at least 2.")
        return cls(window, length, guesses)

    def begin(self, session: Writing) -> None:
        """The first guesses are the prompt's own last tokens, again and again if it is short."""
        size = self.window + self.length - 2
        last = list(session.tokens[-size:])
        line = (last * (size // len(last) + 1))[:size]
        columns = [line[j : j + self.length - 1] for j in range(self.window)]
        self._carried[session] = _Guesses(columns)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        """`ahead` tokens are bet behind; the window then carries on from there."""
        return [
            self._draft(self._carried[session], (*session.tokens[-1:], *guess)[-1], limit)
            for session, limit, guess in zip(sessions, limits, ahead or [()] * len(sessions), strict=True)
        ]

    def _draft(self, carried: _Guesses, last: int, limit: int) -> Draft:
        branches = limit // (self.length - 1)
        runs = list(reversed(carried.pool.get(last, {})))[: min(self.guesses, branches // 2)]
        nodes: dict[tuple[int, int], int] = {}  # (parent, token) to node: what two branches begin with is one node
        tokens: list[int] = []
        parents: list[int] = []

        def grow(parent: int, path: Sequence[int]) -> int:
            for token in path:
                if (parent, token) not in nodes:
                    nodes[parent, token] = len(tokens)
                    tokens.append(token)
                    parents.append(parent)
                parent = nodes[parent, token]
            return parent

        for run in runs:
            grow(-1, run)
        first = -1
        carried.ends = []
        for column in carried.columns[: branches - len(runs)]:
            first = grow(first, column[:1])
            carried.ends.append(grow(first, column[1:]))
        carried.sent = len(tokens)
        return Draft.tree(tokens, parents, whole=True)

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        """The next guess of each column that was in the pass, and the run that it makes."""
        carried = self._carried[session]
        if carried.sent and len(verdict.choices) == carried.sent + 1:
            for j, end in enumerate(carried.ends):
                column, choice = carried.columns[j], verdict.choices[end + 1]
                runs = carried.pool.setdefault(column[0], {})
                run = (*column[1:], choice)
                runs.pop(run, None)
                runs[run] = None
                if len(runs) > self.guesses:
                    del runs[next(iter(runs))]
                carried.columns[j] = [*column[1:], choice]
        carried.sent = 0
