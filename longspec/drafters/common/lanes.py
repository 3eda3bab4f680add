"""Which tokens of a looped model are under way together, and which of them go on: LoopSpec's schedule (2609.17184).

Plain Python: takes the tokens that readouts name, gives lanes. Knows no model, no tensor and no cache.

A token on its way through the loops is a lane. In a cycle all lanes run `stride` loops, in one pass. The readout of a
lane after its first cycle names the token that probably comes next, which begins as a new lane at once; a second
readout, after `second` cycles of the lane, may name another one. The readout after the last loop decides: the lane of
the token that it names goes on with all that came of it, all other lanes end; where there is none, one begins.

SPEED (2310.12072) is this with one guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Lane", "Lanes", "Schedule"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """loops: that a token runs. stride: those of one cycle. second: the cycle of the second guess; None for one guess.

    Raises:
        ValueError: the loops aren't a number of strides, or a guess would come after the last loop.
    """

    loops: int
    stride: int = 1
    second: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.stride < self.loops or self.loops % self.stride:
            raise ValueError(
                f"{self.stride} loops a cycle don't divide the {self.loops} of a token into two cycles or more"
            )
        if self.second is not None and not 1 < self.second < self.cycles:
            raise ValueError(
                f"a second guess in cycle {self.second} isn't between the first and the last, {self.cycles}"
            )

    @property
    def cycles(self) -> int:
        """Of a token, from its first loop to its last."""
        return self.loops // self.stride

    @property
    def guesses(self) -> tuple[int, ...]:
        """The loops behind which a lane guesses."""
        return (self.stride,) if self.second is None else (self.stride, self.stride * self.second)

    @property
    def births(self) -> list[int]:
        """The most lanes that begin in each of a token's cycles, if every guess begins one: b_t = b_(t-1) + b_(t-X)."""
        births = [1]
        for cycle in range(1, self.cycles):
            earlier = births[cycle - self.second] if self.second is not None and cycle >= self.second else 0
            births.append(births[-1] + earlier)
        return births

    @property
    def most(self) -> int:
        """The most lanes at a time."""
        return sum(self.births)


@dataclass(slots=True, eq=False)
class Lane:
    """A token on its way through the loops; `parent` is the one before it, None for the text's last."""

    token: int
    parent: Lane | None = None
    depth: int = 0  # tokens behind the text
    done: int = 0  # loops
    guesses: list[int] = field(default_factory=list)

    @property
    def path(self) -> list[int]:
        """The tokens behind the text, up to its own."""
        return [] if self.parent is None else [*self.parent.path, self.token]

    def continues(self, other: Lane) -> bool:
        """Whether the other is this one or before it."""
        lane: Lane | None = self
        while lane is not None and lane.depth > other.depth:
            lane = lane.parent
        return lane is other


class Lanes:
    """The lanes of one text: `advance`, a pass over all of them, then `take`, in turns, until none is `live`.

    token: the text's last. most: how many tokens are to be chosen behind it. ends: tokens behind which nothing comes.
    """

    def __init__(self, schedule: Schedule, token: int, most: int, ends: Sequence[int] = ()) -> None:
        self.schedule = schedule
        self.most = most
        self.live = [Lane(token)] if most > 0 else []  # by age; the first is the one to be decided next
        self.finished: list[Lane] = []
        self.chosen: list[int] = []
        self._ends = frozenset(ends)

    def advance(self) -> list[Lane]:
        """A cycle of all live lanes; the ones to be read out behind it."""
        for lane in self.live:
            lane.done += self.schedule.stride
        return [lane for lane in self.live if lane.done in (*self.schedule.guesses, self.schedule.loops)]

    def take(self, readers: Sequence[Lane], tokens: Sequence[int]) -> None:
        """The token that each of them names. Lanes begin and end by it."""
        decided = None
        for lane, token in zip(readers, tokens, strict=True):
            if lane.done == self.schedule.loops:
                decided = token
            elif token not in lane.guesses:
                lane.guesses.append(token)
                if lane.depth + 1 < self.most and token not in self._ends:
                    self.live.append(Lane(token, lane, lane.depth + 1))
        if decided is not None:
            self._decide(decided)

    def _decide(self, token: int) -> None:
        """The oldest lane's next token."""
        oldest = self.live.pop(0)
        self.finished.append(oldest)
        self.chosen.append(token)
        if len(self.chosen) == self.most or token in self._ends:
            self.live = []
            return
        heir = next((lane for lane in self.live if lane.parent is oldest and lane.token == token), None)
        if heir is None:
            heir = Lane(token, oldest, oldest.depth + 1)
            self.live.append(heir)
        self.live = [lane for lane in self.live if lane.continues(heir)]
