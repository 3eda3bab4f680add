"""The frozen values that pass between the seams, and the protocols at them.

Letters used throughout: n draft tokens, r token positions of a pass (rows), L committed rows of a cache, V vocabulary
size. Nothing here computes more than a sum; nothing here knows a model, a cache or a drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from longspec.calls.call import CallPart

__all__ = [
    "Begun",
    "Commit",
    "Draft",
    "Drafter",
    "FinishReason",
    "Needs",
    "Stats",
    "TokenLogprob",
    "Verdict",
    "Writing",
]

FinishReason = Literal["stop", "length", "loop", "interrupted"]


@dataclass(frozen=True, slots=True)
class Begun:
    """Positions that a drafter has run through the target's first layers, or all; the verification pass resumes there.

    They are the tokens that the cache lacks and the first ones of a draft that is a chain, in this order.
    """

    stage: Any  # a `longspec.cache.stage.Stage` with the positions' keys and values of those layers
    hidden: Tensor  # [b, width], each after its own number of layers
    layers: tuple[int, ...]  # [b], the layers run for each, never rising


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed next tokens: a tree, of which a chain is one.

    Token i continues token `parents[i]`; -1 is the committed sequence. A parent comes before its children.
    """

    tokens: Tensor  # [n] int64
    parents: Tensor  # [n] int64, parents[i] < i
    probs: Tensor | None = None  # [n] fp32: the drafter's probability that each is kept; falls along a path
    begun: Begun | None = None
    whole: bool = False  # atomic: verified uncut or not at all (other uses of its nodes, or costs already paid)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def first(self, nodes: int) -> Draft:
        """The draft of the first `nodes` nodes."""
        if nodes >= len(self):
            return self
        probs = None if self.probs is None else self.probs[:nodes]
        return Draft(self.tokens[:nodes], self.parents[:nodes], probs)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Draft:
        """A draft in which each token continues the one before it."""
        return cls.tree(tokens, range(-1, len(tokens) - 1)) if len(tokens) else _NOTHING

    @classmethod
    def tree(
        cls,
        tokens: Sequence[int],
        parents: Sequence[int],
        probs: Sequence[float] | None = None,
        *,
        whole: bool = False,
    ) -> Draft:
        return cls(
            torch.tensor(tokens, dtype=torch.int64),
            torch.tensor(parents, dtype=torch.int64),
            None if probs is None else torch.tensor(probs, dtype=torch.float32),
            whole=whole,
        )


_NOTHING = Draft.tree((), ())


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of an answer with its log-probability in nats, and those of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest first


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's verdict on a draft: the kept path, and the bonus token."""

    kept: tuple[int, ...]  # indices into the draft, root first
    bonus: int
    choices: tuple[int, ...] = field(default=(), compare=False)  # [n + 1]: the token after each node, the root first
    # The last token and each draft token, with the target's top-k tokens after it; for drafters that need them.
    successors: Sequence[tuple[int, Sequence[int]]] = field(default=(), compare=False)
    entropy: float | None = field(default=None, compare=False)  # of the bonus token's distribution, in nats
    logprobs: tuple[TokenLogprob, ...] = field(default=(), compare=False)  # of the kept tokens and the bonus, if asked
    meant: int = field(default=0, compare=False)  # of the kept tokens, how many stay for their meaning alone


@dataclass(frozen=True, slots=True)
class Commit:
    """The tokens that one step appends to one sequence.

    `tokens` are the kept tokens and the bonus, cut at the end of the answer; `text` is the text that is final now:
    whole characters that no stop string can remove. It can lag behind the tokens and catches up with the last commit.
    `thought`, `said` and `calls` are its parts, without the markers between them: reasoning, the answer itself, and the
    calls of tools.
    """

    tokens: tuple[int, ...]
    text: str
    drafted: int
    accepted: int  # kept tokens of the draft, before the cut
    finish_reason: FinishReason | None = None
    thought: str = ""
    said: str = ""
    calls: tuple[CallPart, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where the session asks for them

    def __add__(self, other: Commit) -> Commit:
        """Concatenate with a later commit of the same step."""
        joined = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "finish_reason")
        tokens, text, drafted, accepted, *rest = joined
        return Commit(tokens, text, drafted, accepted, other.finish_reason, *rest)


@dataclass(frozen=True, slots=True)
class Stats:
    """A sum of commits. A step is one target forward after the prefill."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    committed: int = 0
    steps_without_a_bet: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def of(cls, commit: Commit) -> Stats:
        return cls(1, commit.drafted, commit.accepted, len(commit.tokens), int(commit.drafted == 0))

    @property
    def tokens_per_step(self) -> float:
        """The papers' tau: committed tokens over steps."""
        return self.committed / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Writing(Protocol):
    """A drafter's view of a session; hashable, so that it can key the drafter's notes."""

    @property
    def key(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]: ...  # prompt and answer so far

    @property
    def long(self) -> bool: ...  # planned beyond a longrope model's original context

    @property
    def cache(self) -> Any: ...  # the target's `longspec.cache.stage.Cache`; a drafter may open stages, and drops them

    @property
    def unfed(self) -> Sequence[int]: ...  # the tokens that the cache lacks, at least one

    @property
    def is_plain(self) -> bool: ...  # decoding is a plain argmax, independent of the tokens before

    def rank(
        self, logits: Tensor, paths: Sequence[Sequence[int]], count: int, vocabulary: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The most probable next tokens, by logits [r, V], after the sequence and each of r paths of guessed tokens.

        The session's own sampling and noise decide. Returns tokens [r, count] and their probabilities [r, count],
        best first. vocabulary: the tokens [V] that the logits are of, rising; all of the target's, if left out.
        """
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Needs:
    """The outputs of a forward pass that a drafter or a control needs beside the verdict."""

    successors: int = 0  # top-k of the target after each verified position, in `Verdict.successors`
    layers: tuple[int, ...] = ()  # hidden states after so many of the target's layers, given to `Drafter.read`
    entropy: bool = False  # `Verdict.entropy`, which costs a pass over the logits

    def __or__(self, other: Needs) -> Needs:
        layers = tuple(sorted({*self.layers, *other.layers}))
        return Needs(max(self.successors, other.successors), layers, self.entropy or other.entropy)


class Drafter:
    """Proposes next tokens. It sees no token that the target hasn't committed, and can't change one.

    A subclass overrides `propose`, and other methods as needed. `make` is the constructor that the registry calls.
    """

    needs = Needs()
    takes_inner: ClassVar[bool] = False
    """Another drafter may draft for it: it may stand before a + in a drafter's name."""
    serves: ClassVar[bool] = True
    """It may draft for another, and stand behind a +."""

    inner: Drafter | None = None
    """Who drafts for it."""

    @classmethod
    def make(cls, model: Any, inner: Drafter | None = None) -> Drafter:
        """Make a drafter for a loaded target. A subclass's further keyword parameters are its options:
        `name:floor=0.1`.

        Raises:
            UsageError: an option is of no use, or doesn't fit the model.
        """
        return cls()

    @classmethod
    def planned_bytes(cls, target: Any) -> tuple[int, int]:
        """Bytes that it will need: once, and per sequence of `target.tokens` tokens.

        target: a `longspec.memory.plan.Request`, whose model isn't loaded. It is given the same options as `make`.
        """
        return 0, 500 * int(target.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights and tables, without those of its parts and its notes on sequences."""
        return 0

    @property
    def parts(self) -> Sequence[Drafter]:
        """The drafters that it wraps, one level down; the engine walks them."""
        return () if self.inner is None else (self.inner,)

    def begin(self, session: Writing) -> None:
        """A session was opened; its prompt is in `session.tokens`."""
        for part in self.parts:
            part.begin(session)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        """One draft per session, of at most `limits[i]` tokens each; an empty draft is valid.

        ahead: tokens that are assumed to follow the sequence, for a drafter inside another one; none, if left out.
        The draft continues them.
        """
        raise NotImplementedError

    def observe(self, session: Writing, commit: Commit, verdict: Verdict) -> None:
        """`commit` has been appended. The verdict is on the last draft that was verified, whichever drafter made it."""
        for part in self.parts:
            part.observe(session, commit, verdict)

    def read(self, session: Writing, features: Sequence[Tensor]) -> None:
        """Takes the target's hidden states, [m, width] for each of `needs.layers`, of the m positions just committed,
        before any norm.

        They are the last ones of `session.cache`, from the prompt's on; the token behind each is in `session.tokens`.
        Positions of a snapshot are never given. Called before `observe`; heavy work belongs in `propose`, whose time
        is measured.
        """
