"""Log-probabilities of given texts.

Of many short answers: common prefixes are prefilled once, the remaining tokens run in one pass, staged as a tree behind
the prompts' common prefix, like a draft, and dropped. Of texts of any length: block after block, which are committed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from longspec.cache.stage import BLOCK
from longspec.engine.forward import Input, logits_of
from longspec.engine.session import Session
from longspec.errors import ContextError, UsageError
from longspec.text.prompt import Prompt, encode
from longspec.types import Draft

if TYPE_CHECKING:
    from longspec.engine.engine import Engine

__all__ = ["Score", "score", "scores"]

_ROWS = 256
"""Of a pass: each has a row of logits."""


@dataclass(frozen=True, slots=True)
class Score:
    """A text's tokens, each with its log-probability in nats after all before it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.mean)


def scores(engine: Engine, texts: Sequence[str], prompt: Prompt | None = None) -> list[Score]:
    """As `Engine.score` says."""
    vocabulary, found = engine.model.vocabulary, []
    before = None if prompt is None else encode(vocabulary, prompt)
    for text in texts:
        tokens = vocabulary.encode(text, add_special=before is None)
        given = 1 if before is None else len(before)
        whole = [*(before or ()), *tokens]
        if len(whole) <= given:
            raise UsageError(f"The text {text[:40]!r} has no token to score; give a longer one, or a prompt before it.")
        if len(whole) > engine.context:
            raise ContextError(f"Text and prompt have {len(whole)} tokens; the model's context is {engine.context}.")
        session = engine.open(text if before is None else prompt or "", raw=before is None)
        session.tokens = whole
        found.append(Score(tuple(whole[given:]), tuple(_logprobs(engine, session))[given - 1 :]))
    return found


@torch.inference_mode()
def _logprobs(engine: Engine, session: Session) -> Iterator[float]:
    """The log-probability of each of the session's tokens but the first, with the rows committed block by block."""
    tokens = session.tokens
    for start in range(0, len(tokens) - 1, BLOCK):
        rows = tokens[start : min(start + BLOCK, len(tokens) - 1)]
        with engine.model.lock:
            staged = Input.of(session, rows[:1], Draft.chain(rows[1:]))
            log_probs = torch.log_softmax(logits_of([staged], engine.model.decoder).float(), -1)
            session.cache.commit(staged.stage, range(len(rows)))
        after = torch.tensor(tokens[start + 1 : start + 1 + len(rows)], device=log_probs.device)
        yield from log_probs.gather(1, after[:, None])[:, 0].tolist()


def score(engine: Engine, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
    """The mean log-probability of each answer's tokens after its prompt, in nats."""
    vocabulary = engine.model.vocabulary
    prompts = [encode(vocabulary, prompt) for prompt, _ in pairs]
    answers = [vocabulary.encode(answer, add_special=False) for _, answer in pairs]
    if not pairs:
        return []
    shortest = min(len(prompt) for prompt in prompts)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    shared = max(1, min(same, shortest))
    session = engine.open(pairs[0][0])
    while session.cache.length < shared - 1:
        engine.read(session, shared - 1)
    rest = [(prompt[shared:], answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return list(_scores(engine, session, prompts[0][shared - 1], rest))


@torch.inference_mode()
def _scores(
    engine: Engine, session: Session, last: int, rest: Sequence[tuple[list[int], list[int]]]
) -> Iterator[float]:
    """The scores of answers behind the session's cache. last: the token before each of `rest`, pairs of prompt rest
    and answer.
    """
    start = 0
    while start < len(rest):
        end, tokens, parents = start, list[int](), list[int]()
        while end < len(rest) and (end == start or len(tokens) + len(rest[end][0]) + len(rest[end][1]) <= _ROWS):
            own = [*rest[end][0], *rest[end][1]]
            parents += [-1, *range(len(tokens), len(tokens) + len(own) - 1)][: len(own)]
            tokens += own
            end += 1
        staged = Input.of(session, [last], Draft.tree(tokens, parents))
        with engine.model.lock:
            log_probs = torch.log_softmax(logits_of([staged], engine.model.decoder).float(), -1)
        # Token i is at row i + 1, as `last` is row 0; its log-probability is in its parent's row.
        chosen = log_probs[torch.tensor(parents) + 1, torch.tensor(tokens)].tolist()
        at = 0
        for before, answer in rest[start:end]:
            own = chosen[at + len(before) : at + len(before) + len(answer)]
            yield sum(own) / max(1, len(own))
            at += len(before) + len(answer)
        start = end
