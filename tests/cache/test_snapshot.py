"""A cache in a file: resumed it writes the same text, and a file that isn't whole, or another's, is refused."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import engine, finish, tiny
from support.passes import TOLERANCE, continuation, filled

from longspec.cache import BLOCK, CACHES, snapshot
from longspec.cache.snapshot import Snapshot
from longspec.errors import LongspecError, UsageError
from longspec.model.load import Model

PROMPT = "".join(chr(51 + i % 40 + i // 37) for i in range(4 * BLOCK + 21))
NEW = BLOCK + 9
WAYS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.9, "seed": 3}}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("tiny"), request.param, end_tokens=())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("llama"), end_tokens=())


def ask(made: Any, prompt: str = PROMPT, **options: Any) -> Any:
    session = made.open(prompt, raw=True, **{"max_new_tokens": NEW, **options})
    finish(made, [session])
    assert session.notes == []
    return session


def _matrix() -> Iterator[Any]:
    """Families, caches and ways; the usual run has every cache sampled, and one of rows and one of codes greedily."""
    for family, cache, way in product(("llama", "gemma3"), CACHES, ("greedy", "sampled")):
        usual = family == "llama" and (way == "sampled" or cache in ("dense", "int4"))
        yield pytest.param(family, cache, way, marks=[] if usual else pytest.mark.full)


@pytest.mark.parametrize(("model", "cache", "way"), list(_matrix()), indirect=["model"])
def test_a_resumed_text_goes_on_as_the_first_did(model: Model, cache: str, way: str, tmp_path: Path) -> None:
    made, path = engine(model, "ngram", cache=cache), tmp_path / "rows"
    first = ask(made, prompt_cache=path, **WAYS[way])
    assert first.tokens == ask(made, **WAYS[way]).tokens
    written = path.read_bytes()
    again = ask(engine(model, "ngram", cache=cache), prompt_cache=str(path), **WAYS[way])
    assert again.tokens == first.tokens
    assert (first.cached, again.cached) == (0, len(PROMPT) - 1)
    assert path.read_bytes() == written
    assert made.answer(again).usage["cached_tokens"] == len(PROMPT) - 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", [1, BLOCK, 2 * BLOCK, 3 * BLOCK - 1, 290])
def test_the_state_of_any_kind_and_length(llama: Model, cache: str, length: int) -> None:
    with torch.inference_mode():
        old = filled(llama.decoder, CACHES[cache], length)
        state = dict(old.state())
        new = CACHES[cache](llama.decoder.shape)
        new.load_state(length, lambda name, shape, dtype: _checked(state.pop(name), shape, dtype))
        assert state == {}
        assert new.length == length
        assert torch.equal(continuation(llama.decoder, new), continuation(llama.decoder, old))


def _checked(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    return tensor


@pytest.mark.parametrize("cache", ["dense", "int4"])
def test_a_fork_keeps_its_shared_rows_too(llama: Model, cache: str, tmp_path: Path) -> None:
    with torch.inference_mode():
        fork = filled(llama.decoder, CACHES[cache], 200).fork(170)
        state = dict(fork.state())
        new = CACHES[cache](llama.decoder.shape)
        new.load_state(fork.length, lambda name, shape, dtype: _checked(state[name], shape, dtype))
        difference = continuation(llama.decoder, new) - continuation(llama.decoder, fork)
        assert difference.abs().max() < TOLERANCE


def test_a_session_can_be_kept_at_any_time(llama: Model, tmp_path: Path) -> None:
    made, path = engine(llama), tmp_path / "rows"
    session = ask(made)
    made.save(session, path)
    again = made.open(PROMPT + session.text, raw=True, max_new_tokens=20, prompt_cache=path)
    assert again.tokens == session.tokens
    assert again.cached == len(session.tokens) - 1


@pytest.mark.parametrize("cut", [0, 1, BLOCK, 2 * BLOCK + 5, len(PROMPT) - 1])
def test_rows_are_used_as_far_as_the_texts_agree(llama: Model, cut: int, tmp_path: Path) -> None:
    """A dense cache is cut there; the codes of old blocks can't be, and the prompt is read anew."""
    other = PROMPT[:cut] + "z" * (len(PROMPT) - cut)
    for cache, cached in (("dense", cut), ("int4", cut if cut == len(PROMPT) - 1 else 0)):
        made, path = engine(llama, cache=cache), tmp_path / cache
        ask(made, prompt_cache=path)
        session = ask(made, other, prompt_cache=path)
        assert session.cached == cached
        assert session.tokens == ask(made, other).tokens
        assert Snapshot(path).common(session.tokens) == len(PROMPT) - 1  # it holds the later prompt now


def test_a_longer_prompt_starts_where_the_file_ends(llama: Model, tmp_path: Path) -> None:
    for cache in ("dense", "int4", "disk"):
        made, path = engine(llama, cache=cache), tmp_path / cache
        ask(made, prompt_cache=path)
        session = ask(made, PROMPT + "more of it", prompt_cache=path)
        assert session.cached == len(PROMPT) - 1
        assert session.tokens == ask(made, PROMPT + "more of it").tokens


def test_what_is_longer_than_the_text_may_become_is_left(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no section of it is read: a sparse file of 4 GiB takes no disk, and its tokens take 8 GiB as a list."""
    made, path = engine(llama), tmp_path / "rows"
    ask(made, prompt_cache=path)
    monkeypatch.setattr(Snapshot, "_take", lambda *_: 1 / 0)
    assert ask(made, PROMPT[:40], prompt_cache=path, max_new_tokens=9).cached == 0


def test_every_flipped_byte_is_noticed(llama: Model, tmp_path: Path) -> None:
    made, path = engine(llama, cache="int8"), tmp_path / "rows"
    ask(made, prompt_cache=path)
    whole = path.read_bytes()
    at = random.Random(0).sample(range(len(whole)), 150)
    for place in [*range(40), *at, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UsageError, match="rows"):
            made.open(PROMPT, raw=True, prompt_cache=path)


def test_a_file_that_is_not_whole_is_refused(llama: Model, tmp_path: Path) -> None:
    made, path = engine(llama), tmp_path / "rows"
    ask(made, prompt_cache=path)
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:30], whole[:36], whole[: len(whole) // 2], whole[:-1], whole + b"x"):
        path.write_bytes(broken)
        with pytest.raises(UsageError, match="rows"):
            made.open(PROMPT, raw=True, prompt_cache=path)
        assert path.read_bytes() == broken
    path.write_text("a letter, and no rows")
    with pytest.raises(UsageError, match="isn't a prompt cache"):
        made.open(PROMPT, raw=True, prompt_cache=path)


def test_rows_of_another_are_refused_by_what_differs(
    llama: Model, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path / "rows"
    ask(engine(llama), prompt_cache=path)
    trained = tiny(tmp_path_factory.mktemp("trained"), end_tokens=())
    with torch.no_grad():
        next(iter(trained.decoder._layers[2].mlp.down.weight))[0] += 0.5
    shaped = tiny(tmp_path_factory.mktemp("shaped"), end_tokens=(), rms_norm_eps=1e-5)
    worded = replace(llama, vocabulary=_with_another_word(llama))
    strict = tiny(tmp_path_factory.mktemp("strict"), end_tokens=(), strict=True)
    for made, said in (
        (engine(trained), "another model"),
        (engine(shaped), "another model"),
        (engine(worded), "another tokenizer"),
        (engine(strict), "not strict, and this run's is strict"),
        (engine(replace(llama, dtype="bf16")), "dtype fp32, and this run's is bf16"),
        (engine(replace(trained, dtype="bf16")), "dtype fp32, and this run's is bf16"),
        (engine(llama, cache="int8"), "cache dense, and this run's is int8"),
    ):
        with pytest.raises(UsageError, match=said):
            made.open(PROMPT, raw=True, prompt_cache=path)


def _with_another_word(model: Model) -> Any:
    from support.engines import vocabulary

    made = vocabulary(model.decoder.config.vocabulary)
    made.tokenizer.add_tokens(["zzz"])
    return made


def test_an_index_that_lies_is_refused(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums can be made to fit; sizes still have to."""
    made, path = engine(llama), tmp_path / "rows"
    session = ask(made, prompt_cache=path)
    true = json.dumps
    lies: list[Callable[[Any], Any]] = [
        lambda index: {**index, "length": 1 << 40},
        lambda index: {**index, "length": -1},
        lambda index: {**index, "length": float("inf")},
        lambda index: {**index, "length": float("nan")},
        lambda index: {**index, "length": str(index["length"])},
        lambda index: {**index, "length": [index["length"]]},
        lambda index: {**index, "length": True},
        lambda index: {**index, "identity": {"model": 5}},
        lambda index: {**index, "identity": [["model"]]},
        lambda index: {
            **index,
            "sections": [[*section[:3], section[3] + 0.0, *section[4:]] for section in index["sections"]],
        },
        lambda index: {**index, "sections": {"tokens": 1}},
        lambda index: {**index, "identity": 5},
        lambda index: {**index, "sections": []},
        lambda index: {**index, "sections": [["tokens"]]},
        lambda index: {**index, "sections": index["sections"][::-1]},
        lambda index: {**index, "sections": [[[], *rest] for _, *rest in index["sections"]]},
        lambda index: {
            **index,
            "sections": [[name, kind, [1 << 50], *rest] for name, kind, _, *rest in index["sections"]],
        },
        lambda index: [index],
    ]
    for lie in lies:
        monkeypatch.setattr(json, "dumps", lambda index, lie=lie: true(lie(index)))
        made.save(session, path)
        with pytest.raises(UsageError, match="rows"):
            made.open(PROMPT, raw=True, prompt_cache=path)


def test_an_index_is_bounded(tmp_path: Path) -> None:
    text = b"[" + b"[]," * (6 << 20) + b"[]]"
    header = snapshot._HEADER.pack(b"longspec", 1, snapshot._BEGIN, len(text), zlib.crc32(text))
    path = tmp_path / "rows"
    path.write_bytes(header + snapshot._CHECK.pack(zlib.crc32(header)) + text)
    with pytest.raises(UsageError, match="its index has more than 16 MiB"):
        Snapshot(path)


def test_a_file_is_whole_or_the_old_one(llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, path = engine(llama), tmp_path / "rows"
    session = ask(made, prompt_cache=path)
    whole = path.read_bytes()

    def failing() -> Any:
        yield from list(type(session.cache).state(session.cache))[:2]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session.cache, "state", failing)
    with pytest.raises(LongspecError, match="No space left"):
        made.save(session, path)
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows"]


def test_a_full_disk_costs_the_file_and_not_the_answer(
    llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("longspec.cache.snapshot._write", full)
    made = engine(llama)
    session = made.open(PROMPT, raw=True, max_new_tokens=NEW, prompt_cache=tmp_path / "rows")
    finish(made, [session])
    assert session.tokens == ask(made).tokens
    assert "No space left" in session.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_room_for_a_file(llama: Model, tmp_path: Path) -> None:
    made = engine(llama)
    places = ((tmp_path, "isn't a regular file"), (tmp_path / "no" / "rows", "doesn't exist"))
    for path, said in (*places, (tmp_path / "a\0b", "a name that no file can have")):
        with pytest.raises(UsageError, match=said):
            made.open(PROMPT, raw=True, prompt_cache=path)


def test_a_link_stays_a_link(llama: Model, tmp_path: Path) -> None:
    made, link = engine(llama), tmp_path / "link"
    link.symlink_to(tmp_path / "rows")
    ask(made, prompt_cache=link)
    assert link.is_symlink()
    assert ask(made, prompt_cache=link).cached == len(PROMPT) - 1


def test_a_text_planned_to_be_long_has_other_rows(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = engine(tiny(tmp_path_factory.mktemp("phi"), "phi3-longrope", end_tokens=()))
    path, prompt = tmp_path / "rows", PROMPT[:180]
    ask(made, prompt, prompt_cache=path, max_new_tokens=20)
    assert ask(made, prompt, prompt_cache=path, max_new_tokens=30).cached == len(prompt) - 1
    session = ask(made, prompt, prompt_cache=path, max_new_tokens=200)
    assert session.cached == 0
    assert session.tokens == ask(made, prompt, max_new_tokens=200).tokens
