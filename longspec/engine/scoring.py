"""Log-probabilities of given answers: common prefixes are prefilled once, the remaining tokens run in one pass.

Takes an engine, and pairs of a prompt and an answer; gives a number for each. The answers are staged as a tree behind
the prompts' common prefix, like a draft, and dropped: nothing is committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch

from longspec.engine.engine import Engine
from longspec.engine.forward import Input, logits_of
from longspec.engine.session import Session
from longspec.text.prompt import Prompt, encode
from longspec.types import Draft

__all__ = ["score"]

_ROWS = 256
"""Of a pass: each has a row of logits."""


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
