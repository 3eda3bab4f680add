"""Recycled candidates: the table holds what the target last found likely, and trees follow it by their probs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.engines import engine, prompts, tiny

from longspec.drafters.token_recycling import SUCCESSORS, Recycle
from longspec.model.load import Model
from longspec.sampling.sampler import likeliest
from longspec.types import Commit, Verdict, Writing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("rows", "size", "count"), [(1, 49152, 8), (5, 640, 8), (3, 100, 8), (4, 512, 8), (2, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_likeliest_are_those_of_topk(
    rows: int, size: int, count: int, dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("longspec.sampling.sampler.library", lambda source: "none")
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = likeliest(logits, count)
    values = logits.topk(min(count, size)).values
    assert torch.equal(logits.gather(1, found), values)  # of equal ones, either
    assert all(len(set(row)) == len(row) for row in found.tolist())
    assert torch.equal(logits.gather(1, likeliest(logits, 1)), values[:, :1])


def test_a_verdict_tells_what_is_likely_after_each_row(model: Model) -> None:
    made = engine(model, "recycle")
    [drafter] = made.speculator.drafters.values()
    seen = []
    observe = drafter.observe

    def watched(session: Writing, commit: Commit, verdict: Verdict) -> None:
        seen.append((commit, verdict))
        observe(session, commit, verdict)

    drafter.observe = watched  # type: ignore[method-assign]
    made.generate(prompts(1, 40)[0], raw=True, max_new_tokens=24)
    for commit, verdict in seen:
        assert len(verdict.successors) == 1 + commit.drafted == len(verdict.choices)
        for (_, likely), choice in zip(verdict.successors, verdict.choices, strict=True):
            assert likely[0] == choice
            assert len(likely) == SUCCESSORS


def test_a_tree_follows_the_table_best_paths_first(model: Model) -> None:
    drafter = Recycle(50)
    session = engine(model).open("ABC", raw=True)
    last = session.tokens[-1]
    rows = [(last, range(10, 18)), (10, range(20, 28)), (11, range(30, 38))]
    drafter.observe(session, Commit((last,), "", 0, 0), Verdict((), last, (), rows))
    [draft] = drafter.propose([session], [12])
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    assert tokens[0] == 10
    for token, parent in zip(tokens, parents, strict=True):
        before = last if parent < 0 else tokens[parent]
        assert token in dict(rows)[before]
    assert draft.probs is not None
    assert all(a >= b for a, b in pairwise(draft.probs.tolist()))
    assert [len(d) for d in drafter.propose([session, session], [0, 5])] == [0, 5]


def test_nothing_is_bet_on_what_was_never_seen(model: Model) -> None:
    session = engine(model).open("ABC", raw=True)
    assert [len(draft) for draft in Recycle(50).propose([session], [12])] == [0]


def test_ranks_learn_how_often_they_are_right(model: Model) -> None:
    drafter = Recycle(50)
    session = engine(model).open("ABC", raw=True)
    for _ in range(1000):  # token 3 is always followed by what stands third
        session.tokens += [3, 12]
        drafter.observe(session, Commit((3, 12), "", 0, 0), Verdict((), 12, (), [(3, range(10, 18)), (12, range(8))]))
    session.tokens.append(3)
    [draft] = drafter.propose([session], [3])
    assert draft.tokens[0] == 12
    assert draft.probs is not None
    assert draft.probs[0] > 0.4  # every other token is followed by 3, whose rank is another


def test_over_another_drafter_its_bets_come_first(model: Model) -> None:
    prompt = prompts(1, 200)[0]
    plain = engine(model).generate(prompt, raw=True, max_new_tokens=60)
    steps = {}
    for name in ("ngram", "recycle", "recycle+ngram", "ngram+recycle"):
        answer = engine(model, name).generate(prompt, raw=True, max_new_tokens=60)
        assert answer.tokens == plain.tokens
        steps[name] = answer.speculation["steps"]
    assert steps["recycle+ngram"] <= min(steps["ngram"], steps["recycle"])
    assert steps["ngram+recycle"] < steps["ngram"]  # it is told what the target found likely, beneath another too
