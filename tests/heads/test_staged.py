"""Heads that another drafter drafts for (staged speculation): the same chains in fewer passes, and the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support.engines import engine, finish, prompts, tiny
from support.heads import shaken, some

from longspec.drafters import WAYS, way_of
from longspec.drafters.ngram import Ngram
from longspec.drafters.spec import parse
from longspec.errors import UsageError
from longspec.heads import KINDS
from longspec.model.load import Model
from longspec.types import Draft, Drafter, Writing

SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 3}
STAGED = [kind for kind in KINDS if way_of(kind).takes_inner]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("target"), end_tokens=())


class Knowing(Drafter):
    """Drafts what it is told, from the depth on at which it is asked."""

    def __init__(self, chain: Sequence[int]) -> None:
        self.chain = list(chain)

    def propose(
        self, sessions: Sequence[Writing], limits: Sequence[int], ahead: Sequence[Sequence[int]] | None = None
    ) -> list[Draft]:
        guesses = ahead or [()] * len(sessions)
        return [Draft.chain(self.chain[len(guess) :][:limit]) for guess, limit in zip(guesses, limits, strict=True)]


def test_heads_with_a_pass_a_depth_take_one() -> None:
    """The others have the outputs of all depths from one pass: there is nothing to save."""
    assert sorted(STAGED) == ["clover", "clover2", "eagle3", "fastmtp"]
    assert [part.name for part in parse("clover2+ngram").parts] == ["clover2", "ngram"]
    assert {kind.takes_inner for kind in WAYS.values()} == {True, False}
    with pytest.raises(UsageError, match=r"medusa takes no other's drafts; .* model, mtp, clover, "):
        parse("medusa+ngram")


@pytest.mark.parametrize("kind", STAGED)
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("right", [0, 1, 3, 6], ids="{} right".format)
def test_an_inner_drafter_saves_passes_and_changes_no_chain(
    model: Model, kind: str, options: Any, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six tokens; the inner drafter knows the first ones, and is wrong about others. A pass has four rows."""
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_BREADTH", 1)
    inner = Knowing(())
    make: Any = way_of(kind)
    drafter = make(model, shaken(kind, model, depth=6, tokens=some(model)), inner)
    made = engine(model, drafter, draft_tokens=6)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=40, **options)
    for _ in made.prefill(session):
        pass
    for _ in range(4):
        made.step([session])
    passes, forward = [0], drafter.forward

    def counted(rows: Any) -> Any:
        passes[-1] += 1
        return forward(rows)

    drafter.forward = counted
    (alone,) = drafter.propose([session], [6])
    chain = alone.tokens.tolist()
    inner.chain = [*chain[:right], *((token + 1) % 64 for token in chain[right:])]
    passes.append(0)
    (staged,) = drafter.propose([session], [6])
    assert staged.tokens.tolist() == chain
    assert staged.parents.tolist() == alone.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert passes == [6, 2 if right == 6 else 6 - right]  # the first pass knows three of six, the second the fifth


@pytest.mark.parametrize("kind", STAGED)
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("texts", [1, 3])
def test_a_staged_head_never_changes_a_text(
    model: Model, kind: str, options: Any, texts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspec.drafters.common.tree_growth.HEAD_FLOOR", 0.0)
    make: Any = way_of(kind)
    written = []
    for drafter in ("none", make(model, shaken(kind, model, depth=4, tokens=some(model)), Ngram())):
        made = engine(model, drafter, draft_tokens=7)
        sessions = [
            made.open(prompt, raw=True, max_new_tokens=25, key=str(i), **options)
            for i, prompt in enumerate(prompts(texts, 70))
        ]
        written.append(finish(made, sessions))
    assert written[0] == written[1]
    assert sum(session.stats.drafted for session in sessions) > 40 * texts
