"""The rows of finished texts: who gets which, what they hold, and what goes first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from support.engines import engine, tiny

from longspec.cache import LOSSLESS, Dense
from longspec.engine.engine import Engine
from longspec.engine.prefix_cache import Prefixes, common
from longspec.engine.prefix_shelf import Shelf
from longspec.engine.prompt_cache import identity
from longspec.engine.scheduler import Schedule
from longspec.engine.session import Session
from longspec.errors import UsageError


def finished(made: Engine, schedule: Schedule, prompt: str, **options: Any) -> Session:
    given: Any = {"raw": True, "max_new_tokens": 4, **options}
    session = schedule.begin(prompt, given)
    assert isinstance(session, Session)
    while schedule:
        schedule.step()
    return session


@pytest.mark.parametrize("cache", sorted(LOSSLESS))
def test_prefixes_change_no_text(tmp_path: Any, cache: str) -> None:
    made = engine(tiny(tmp_path, end_tokens=()), "ngram", cache=cache)
    schedule, start = Schedule(made, 4, kept=1 << 26), "ABCDEFGH" * 20
    prompts = [start, start + "IJK", start[:100] + "XYZ" * 20, start + "IJKLM", start[:70], "no" * 60]
    for prompt in prompts:
        kept = finished(made, schedule, prompt, temperature=0.9, seed=2)
        alone = finished(made, Schedule(made, 4), prompt, temperature=0.9, seed=2)
        assert kept.tokens == alone.tokens
        assert kept.cached == 0 or kept.cached >= 16
    assert finished(made, schedule, start + "IJKLMN").cached >= 64


def test_the_least_recently_used_text_goes_first(tmp_path: Any) -> None:
    made = engine(tiny(tmp_path, end_tokens=()))
    one = finished(made, Schedule(made, 4), "A" * 100)
    nbytes = one.cache.nbytes
    schedule = Schedule(made, 4, kept=2 * nbytes)
    for letter in "ABAC":
        finished(made, schedule, letter * 100)
    assert schedule.prefixes.nbytes <= 2 * nbytes
    assert finished(made, schedule, "B" * 100).cached == 0
    assert finished(made, schedule, "C" * 100).cached >= 64


SYSTEM = "SYSTEM" * 40  # 240 tokens that many prompts begin with


def distinct(prefixes: Prefixes) -> int:
    """Bytes of the tensors that the tree holds, each counted once."""
    caches = [node.cache for root in prefixes._roots.values() for node in root if node.cache is not None]
    storages = [tensor.untyped_storage() for cache in caches for tensor in cache.tensors()]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_what_texts_share_is_held_once(tmp_path: Path) -> None:
    made = engine(tiny(tmp_path, end_tokens=()))
    schedule = Schedule(made, 4, kept=1 << 30)
    one = finished(made, schedule, SYSTEM + "A" * 70).cache.nbytes
    for letter in "BCDEFGH":
        assert finished(made, schedule, SYSTEM + letter * 70).cached == 240
    assert schedule.prefixes.nbytes == distinct(schedule.prefixes)
    assert schedule.prefixes.nbytes < 5 * one  # of eight texts: the first, what they share, and seven ends
    kept = [node.cache for node in schedule.prefixes._roots[False] if node.cache is not None]
    assert all(isinstance(cache, Dense) and len(cache._shared) < 2 for cache in kept)  # few pieces are read faster


def test_a_short_text_is_gone_on_from(tmp_path: Path) -> None:
    made = engine(tiny(tmp_path, end_tokens=()))
    schedule = Schedule(made, 4, kept=1 << 30)
    first = finished(made, schedule, "A" * 30)
    more = finished(made, schedule, "A" * 30 + first.text + "B" * 9)
    assert 30 <= more.cached < 64
    assert more.tokens == finished(made, Schedule(made, 4), "A" * 30 + first.text + "B" * 9).tokens
    assert finished(made, schedule, "A" * 18 + "C" * 9).cached == 0  # it parts before the prompt's end


def test_who_shares_a_beginning_at_the_same_time_gets_it(tmp_path: Path) -> None:
    made = engine(tiny(tmp_path, end_tokens=()))
    schedule = Schedule(made, 4, kept=1 << 30)
    finished(made, schedule, SYSTEM + "A" * 9)
    together = [schedule.begin(SYSTEM + letter * 9, {"raw": True, "max_new_tokens": 4}) for letter in "BCDE"]
    while schedule:
        schedule.step()
    for letter, session in zip("BCDE", together, strict=True):
        assert isinstance(session, Session)
        assert session.cached >= 240
        assert session.tokens == finished(made, Schedule(made, 4), SYSTEM + letter * 9).tokens


def test_a_tree_under_pressure_stays_within_its_bytes(tmp_path: Path) -> None:
    made = engine(tiny(tmp_path, end_tokens=()))
    schedule = Schedule(made, 4, kept=300_000)
    for turn in range(24):
        finished(made, schedule, SYSTEM[: 64 + 7 * turn] + "KLMNOP"[turn % 6] * (5 + turn))
        assert distinct(schedule.prefixes) == schedule.prefixes.nbytes <= 300_000
        finished(made, schedule, SYSTEM[:200] + "ABC"[turn % 3] * turn)
        assert distinct(schedule.prefixes) == schedule.prefixes.nbytes <= 300_000
    while schedule.prefixes.let_go():
        pass
    assert schedule.prefixes.nbytes == 0
    assert [[*root] for root in schedule.prefixes._roots.values()] == [
        [root] for root in schedule.prefixes._roots.values()
    ]


# --- in files


def shelf(made: Engine, folder: Path, most: int = 1 << 30) -> Shelf:
    return Shelf(folder, most, identity(made.model, made.cache_name))


@pytest.mark.parametrize("cache", ["dense", "int8"])
def test_rows_outlive_their_server(tmp_path: Path, cache: str) -> None:
    made, folder = engine(tiny(tmp_path / "model", end_tokens=()), cache=cache), tmp_path / "rows"
    schedule = Schedule(made, 4, kept=1 << 30, shelf=shelf(made, folder))
    first = finished(made, schedule, SYSTEM + "A" * 9)
    schedule.prefixes.close(60)
    assert folder.stat().st_mode & 0o777 == 0o700
    again = Schedule(made, 4, kept=1 << 30, shelf=shelf(made, folder))
    for _ in range(2):
        same = finished(made, again, SYSTEM + "A" * 9)
        assert same.cached >= 240
        assert same.tokens == first.tokens


def test_rows_that_memory_doesnt_hold_come_from_files(tmp_path: Path) -> None:
    made, folder = engine(tiny(tmp_path / "model", end_tokens=())), tmp_path / "rows"
    nbytes = finished(made, Schedule(made, 4), SYSTEM).cache.nbytes
    schedule = Schedule(made, 4, kept=nbytes * 3 // 2, shelf=shelf(made, folder))
    finished(made, schedule, SYSTEM + "A")
    finished(made, schedule, "other" * 50)
    held = schedule.prefixes._shelf
    assert held is not None
    assert held._writing is not None
    held._writing.join()
    assert len([*folder.iterdir()]) == 1
    assert finished(made, schedule, SYSTEM + "A" * 9).cached >= 240
    held._writing.join()  # of what went out for that one
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert [*shelf(made, folder).found()] == []
    assert finished(made, schedule, "other" * 50 + "A").tokens  # a damaged file is no more than a missing one


def test_a_folder_that_others_can_open_is_refused(tmp_path: Path) -> None:
    made, folder = engine(tiny(tmp_path / "model", end_tokens=())), tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(UsageError, match="isn't yours alone"):
        shelf(made, folder)
    folder.chmod(0o700)
    (folder / "a.rows").write_bytes(b"longspec")
    (folder / "b.rows").symlink_to("/etc/passwd")
    assert [*shelf(made, folder).found()] == []


def test_a_folder_has_its_bound(tmp_path: Path) -> None:
    made, folder = engine(tiny(tmp_path / "model", end_tokens=())), tmp_path / "rows"
    schedule = Schedule(made, 4, kept=1 << 30, shelf=shelf(made, folder))
    for letter in "ABC":
        finished(made, schedule, letter * 100)
    schedule.prefixes.close(60)
    sizes = [path.stat().st_size for path in folder.iterdir()]
    assert len(sizes) == 3
    small = shelf(made, folder, most=max(sizes) + 1)
    for time, path in enumerate(folder.iterdir()):
        os.utime(path, (time + 1, time + 1))
    again = Schedule(made, 4, kept=1 << 30, shelf=small)
    finished(made, again, "D" * 100)
    again.prefixes.close(60)
    assert len([*folder.iterdir()]) == 1


def test_common_prefixes() -> None:
    tokens = list(range(200))
    for length in (0, 1, 63, 64, 65, 128, 199, 200):
        other = [*tokens[:length], 999]
        assert common(tokens, other) == common(other, tokens) == length
    assert common(tokens, tokens) == 200
    assert common(tokens, tokens[:128]) == 128
