"""Views read what they say, over every kind of cache, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.passes import feed
from support.passes import write as commit

from longspec.cache import BLOCK, CACHES
from longspec.cache.views import Pages, Upper, View, Window, viewed
from longspec.model.decoder import Decoder

TOKENS = torch.randint(3, 96, (700,), generator=torch.Generator().manual_seed(2)).tolist()
LENGTH = 9 * BLOCK + 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with torch.inference_mode():
        yield load(write(oracle("llama"), tmp_path_factory.mktemp("views")))


class Through:
    """The cache, opened through a view."""

    def __init__(self, cache: Any, view: View) -> None:
        self._cache, self._view, self.length = cache, view, cache.length

    def open(self) -> Any:
        return viewed(self._cache, self._view)


def read_rows(cache: Any, view: View, layer: int = 0) -> list[int]:
    """The rows that one staged row reads."""
    stage = viewed(cache, view)
    rows = stage.add([-1])
    shape = cache.shape
    zero = torch.zeros(1, shape.key_heads, shape.head_dim)
    for i in range(shape.layers):
        stage.put(i, rows, zero, zero)
    found = []
    for part in stage.parts(layer, rows, torch.randn(1, 6, shape.head_dim)):
        allowed = (
            torch.ones(part.columns, dtype=torch.bool) if part.bounds is None else part.bounds.allowed(part.columns)[0]
        )
        found += (allowed.nonzero().flatten() + part.start).tolist()
    return sorted(found)


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest, model: Decoder) -> Any:
    made: Any = CACHES[request.param](model.shape)
    commit(model, made, TOKENS[:LENGTH])
    return made


def test_a_window_is_the_first_rows_and_the_last(cache: Any) -> None:
    want = [*range(64), *range((LENGTH - 128) // BLOCK * BLOCK, LENGTH + 1)]
    assert sorted(set(read_rows(cache, Window(64, 128)))) == want


def test_pages_are_the_near_rows_and_the_blocks_asked_for(cache: Any) -> None:
    rows = sorted(set(read_rows(cache, Pages(3))))
    near = list(range(8 * BLOCK, LENGTH + 1))
    assert rows[-len(near) :] == near
    if type(cache).__name__ != "Offload":
        assert len(rows) == len(near) + 3 * BLOCK


@pytest.mark.parametrize("view", [Window(64, 10_000), Pages(100)], ids=["window", "pages"])
def test_a_view_of_everything_is_the_whole(model: Decoder, cache: Any, view: View) -> None:
    whole = feed(model, cache, TOKENS[LENGTH : LENGTH + 6], [-1, 0, 0, 1, 3, -1])[1]
    seen = feed(model, Through(cache, view), TOKENS[LENGTH : LENGTH + 6], [-1, 0, 0, 1, 3, -1])[1]  # type: ignore[arg-type]
    assert (whole - seen).abs().max() < 2e-5
    assert (feed(model, cache, TOKENS[LENGTH : LENGTH + 6], [-1, 0, 0, 1, 3, -1])[1] - whole).abs().max() < 2e-5


def test_the_upper_plane_is_close_to_both(model: Decoder) -> None:
    both: Any = CACHES["dual"](model.shape)
    commit(model, both, TOKENS[:LENGTH])
    whole = feed(model, both, TOKENS[LENGTH : LENGTH + 6])[1]
    upper = feed(model, Through(both, Upper()), TOKENS[LENGTH : LENGTH + 6])[1]  # type: ignore[arg-type]
    difference = (whole - upper).abs().max()
    assert 1e-5 < difference < 0.2 * whole.abs().max()


def test_pages_choose_the_block_that_holds_the_answer(model: Decoder) -> None:
    """A key that one query is made for is found among old blocks, by that query."""
    cache: Any = CACHES["dense"](model.shape)
    commit(model, cache, TOKENS[:LENGTH])
    shape = model.shape
    for block in (0, 3, 6):
        key = cache.buffers[0][0, :, block * BLOCK + 17]
        key *= 20
        query = key.repeat_interleave(3, 0)[None]
        stage = viewed(cache, Pages(1))
        rows = stage.add([-1])
        stage.put(
            0, rows, torch.zeros(1, shape.key_heads, shape.head_dim), torch.zeros(1, shape.key_heads, shape.head_dim)
        )
        starts = [part.start for part in stage.parts(0, rows, query)]
        assert block * BLOCK in starts
        key /= 20
