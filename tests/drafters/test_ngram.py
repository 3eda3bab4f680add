"""The n-gram drafter against a search through the whole text."""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import engine, prompts, tiny

from longspec.drafters.ngram import Automaton, Ngram
from longspec.types import Commit, Verdict

_TEXTS = st.lists(st.integers(0, 2), max_size=40) | st.lists(st.integers(0, 9), max_size=60)
_SETTINGS = settings(deadline=None, max_examples=200)


class _Session:
    key, long, cache, is_plain = "one", False, None, True

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    @property
    def unfed(self) -> list[int]:
        return self.tokens[-1:]

    def rank(self, logits: Any, paths: Any, count: int, vocabulary: Any = None) -> Any:
        raise NotImplementedError


@pytest.fixture
def exact_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context is counted and every follower looked at, as the search does."""
    monkeypatch.setattr("longspec.drafters.ngram._COUNTED", 10**6)
    monkeypatch.setattr("longspec.drafters.ngram._LOOKED_AT", 10**6)


def _automaton(text: Sequence[int]) -> Automaton:
    automaton = Automaton()
    for token in text:
        automaton.add(token)
    return automaton


def _after(text: list[int], context: list[int]) -> list[int]:
    """What followed each occurrence of the context, in the text's order."""
    m = len(context)
    return [text[i + m] for i in range(len(text) - m) if text[i : i + m] == context]


def _longest_match(text: list[int]) -> list[int]:
    return next(text[i:] for i in range(len(text) + 1) if i == len(text) or (i and _after(text, text[i:])))


def _bet(text: list[int], limit: int, floor: float) -> tuple[list[int], list[int]]:
    """The drafter's rule, by searching the text for every context."""
    tokens: list[int] = []
    parents: list[int] = []
    paths: list[tuple[float, int, int, int, list[int]]] = []
    pushed = 0
    chance, node, context = 1.0, -1, text
    while len(tokens) < limit:
        while context and not _after(text, context):
            context = context[1:]
        if context:
            after = _after(text, context)
            recent = list(dict.fromkeys(reversed(after)))
            for token in recent:
                times = len(_after(text, [*context, token])) or 1
                path = chance * min(times / (len(after) + 2 * len(recent) / len(context)), 1.0)
                pushed += 1
                if path >= floor:
                    paths.append((-path, pushed, token, node, [*context, token]))
        if not paths:
            break
        paths.sort()
        chance, _, token, parent, context = paths.pop(0)
        chance, node = -chance, len(tokens)
        tokens.append(token)
        parents.append(parent)
    return tokens, parents


@_SETTINGS
@given(_TEXTS)
def test_the_last_states_link_is_the_longest_suffix_that_was_there_before(text: list[int]) -> None:
    automaton = Automaton()
    for end in range(len(text) + 1):
        if end:
            automaton.add(text[end - 1])
        match = automaton.link[automaton.last]
        assert (automaton.length[match] if end else 0) == len(_longest_match(text[:end]))


@pytest.mark.usefixtures("exact_counts")
def test_followers_and_counts_are_those_of_a_search() -> None:
    @_SETTINGS
    @given(_TEXTS)
    def check(text: list[int]) -> None:
        automaton = _automaton(text)
        state, matched = automaton.link[automaton.last], _longest_match(text)
        while state > 0:
            after = _after(text, matched)
            assert automaton.times[state] == len(after)
            assert [*automaton.followers[state]] == [*dict.fromkeys(reversed(after))][::-1]
            state = automaton.link[state]
            matched = matched[len(matched) - automaton.length[state] :]

    check()


@pytest.mark.usefixtures("exact_counts")
def test_a_bet_is_that_of_a_search_through_the_text() -> None:
    @_SETTINGS
    @given(_TEXTS, st.integers(0, 12), st.sampled_from([0.0, 0.03, 0.1, 0.3]))
    def check(text: list[int], limit: int, floor: float) -> None:
        assert _automaton(text).bet(limit, floor)[:2] == _bet(text, limit, floor)

    check()


@_SETTINGS
@given(_TEXTS, st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.5]))
def test_a_bet_is_a_tree_of_what_the_text_held(text: list[int], limit: int, floor: float) -> None:
    tokens, parents = _automaton(text).bet(limit, floor)[:2]
    assert len(tokens) == len(parents) <= limit
    assert all(-1 <= parent < i for i, parent in enumerate(parents))
    assert len({*zip(tokens, parents, strict=True)}) == len(tokens)  # no two siblings are the same bet
    assert _automaton(text).bet(limit, floor)[:2] == (tokens, parents)
    if tokens:
        assert parents[0] == -1
        assert tokens[0] in _after(text, _longest_match(text))
    # A smaller limit gives the beginning of the same tree.
    assert _automaton(text).bet(limit // 2, floor)[:2] == (tokens[: limit // 2], parents[: limit // 2])


def test_a_long_match_is_drafted_to_the_limit_and_a_weak_one_is_not() -> None:
    phrase = list(range(100, 120))
    assert _automaton([*phrase, 1, 2, 3, *phrase[:8]]).bet(7, 0.1)[:2] == (phrase[8:15], [*range(-1, 6)])
    assert len(_automaton([*phrase, 1, 2, 3, phrase[5]]).bet(7, 0.1)[0]) < 4
    draw = random.Random(0)
    often = [token for _ in range(40) for token in (5, draw.randrange(1000, 9999))]
    assert _automaton([*often, 5]).bet(7, 0.1)[:2] == ([], [])


def test_where_the_text_disagreed_the_draft_branches_and_the_frequent_one_leads() -> None:
    a, b = [7, 8, 9, 1, 2], [7, 8, 9, 3, 4]
    tokens, parents = _automaton([*a, 50, *a, 51, *b, 52, 7, 8, 9]).bet(7, 0.05)[:2]
    assert [(tokens[i], parents[i]) for i in range(2)] == [(1, -1), (2, 0)]
    assert (3, -1) in zip(tokens, parents, strict=True)
    tokens, _ = _automaton([*a, 50, *b, 52, 7, 8, 9]).bet(1, 0.05)[:2]
    assert tokens == [3]  # of equals the most recent


def test_a_follower_counted_more_often_than_its_context_is_no_more_than_certain() -> None:
    automaton = _automaton([1, 1, 1, 1, 1, 1, 1, 1, 0, 1])
    context = automaton.link[automaton.last]
    assert automaton.times[automaton.followers[context][1]] >= automaton.times[context]
    assert (0, -1) in zip(*automaton.bet(7, 0.1)[:2], strict=True)


def test_a_loop_is_drafted_beyond_the_end_of_the_text() -> None:
    tokens, parents = _automaton([1, 2, 3] * 6).bet(12, 0.1)[:2]
    assert tokens == [1, 2, 3] * 4
    assert parents == [*range(-1, 11)]


class _CountedArray(array):  # type: ignore[type-arg]  # links, with a count of how often one is followed
    reads = 0

    def __getitem__(self, i: Any) -> Any:
        type(self).reads += 1
        return super().__getitem__(i)


class _CountedList(list[dict[int, int]]):
    reads = 0

    def __getitem__(self, i: Any) -> Any:
        type(self).reads += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("kind", ["words", "loop", "two letters"])
def test_a_token_and_a_bet_cost_the_same_in_a_long_text(kind: str) -> None:
    draw = random.Random(1)
    automaton = Automaton()
    automaton.link = _CountedArray("i", automaton.link)
    automaton.followers = _CountedList(automaton.followers)

    def steps() -> int:
        return _CountedArray.reads + _CountedList.reads

    adding, betting = [], []
    for i in range(20_000):
        token = {
            "words": int(draw.paretovariate(0.8)) % 5000,
            "loop": i % 7 if i % 1000 else 8,
            "two letters": draw.randrange(2),
        }[kind]
        before = steps()
        automaton.add(token)
        adding.append(steps() - before)
        if i % 20 == 0:
            before = steps()
            drafted = automaton.bet(8, 0.0)[0]
            betting.append(steps() - before)
            assert betting[-1] <= 2 * len(drafted) + 2
    first, last = adding[:2000], adding[-2000:]
    assert sum(last) / len(last) < 60
    assert sum(last) < 2 * sum(first)
    assert max(betting) <= 18


def test_drafts_follow_the_commits_of_their_own_session() -> None:
    drafter = Ngram()
    one, two = _Session([1, 2, 3, 4, 5, 6, 1, 2]), _Session([9, 8, 7, 9, 8, 7, 9])
    drafter.begin(one)
    drafter.begin(two)
    drafter.observe(one, Commit((3, 4), "", 0, 0), Verdict((), 4))
    first, second = drafter.propose([one, two], [2, 1])
    assert first.tokens.tolist() == [5, 6]
    assert first.parents.tolist() == [-1, 0]
    assert second.tokens.tolist() == [8]
    drafter.begin(one)  # again, from its prompt
    assert drafter.propose([one], [1])[0].tokens.tolist() == [3]


def test_a_session_that_is_gone_leaves_nothing() -> None:
    drafter = Ngram()
    session = _Session([1, 2, 1])
    drafter.begin(session)
    del session
    gc.collect()
    assert not drafter._texts


@_SETTINGS
@given(_TEXTS, st.lists(st.integers(0, 9), max_size=12))
def test_a_guess_behind_the_text_is_drafted_from_as_if_it_stood_there(text: list[int], guess: list[int]) -> None:
    """The longest suffix that was there before is the same; a guess that repeats itself isn't counted as text."""
    automaton = _automaton(text)
    state, matched = automaton.after(guess)
    whole = [*text, *guess]
    want = next(n for n in range(len(whole), -1, -1) if n == 0 or _holds(text, whole[-n:]))
    if guess:
        assert matched == want
        assert automaton.length[state] >= matched


def _holds(text: list[int], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


@pytest.mark.usefixtures("exact_counts")
def test_rows_and_kept_tokens_of_every_step_are_those_of_a_search(tmp_path: Path) -> None:
    """On texts that tiny models wrote: each step's draft by looking through the text, kept as far as the text went."""
    model = tiny(tmp_path)
    for prompt, limit in zip(prompts(3, 90), (4, 8, 15), strict=True):
        made = engine(model, Ngram(0.03), draft_tokens=limit)
        session = made.open(prompt, raw=True, max_new_tokens=50)
        commits = list(made.write(session))
        text, at = session.tokens, session.prompt_length
        for commit in commits:
            tokens, parents = _bet(text[:at], min(limit, session.limit - at - 1), 0.03)
            node, kept = -1, 0
            while (node, text[at + kept]) in (places := [*zip(parents, tokens, strict=True)]):
                node, kept = places.index((node, text[at + kept])), kept + 1
                if at + kept == len(text):
                    break
            assert (commit.drafted, commit.accepted) == (len(tokens), kept)
            at += kept + 1
