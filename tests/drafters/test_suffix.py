"""Drafting from other texts: the corpus against a search, what is remembered and what isn't, trees laid over others."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import engine, prompts, tiny

from longspec.drafters.common import suffix_array as corpus_module
from longspec.drafters.common.answer_store import Outputs, forget, outputs_folder
from longspec.drafters.common.merge import laid_over
from longspec.drafters.common.suffix_array import Corpus
from longspec.drafters.suffix import MOST_NBYTES
from longspec.engine.options import Options
from longspec.errors import UsageError
from longspec.model.load import Model
from longspec.types import Draft

_TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=5)
_SETTINGS = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _followers(texts: Sequence[list[int]], context: list[int]) -> list[int | None]:
    """What followed each occurrence; None where a text ended with it."""
    found: list[int | None] = []
    for text in texts:
        for i in range(len(text) - len(context) + 1):
            if text[i : i + len(context)] == context:
                found.append(text[i + len(context)] if i + len(context) < len(text) else None)
    return found


def _searched(texts: Sequence[list[int]], end: list[int], limit: int, floor: float) -> dict[tuple[int, ...], float]:
    """Paths with their probs: the corpus's rule, by looking through the texts."""
    context = next((end[i:] for i in range(len(end)) if _followers(texts, end[i:])), [])
    paths: dict[tuple[int, ...], float] = {}
    leaves: list[tuple[float, tuple[int, ...]]] = []
    chance: float = 1.0
    path: tuple[int, ...] = ()
    while len(paths) < limit:
        if context:
            followers = _followers(texts, [*context, *path])
            known = [token for token in followers if token is not None]
            total = len(followers) + 2 * len({*followers}) / (len(context) + len(path))
            for token in {*known}:
                if (further := chance * known.count(token) / total) >= floor:
                    leaves.append((further, (*path, token)))
        if not leaves:
            break
        leaves.sort(key=lambda leaf: leaf[0])
        chance, path = leaves.pop()
        paths[path] = chance
    return paths


def _paths(tokens: Sequence[int], parents: Sequence[int], probs: Sequence[float]) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tokens, parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, probs, strict=True))


@_SETTINGS
@given(_TEXTS, st.lists(st.integers(0, 3), max_size=9), st.sampled_from([0.0, 0.05, 0.3]))
def test_a_bet_is_that_of_a_search(texts: list[list[int]], end: list[int], floor: float) -> None:
    found = _paths(*Corpus(texts).bet(end, 1000, floor))
    assert found == pytest.approx(_searched(texts, end, 1000, floor))


@_SETTINGS
@given(_TEXTS, st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(0, 8))
def test_a_smaller_limit_is_the_beginning_of_the_same_tree(texts: list[list[int]], end: list[int], limit: int) -> None:
    corpus = Corpus(texts)
    whole = corpus.bet(end, 50, 0.01)
    assert corpus.bet(end, limit, 0.01) == tuple(part[:limit] for part in whole)
    assert list(whole[2]) == sorted(whole[2], reverse=True)


def test_what_is_added_is_found_after_a_while() -> None:
    corpus = Corpus([list(range(100))])
    for _ in range(5):
        corpus.add([500, *range(501, 600)])
    assert corpus.bet([7, 520, 521], 3, 0.01)[0] == [522, 523, 524]
    assert corpus.bet([10, 11], 2, 0.01)[0] == [12, 13]


def test_a_corpus_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "MOST_TOKENS", 40)
    corpus = Corpus([list(range(100)), list(range(200, 230))])
    assert corpus.bet([203], 1, 0.01)[0] == [204]
    assert corpus.bet([3], 1, 0.01)[0] == []


@pytest.mark.parametrize("limit", [0, 1, 3, 9])
def test_trees_laid_over_each_other(limit: int) -> None:
    one = ([5, 6, 7], [-1, 0, -1], [0.6, 0.5, 0.1])
    other = ([5, 8, 7], [-1, 0, -1], [0.3, 0.2, 0.4])
    made = laid_over(Draft.tree(*one), Draft.tree(*other), limit)
    assert made.probs is not None
    assert made.tokens.tolist() == [5, 6, 7, 8][:limit]
    assert made.parents.tolist() == [-1, 0, -1, 0][:limit]
    assert made.probs.tolist() == pytest.approx([0.6, 0.5, 0.4, 0.2][:limit])


def test_a_text_that_a_file_holds_is_drafted_from_it(model: Model, tmp_path: Path) -> None:
    """The second file tells what the answer will be, from another prompt."""
    options = Options(raw=True, max_new_tokens=60)
    told = engine(model).generate(prompts(1, 30)[0], **options)
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("nothing of use")
    second.write_text(prompts(1, 30)[0] + told.text)
    made = engine(model, "suffix", options={"texts": [first, second]})
    answer = made.generate(prompts(1, 30)[0], **options)
    alone = engine(model, "suffix").generate(prompts(1, 30)[0], **options)
    assert answer.tokens == alone.tokens == told.tokens
    assert answer.speculation["steps"] <= 8 < alone.speculation["steps"]


def test_answers_are_remembered_only_if_asked(model: Model) -> None:
    options = Options(raw=True, max_new_tokens=40)
    for remember, kept in ((False, 0), (True, 2)):
        made = engine(model, "suffix", options={"remember": remember})
        for prompt in prompts(2, 40):
            made.generate(prompt, **options)
        assert len(list(outputs_folder().glob("*"))) == (1 if remember else 0)
        assert sum(len(list(_outputs(path))) for path in outputs_folder().glob("*")) == kept
    [path] = outputs_folder().glob("*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = engine(model, "suffix", options={"remember": True}).generate(prompts(1, 40)[0], **options)
    first = engine(model, "suffix").generate(prompts(1, 40)[0], **options)
    assert again.tokens == first.tokens
    assert again.speculation["steps"] < first.speculation["steps"]
    assert forget() > 0
    assert not outputs_folder().exists()
    assert forget() == 0


def _outputs(path: Path) -> Outputs:
    return Outputs(path.stem, 1 << 20)


def test_what_is_remembered_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspec.drafters.common.answer_store.MOST_TOKENS", 64)
    outputs = Outputs("name", 100)
    for i in range(50):
        outputs.add([i] * 7)
        assert outputs.path.stat().st_size <= 4 * 64 + 32
    assert [answer[0] for answer in outputs][-1] == 49


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", b"\xff" * 8, b"\0\0\0\0" * 3, b"\x05\0\0\0\xff\xff\xff\xff\x09", b"\x64\0\0\0\xff\xff\xff\xff"],
)
def test_a_damaged_file_is_read_as_far_as_it_makes_sense(data: bytes) -> None:
    outputs = Outputs("name", 100)
    outputs.path.parent.mkdir(parents=True)
    outputs.path.write_bytes(data)
    assert list(outputs) == ([[5]] if data.startswith(b"\x05") else [])
    outputs.add([7, 8])
    assert list(outputs)[-1][-2:] == [7, 8]  # what was torn joins the next answer: it is only drafted from


def test_files_that_cannot_be_drafted_from(model: Model, tmp_path: Path) -> None:
    binary, long = tmp_path / "binary", tmp_path / "long"
    binary.write_bytes(b"\xff\xfe")
    with long.open("wb") as file:
        file.truncate(MOST_NBYTES + 1)
    absent = tmp_path / "absent"
    reasons = {absent: "can't be read", tmp_path: "can't be read", binary: "isn't text", long: "longer than"}
    for path, reason in reasons.items():
        with pytest.raises(UsageError, match=reason):
            engine(model, "suffix", options={"texts": [path]})
    with pytest.raises(UsageError, match="no effect with the drafter ngram"):
        engine(model, "ngram", options={"remember": True})
