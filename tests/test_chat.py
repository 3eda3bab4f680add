"""A conversation: what turns share of the cache, what is kept of answers, and the command at a terminal and in a pipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import TEMPLATE, engine, tiny

import longspec.engine
from longspec.cache import CACHES
from longspec.conversation import Conversation, cache_path
from longspec.engine import Engine
from longspec.errors import UsageError
from longspec.feed import Feed
from longspec.model.load import Model
from longspec.text import Vocabulary, encode

QUESTIONS = ["AbCdEf" * 25, "what is it", "AbCdEf" * 12 + "?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


def talk(made: Engine, questions: list[str], **settings: Any) -> Conversation:
    conversation = Conversation(made, system="Be", max_new_tokens=40, **settings)
    for question in questions:
        assert "".join(conversation.stream(question)) == conversation.messages[-1]["content"]
    return conversation


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of the text that each pass has fed, drafts left out."""
    counts: list[int] = []

    def run(feeds: list[Feed], decoder: Any) -> Any:
        counts.append(sum(len(feed.lacking) for feed in feeds))
        return longspec.feed.run(feeds, decoder)

    monkeypatch.setattr(longspec.engine, "run", run)
    return counts


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_kept_cache_changes_no_text(model: Model, kind: str, settings: dict[str, Any]) -> None:
    made = engine(model, "ngram", cache=kind)
    conversation = talk(made, QUESTIONS, **settings)
    session = conversation.session
    assert session is not None
    anew = made.open(conversation.messages[:-1], max_new_tokens=40, **settings)
    for _ in made.write(anew):
        pass
    assert anew.tokens == session.tokens
    assert (anew.cached, anew.text) == (0, conversation.messages[-1]["content"])
    assert session.cached > 150


@pytest.mark.parametrize("kind", CACHES)
def test_only_what_is_new_is_fed(model: Model, kind: str, fed: list[int]) -> None:
    made = engine(model, cache=kind)
    conversation = talk(made, QUESTIONS[:2])
    earlier = conversation.session
    assert earlier is not None
    rows = earlier.cache.length
    fed.clear()
    session = conversation.ask("third")
    for _ in made.write(session):
        pass
    assert session.cached == rows == len(earlier.tokens) - 1
    new = session.prompt_length - rows
    assert new == len("third") + 1 + 2  # the last answer's last token, and two letters for the roles
    assert sum(fed) == new + len(session.answer) - 1
