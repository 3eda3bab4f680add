"""The head that comes with longspec, on the model that it is for: no token may differ, and fewer passes are needed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from support.engines import engine, finish
from support.real import default, exact

from longspec.cache import CACHES
from longspec.engine.engine import Engine

pytestmark = pytest.mark.real

PROMPTS = [
    "A train leaves at 9:40 and arrives at 13:05. It stops for 12 minutes, twice. How long does it move?",
    "Write a polite e-mail that asks a neighbour to turn the music down after ten in the evening.",
    "Repeat this list three times: apple, pear, cherry, plum, quince, apricot.",
    "What are three ways to keep bread fresh?",
    "Translate into English: Der Hund schläft unter dem Tisch.",
    "Who wrote Faust, and when?",
    "Explain to a child why the moon doesn't fall down.",
    "Write a Python function that counts the words of a file.",
]
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 1}}


def written(made: Engine, prompts: list[str], new: int, **options: Any) -> tuple[list[list[int]], float]:
    """All side by side: their tokens, and tokens per step."""
    sessions = [made.open(prompt, key=prompt, max_new_tokens=new, **options) for prompt in prompts]
    texts = finish(made, sessions)
    steps = sum(session.stats.steps for session in sessions)
    return texts, sum(session.stats.committed for session in sessions) / steps


def _matrix() -> Iterator[Any]:
    """Every cache, way and drafter; the usual run has one that has something of each."""
    for kind, way, drafter in product(CACHES, ("greedy", "sampled"), ("clover2", "recycle+ngram+clover2")):
        usual = (kind, way, drafter) == ("int4", "sampled", "recycle+ngram+clover2")
        yield pytest.param(
            kind, WAYS[way], drafter, id=f"{kind}-{way}-{drafter}", marks=[] if usual else pytest.mark.full
        )


@pytest.mark.parametrize(("kind", "options", "drafter"), list(_matrix()))
def test_it_changes_no_token(kind: str, options: dict[str, Any], drafter: str) -> None:
    """1 and 8 texts at once."""
    model = exact()
    plain, _ = written(engine(model, cache=kind), PROMPTS, 14, **options)
    made = engine(model, drafter, cache=kind, draft_tokens=6)
    assert written(made, PROMPTS, 14, **options)[0] == plain
    for prompt, text in zip(PROMPTS[:2], plain, strict=False):
        assert written(made, [prompt], 14, **options)[0] == [text]


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.full), "int8"])
def test_a_step_brings_more_than_a_token(dtype: str) -> None:
    made = engine(default(dtype), "clover2", draft_tokens=6)
    assert written(made, PROMPTS, 64)[1] > 1.4


def test_auto_takes_it_where_it_pays() -> None:
    made = Engine(default("bf16"))
    assert list(made.speculator.drafters) == ["recycle+ngram+clover2"]
    held = made.generate("Say a word.", max_new_tokens=2).memory["drafter_bytes"]
    assert 40 << 20 < held < 90 << 20  # the head as it is and as codes, its tables, and what recycle keeps
    assert list(Engine(default("int8")).speculator.drafters) == ["recycle+ngram"]
