"""The sub-layers to leave out: what a set is worth, its file, the search on the fly, on models where all is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from support.engines import engine, finish, prompts, tiny
from support.planted import PLANTED, eight_layers, planted

import longspec.drafters.common.skip_search as module
from longspec.drafters.common.skip_search import SHARE, WINDOW, Search
from longspec.drafters.common.skip_speedup import CHAIN, Prices, agreement, gain, influence, nested, united
from longspec.drafters.layer_skip import Skipping, load_skip, save_skip, saved_path, saved_skip, usual
from longspec.engine.session import Session
from longspec.errors import LongspecError, UsageError
from longspec.model.decoder import Chunk, Rows, Skip
from longspec.model.load import Model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return eight_layers(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def text(model: Model) -> Session:
    """Written by plain decoding."""
    made = engine(model)
    session = made.open(prompts(1)[0], raw=True, max_new_tokens=300)
    finish(made, [session])
    return session


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try at every step, whatever it takes."""
    monkeypatch.setattr(module, "SHARE", 1e9)


def test_the_gain_is_that_of_the_best_length() -> None:
    for agreed, share, row in product((0.0, 0.3, 0.8, 1.0), (0.1, 0.5, 1.0), (0.0, 0.05)):
        lengths = [sum(agreed**i for i in range(g + 1)) / (g * share + 1 + g * row) for g in range(1, 9)]
        assert gain(agreed, share, row) == pytest.approx(max(lengths))
    assert gain(1.0, 0.0, 0.0) == 9
    assert gain(0.0, 0.5, 0.0) == 1 / 1.5
    assert gain(0.9, 0.5) > gain(0.8, 0.5) > gain(0.8, 0.6)
    assert gain(0.999, 1.0) < 1


def test_prices_add_up() -> None:
    prices = Prices(whole=(4.0, 6.0, 5.0), attention=(1.0, 2.0, 6.0), mlp=(3.0, 4.0, 4.9), rest=5.0)
    assert prices.share(Skip()) == 1
    every = frozenset({0, 1, 2})
    assert prices.share(Skip(every, every)) == 5 / 20
    assert prices.share(Skip(frozenset({0}), frozenset({1}))) == (3 + 2 + 5 + 5) / 20
    layer = frozenset({2})  # its halves save nothing by themselves
    assert prices.units()[-1] == Skip(layer, layer)
    assert prices.units()[:2] == [Skip(attention=frozenset({0})), Skip(mlp=frozenset({0}))]


def test_bytes_count_what_a_pass_reads(model: Model) -> None:
    prices, c = Prices.by_bytes(model.decoder, 1000), model.decoder.config
    weights = sum(tensor.nbytes for tensor in model.decoder.tensors() if tensor.dim() == 2)
    assert prices.total == weights - c.vocabulary * c.width * 4 + 8 * 1000 * 2 * c.key_heads * c.head_dim * 4
    assert prices.share(PLANTED) < 0.6
    assert len(prices.units()) == 16


def test_agreement_is_that_of_chains_behind_the_text(model: Model, text: Session) -> None:
    """Each chain alone, on a cache that was cut back to where it begins; and the whole model agrees with itself."""
    count, tokens, decoder = 2 * CHAIN + 3, text.tokens, model.decoder
    held = [rows.clone() for _, rows in text.cache.state()]
    for skip in (Skip(), PLANTED, usual(8), Skip(frozenset({0, 3}), frozenset({7}))):
        want = 0
        with torch.inference_mode():
            for start in range(len(tokens) - 1 - count, len(tokens) - 1, CHAIN):
                cache = text.cache.fork(start)
                stage, own = cache.open(), tokens[start : min(start + CHAIN, len(tokens) - 1)]
                rows = Rows.of([Chunk(stage, stage.add(range(-1, len(own) - 1)), own, start, False)], decoder.device)
                likeliest = decoder.logits(decoder.forward(rows, skip=skip)).argmax(-1).tolist()
                want += sum(a == b for a, b in zip(likeliest, tokens[start + 1 :], strict=False))
        assert agreement(decoder, text.cache, tokens, count, skip, long=False) == want
        assert want == count or len(skip)
    assert all(torch.equal(rows, was) for (_, rows), was in zip(text.cache.state(), held, strict=True))


def test_planted_sub_layers_have_the_least_influence(model: Model, text: Session) -> None:
    moved = influence(model.decoder, text.cache, text.tokens, WINDOW, long=False)
    order = nested(Prices.by_bytes(model.decoder, 300), moved)
    assert united(order[: len(PLANTED)]) == PLANTED
    for i in range(8):
        assert (moved[0][i] < 0.01) == (i in PLANTED.attention)
        assert (moved[1][i] < 0.01) == (i in PLANTED.mlp)


def test_the_search_finds_the_planted_set_while_a_text_is_written(model: Model, hasty: None) -> None:
    drafter = Skipping(model.decoder)
    made = engine(model, drafter)
    search = drafter.search
    assert search is not None
    for i, prompt in enumerate(prompts(3)):
        session = made.open(prompt, raw=True, max_new_tokens=400)
        finish(made, [session])
        if i == 0:
            assert search.tries <= session.stats.steps
    prices = Prices.by_bytes(model.decoder, 400)
    found, wanted = (
        gain(agreement(model.decoder, session.cache, session.tokens, 256, skip, long=False) / 256, prices.share(skip))
        for skip in (search.best, PLANTED)
    )
    assert found > 0.97 * wanted
    assert session.stats.tokens_per_step > 5
    assert search.is_resting
    assert search.tries < 150
    tries = search.tries
    finish(made, [made.open(prompts(1)[0], raw=True, max_new_tokens=200)])
    assert search.tries == tries


@pytest.mark.full
def test_the_search_is_the_same_each_time(model: Model, hasty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although other random numbers are drawn beside it."""

    def tried() -> Iterator[Any]:
        asked: list[Skip] = []
        real = agreement
        monkeypatch.setattr(module, "agreement", lambda *given, **more: asked.append(given[-1]) or real(*given, **more))  # type: ignore[func-returns-value]
        made = engine(model, Skipping(model.decoder))
        finish(made, [made.open(prompts(1)[0], raw=True, max_new_tokens=200)])
        monkeypatch.setattr(module, "agreement", real)
        torch.rand(3)
        yield from asked

    first = list(tried())
    assert len(set(first)) > 10
    assert first == list(tried())


@pytest.mark.parametrize("cache", ["dense", "int8", "offload"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}], ids=["greedy", "sampled"])
def test_a_search_changes_no_text(tmp_path: Path, hasty: None, cache: str, options: dict[str, Any]) -> None:
    """Three sessions, of which each is tried on. Where rows can't be cut back freely, there is no search."""
    small = tiny(tmp_path, "gemma3", end_tokens=())
    texts = []
    drafter = Skipping(small.decoder)
    for name in ("none", drafter):
        made = engine(small, name, cache=cache)
        sessions = [
            made.open(prompt, raw=True, key=str(i), max_new_tokens=90, **options) for i, prompt in enumerate(prompts(3))
        ]
        texts.append(finish(made, sessions))
    assert texts[0] == texts[1]
    assert drafter.search is not None
    assert (drafter.search.tries > 20) == (cache == "dense")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one number is the time; each try takes 5 seconds of it."""
    now = [0.0]
    monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Search, "_try", lambda *given: now.__setitem__(0, now[0] + 5.0))
    return now


def test_tries_take_their_share_of_the_time_at_most(model: Model, text: Session, clock: list[float]) -> None:
    search, writing = Search(model.decoder, Skip()), 0.0
    for step in range(4000):
        seconds = 50.0 if step % 7 == 0 else 1.0  # a wait for the next prompt, now and then
        clock[0] += seconds
        search.step()
        search.turn(text, 200)
        writing += seconds
        assert 5.0 * search.tries <= SHARE * writing + 5.0
    assert 5.0 * search.tries > 0.5 * SHARE * writing
    tries = search.tries
    clock[0] += 1e6
    search.step()
    for _ in range(10):  # a long wait earns two tries, not thousands
        search.turn(text, 200)
    assert search.tries <= tries + 2


def test_a_short_text_is_not_tried_on(model: Model, text: Session, clock: list[float], hasty: None) -> None:
    search = Search(model.decoder, Skip())
    for _ in range(10):
        clock[0] += 1.0
        search.step()
        search.turn(text, WINDOW - 1)
    assert search.tries == 0


def test_a_search_at_rest_begins_anew_when_less_is_kept(model: Model) -> None:
    search = Search(model.decoder, Skip())
    search._idle = 1000
    for i in range(2000):
        search.told(i % 10 != 0)
    assert search.is_resting
    for i in range(200):
        search.told(i % 2 == 0)
    assert not search.is_resting


def test_a_given_set_stays(model: Model, hasty: None) -> None:
    drafter = Skipping(model.decoder, Skip(frozenset({1})))
    assert drafter.search is None
    made = engine(model, drafter)
    finish(made, [made.open(prompts(1)[0], raw=True, max_new_tokens=60)])
    assert drafter.skip == Skip(frozenset({1}))


def test_a_set_is_the_same_after_its_file(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert saved_skip(model) is None
    path = saved_path(model)
    assert path.is_relative_to(tmp_path / "longspec")
    save_skip(path, PLANTED, model, {"agreement": 0.5})
    assert saved_skip(model) == load_skip(path, 8) == PLANTED
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text())["agreement"] == 0.5
    other = replace(model, name="other")
    assert saved_skip(other) == PLANTED  # weights count, names don't
    damaged = {**json.loads(path.read_text()), "identity": "0" * 64}
    path.write_text(json.dumps(damaged))
    with pytest.raises(UsageError, match="another model"):
        saved_skip(model)
    with pytest.raises(LongspecError, match="can't be written"):
        save_skip(path / "under a file", PLANTED, model, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "other"}, "no skip set that this longspec knows"),
        ({"version": 2}, "no skip set that this longspec knows"),
        ({"layers": 9}, "9 layers, and this one has 8"),
        ({"attention": [8]}, "`attention` must list layers from 0 to 7"),
        ({"attention": [-1]}, "`attention` must list"),
        ({"mlp": [True]}, "`mlp` must list"),
        ({"mlp": "1"}, "`mlp` must list"),
        ({"mlp": [[1]]}, "`mlp` must list"),
        ({"mlp": None}, "`mlp` must list"),
    ],
)
def test_a_damaged_set_is_refused(model: Model, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "set.json"
    save_skip(path, PLANTED, model, {})
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UsageError, match=said):
        load_skip(path, 8)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"\xff\xfe\xfd", b"[" * 60_000, b'{"kind": "' + b"x" * 70_000 + b'"}']
)
def test_what_is_no_set_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"more than 64 KiB|isn't a JSON object"):
        load_skip(path, 8)
    with pytest.raises(UsageError, match="can't be read"):
        load_skip(tmp_path / "missing.json", 8)


@pytest.mark.full
def test_skip_with_its_search_and_exit_beat_plain_decoding(tmp_path: Path) -> None:
    """Twelve layers of width 512, of which the last eight do next to nothing: in turns, medians of ratios.

    What `skip` leaves out at first is wrong here: one of its two layers is needed.
    """
    later = frozenset(range(4, 12))
    large = planted(
        tmp_path,
        Skip(later, later),
        heads=8,
        num_hidden_layers=12,
        hidden_size=512,
        intermediate_size=1408,
        vocab_size=2000,
        max_position_embeddings=4096,
    )
    drafter = Skipping(large.decoder)
    engines = {"none": engine(large)}
    engines |= {"skip": engine(large, drafter, draft_tokens=8), "exit": engine(large, "exit", draft_tokens=8)}
    assert drafter.search is not None
    while drafter.search.tries < 16:  # as the first texts are written
        finish(engines["skip"], [engines["skip"].open(prompts(1)[0], raw=True, max_new_tokens=400)])
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(5):
        texts = {}
        for at in range(3):
            name = list(engines)[(at + turn) % 3]
            session = engines[name].open(prompts(5)[turn], raw=True, max_new_tokens=128)
            for _ in engines[name].write(session):
                pass
            assert session.last_token is not None
            assert session.prefilled is not None
            rates[name].append(len(session.answer) / (session.last_token - session.prefilled))
            texts[name] = session.answer
            assert name == "none" or session.stats.acceptance >= 0.8
        assert texts["skip"] == texts["exit"] == texts["none"]
    for name in ("skip", "exit"):
        assert median(a / b for a, b in zip(rates[name], rates["none"], strict=True)) >= 1.3, rates
