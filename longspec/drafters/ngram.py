"""Prompt lookup: drafts the tokens that followed the longest earlier occurrence of the sequence's suffix.

Takes committed tokens and gives trees of tokens; knows no model, and needs no training. Every session has a suffix
automaton of its own sequence: adding a token takes constant time on average, and a draft's time doesn't depend on the
sequence's length.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

from longspec.drafters.common.merge import merged
from longspec.types import Commit, Draft, Drafter, Verdict, Writing

__all__ = ["Automaton", "Ngram"]

_COUNTED = 4  # suffixes of the sequence, the longest first, whose follower counts a new token updates
_LOOKED_AT = 8  # followers of one context that are considered, the most recent first


class Automaton:
    """Suffix automaton of a growing token sequence (Blumer et al.): all its substrings, and the tokens that followed.

    A state stands for the substrings with the same set of end positions. `length` is that of the longest of them;
    `link` is the state of its longest suffix that also ends elsewhere. So the last state's link is the longest suffix
    of the sequence that occurred before. State 0 is the empty substring, and has link -1.
    """

    def __init__(self) -> None:
        self.last = 0
        self.length = array("i", [0])
        self.link = array("i", [-1])
        self.times = array("i", [0])  # how often a token followed; only the `_COUNTED` longest suffixes are counted
        self.followers: list[dict[int, int]] = [{}]  # token to state, the most recent follower last

    def add(self, token: int) -> None:
        """Append a token, in constant time on average."""
        length, link, followers = self.length, self.link, self.followers
        state = self.last
        for _ in range(_COUNTED):
            if state <= 0:
                break
            self.times[state] += 1
            state = link[state]
        new = self._state(length[self.last] + 1, 0, 0, {})
        state = self.last
        while state != -1 and token not in followers[state]:
            followers[state][token] = new
            state = link[state]
        if state != -1:
            old = followers[state][token]
            if length[old] != length[state] + 1:
                old = self._split(old, state, token)
            link[new] = old
            for _ in range(_COUNTED):
                if state <= 0:
                    break
                followers[state][token] = followers[state].pop(token)
                state = link[state]
        self.last = new

    def _split(self, old: int, state: int, token: int) -> int:
        """Split `old` (the clone step): substrings up to `state` + `token` also end here, the longer ones don't."""
        length, link, followers = self.length, self.link, self.followers
        half = self._state(length[state] + 1, link[old], self.times[old], followers[old].copy())
        link[old] = half
        while state != -1 and followers[state].get(token) == old:
            followers[state][token] = half
            state = link[state]
        return half

    def _state(self, length: int, link: int, times: int, followers: dict[int, int]) -> int:
        self.length.append(length)
        self.link.append(link)
        self.times.append(times)
        self.followers.append(followers)
        return len(self.followers) - 1

    def after(self, tokens: Iterable[int]) -> tuple[int, int]:
        """State and length of the longest known suffix of the sequence followed by `tokens`, which aren't added."""
        state, matched = self.last, self.length[self.last]
        for token in tokens:
            while state != -1 and token not in self.followers[state]:
                state = self.link[state]
                matched = self.length[state] if state >= 0 else -1
            state, matched = (self.followers[state][token], matched + 1) if state >= 0 else (0, 0)
        return state, matched

    def bet(self, limit: int, floor: float, ahead: Sequence[int] = ()) -> tuple[list[int], list[int], list[float]]:
        """The most probable continuations of the sequence followed by `ahead`: at most `limit` tokens, their parents
        and their path probabilities, most probable first.

        After a context of m tokens that was followed n times, by d different tokens, the probability of a token that
        followed c times is estimated as c / (n + 2d / m), so that a longer context counts for more. Paths less
        probable than `floor` aren't drafted.
        """
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        paths: list[tuple[float, int, int, int, int, int]] = []  # the tree's possible next leaves, a heap
        pushed = 0
        chance, node, (state, matched) = 1.0, -1, self.after(ahead)
        while len(tokens) < limit:
            if state == self.last:  # the whole sequence has no follower yet
                state = self.link[state]
                matched = self.length[state]
            if state > 0:
                after = self.followers[state]
                total = self.times[state] + 2 * len(after) / matched
                for token in islice(reversed(after), _LOOKED_AT):
                    times = max(self.times[after[token]], 1)
                    path = chance * min(times / total, 1.0)
                    if path >= floor:
                        pushed += 1
                        heappush(paths, (-path, pushed, token, node, after[token], matched + 1))
            if not paths:
                break
            chance, _, token, parent, state, matched = heappop(paths)
            chance, node = -chance, len(tokens)
            tokens.append(token)
            parents.append(parent)
            probs.append(chance)
        return tokens, parents, probs


class Ngram(Drafter):
    """Drafts from the session's own prompt and answer.

    floor: least path probability that is worth a token position in verification. The best value is the position's
    cost, as a share of a forward pass, times the tokens per step.
    """

    takes_inner = True

    def __init__(self, floor: float = 0.03) -> None:
        self.floor = floor
        self._texts: WeakKeyDictionary[Writing, Automaton] = WeakKeyDictionary()

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None, *, floor: float = 0.03) -> Drafter:
        return merged(cls(floor), inner)

    def begin(self, session: Writing) -> None:
        self._texts[session] = text = Automaton()
        for token in session.tokens:
            text.add(token)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        return [
            Draft.tree(*self._texts[session].bet(limit, self.floor, guess))
            for session, limit, guess in zip(sessions, limits, ahead or [()] * len(sessions), strict=True)
        ]

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        text = self._texts[session]
        for token in commit.tokens:
            text.add(token)
