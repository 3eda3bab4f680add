"""Texts that only repeat themselves: ended where they do, left alone where they don't, whatever is drafted."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
from support.commands import inside
from support.engines import engine, every_drafter, finish, prompts, tiny

from longspec.engine.engine import Engine
from longspec.engine.session import Session
from longspec.text.repetition import FAR, LEAST, LEAST_PLAIN, Loops


def ended(tokens: list[int]) -> int | None:
    """After how many tokens a loop was seen."""
    loops = Loops()
    return next((i for i, token in enumerate(tokens, 1) if loops.take(token)), None)


def noise(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize("period", [9, 31, 50, 51, 127, 128, 500, FAR])
@pytest.mark.parametrize("before", [0, 1, 700])
def test_a_loop_is_seen_where_it_is_one(period: int, before: int) -> None:
    tokens = noise(before) + noise(period, 1) * (LEAST // period + 4)
    repeats = 4 if period < 128 else 3
    assert ended(tokens) == before + max(LEAST, repeats * period)


@pytest.mark.parametrize(
    ("period", "tokens"), [(7, 600), (8, 200), (50, 200), (51, 204), (127, 508), (128, 384), (2048, 6144), (2049, None)]
)
def test_so_long_a_loop_must_be(period: int, tokens: int | None) -> None:
    """In the numbers that docs/reasoning.md promises, which no constant brings along."""
    assert ended([i % period for i in range(7000)]) == tokens


def test_it_is_seen_late_in_a_long_text() -> None:
    tokens = noise(10 * FAR + 3) + noise(300, 1) * 3
    assert ended(tokens) == len(tokens)


def test_a_few_tokens_may_go_on_for_longer() -> None:
    assert ended([7] * 2000) == LEAST_PLAIN
    assert ended([1, 2, 3] * 500) == LEAST_PLAIN
    assert ended(list(range(7)) * 500) == LEAST_PLAIN
    assert ended(list(range(8)) * 500) == LEAST


def test_what_is_no_loop_goes_on() -> None:
    zeros = ([1, *[0, 2] * 15, 3]) * 18  # a matrix of 18 x 15 zeros
    assert ended(zeros + noise(50)) is None
    numbered = [token for i in range(300) for token in (*divmod(i, 10), 900, 901, 902, 903, 904, 905)]
    assert ended(numbered) is None
    verses = [token for i in range(20) for token in noise(40, i) + noise(30, 99)]  # with a refrain
    assert ended(verses) is None
    twice = noise(400, 1) * 2
    assert ended(twice + noise(400, 2) * 2) is None
    nearly = [token for i in range(50) for token in [*noise(30, 1), 2000 + i]]
    assert ended(nearly) is None
    assert ended(noise(30, 1) * 4 + noise(1000)) is None


def test_what_is_kept_does_not_grow_with_the_text() -> None:
    """And so a token costs the same late in a text: all that is kept is looked at, or a fixed part of it."""
    loops, sizes = Loops(), []
    for i, token in enumerate(noise(6 * FAR + 1)):
        if i % FAR == 0:
            sizes.append(len(pickle.dumps(loops)))
        loops.take(token)
    assert max(sizes) < min(sizes) + 64  # numbers of more digits


def test_bets_do_not_change_where_a_loop_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model that is decoded greedily repeats itself soon; here that is enough."""
    for name, value in {"LEAST": 12, "LEAST_PLAIN": 18, "REPEATS": 3}.items():
        monkeypatch.setattr(f"longspec.text.repetition.{name}", value)
    model = tiny(tmp_path, end_tokens=(), max_position_embeddings=4096)

    def opened(made: Engine) -> list[Session]:
        texts = enumerate(prompts(3, 40))
        return [made.open(text, raw=True, key=str(i), max_new_tokens=100, stop_loops=i < 2) for i, text in texts]

    plain = opened(engine(model))
    wanted = finish(engine(model), plain)
    ends = [session.finish_reason for session in plain]
    assert ends == ["loop", "loop", "length"]
    texts = {str(i): tokens for i, tokens in enumerate(wanted)}
    for name, drafter in every_drafter(texts, "llama").items():
        made = engine(model, drafter())
        sessions = opened(made)
        assert finish(made, sessions) == wanted, name
        assert [session.finish_reason for session in sessions] == ends, name
        assert "repeated itself" in sessions[0].notes[0]


def test_the_command_says_which_line_repeated_itself(tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 12, "LEAST_PLAIN": 18, "REPEATS": 3}.items():
        monkeypatch.setattr(f"longspec.text.repetition.{name}", value)
    asked = ["run", "--each-line", "--raw", "--json", "-m", tiny, "--dtype", "fp32", "--max-new-tokens", "300"]
    done = inside([*asked, "--temperature", "0", "--stop-loops"], home, b"abcabc\nabcabc\n")
    assert done.code == 0
    assert [json.loads(line)["finish_reason"] for line in done.out.splitlines()] == ["loop", "loop"]
    assert done.err.splitlines() == [
        f"longspec: line {number}: the text only repeated itself, so it was ended (--stop-loops)" for number in (1, 2)
    ]


@pytest.mark.real
@pytest.mark.full
def test_the_real_model_ends_what_it_repeats(tmp_path: Path) -> None:
    """Without its template and decoded greedily it goes round before long, but not where it counts."""
    home = {"XDG_CACHE_HOME": str(Path.home() / ".cache")}
    asked = ["run", "--each-line", "--raw", "--json", "--max-new-tokens", "300", "--stop-loops", "--temperature", "0"]
    done = inside(asked, tmp_path, b"The bird sat on the tree.\n1, 2, 3, 4,\n", extra=home)
    assert done.code == 0
    assert [json.loads(line)["finish_reason"] for line in done.out.splitlines()] == ["loop", "length"]
    assert done.err == "longspec: line 1: the text only repeated itself, so it was ended (--stop-loops)\n"
