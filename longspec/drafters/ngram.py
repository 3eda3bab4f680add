"""Bets that the text goes on as it did before: what followed the longest suffix that it has written already.

Takes committed tokens and gives trees of tokens; knows no model, and needs no training. Every session has a suffix
automaton of its own text: a token costs about 2 microseconds and 400 bytes, a draft some tens of microseconds,
at any length of the text.
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

# How many suffixes of the text, the longest first, a new token is counted for. Drafts got no better from 2 on.
_COUNTED = 4
# How many followers of one context are looked at, the most recent first. 4 lost 0.5% of the tokens, 64 gained 0.1%.
_LOOKED_AT = 8


class Automaton:
    """All substrings of a text, and what followed them (the suffix automaton of Blumer et al., grown at its end).

    A state stands for the substrings that end at the same places, and `length` is that of the longest of them; `link`
    names the state of its longest suffix that ends elsewhere too. So the last state's link is the longest suffix of the
    text that was there before. State 0 is the empty substring, and has link -1.
    """

    def __init__(self) -> None:
        self.last = 0
        self.length = array("i", [0])
        self.link = array("i", [-1])
        self.times = array("i", [0])  # how often something followed, for all but the shortest suffixes
        self.followers: list[dict[int, int]] = [{}]  # token to state, the most recent follower last

    def add(self, token: int) -> None:
        """The text is one token longer, in constant time on average."""
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
        """Gives the substrings up to `state` and `token` a state apart from the longer ones, which don't end here."""
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
        """The state of the longest suffix that was there before, if these tokens followed the text; and its length."""
        state, matched = self.last, self.length[self.last]
        for token in tokens:
            while state != -1 and token not in self.followers[state]:
                state = self.link[state]
                matched = self.length[state] if state >= 0 else -1
            state, matched = (self.followers[state][token], matched + 1) if state >= 0 else (0, 0)
        return state, matched

    def bet(self, limit: int, floor: float, ahead: Sequence[int] = ()) -> tuple[list[int], list[int], list[float]]:
        """The most probable continuations of the text, and of the tokens `ahead` behind it: at most `limit` tokens,
        their parents and the probabilities of their paths, the likeliest first.

        After a context of m tokens that was followed n times, by d different tokens, one that followed c times is
        taken to come with probability c / (n + 2d / m): measured on the default model's answers, a single earlier
        occurrence is right in 35% of the cases after 1 token, 56% after 2, 80% after 8. A path that is less
        probable than `floor` isn't drafted.
        """
        tokens: list[int] = []
        parents: list[int] = []
        probs: list[float] = []
        paths: list[tuple[float, int, int, int, int, int]] = []  # the tree's possible next leaves, a heap
        pushed = 0
        chance, node, (state, matched) = 1.0, -1, self.after(ahead)
        while len(tokens) < limit:
            if state == self.last:  # nothing followed it yet
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

    `floor` is the least probability of being kept that is worth a row: best is the cost of a row in passes times the
    tokens per step. Measured, a tenth is best at 4% of a pass for a row, and within 3% of the best from 1% to 10%.
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
