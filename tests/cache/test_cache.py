"""Stage, commit and read back equals a fresh cache; what was dropped never was. For every kind in CACHES."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, oracle, write
from support.passes import TOKENS, TOLERANCE, continuation, feed, filled
from support.passes import write as commit

from longspec.cache import BLOCK, CACHES, Dense, Shape
from longspec.cache.shape import Buffers
from longspec.cache.tree import Tree
from longspec.model.decoder import Decoder, Rows, Span


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The usual run has llama and gemma4 with every kind, and mistral with a few: all its layers have windows, whose
    rows no kind encodes or moves, so that all its kinds give the same bits. The hybrids have test_hybrid.py.
    """
    if {"model", "kind"} <= {*metafunc.fixturenames}:
        usual = [*product(("llama", "gemma4"), CACHES), *product(("mistral",), ("dense", "int4", "disk"))]
        every = product(("llama", "gemma3", "gemma4", "mistral", "qwen3_5", "lfm2"), CACHES)
        pairs = [pytest.param(*pair, marks=[] if pair in usual else pytest.mark.full) for pair in every]
        metafunc.parametrize(("model", "kind"), pairs, indirect=True)
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", CACHES, indirect=True)
    elif "model" in metafunc.fixturenames:
        metafunc.parametrize("model", ["llama"], indirect=True)


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with torch.inference_mode():
        yield load(write(oracle(request.param), tmp_path_factory.mktemp("cache")))


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> Any:
    return CACHES[request.param]


def test_rows_one_by_one_equal_rows_at_once(model: Decoder, kind: Any) -> None:
    slow = filled(model, kind, 60)
    for token in TOKENS[60:70]:
        commit(model, slow, [token])
    assert slow.length == 70
    difference = continuation(model, slow) - continuation(model, filled(model, kind, 70))
    assert difference.abs().max() < TOLERANCE


def test_a_dropped_stage_leaves_no_trace(model: Decoder, kind: Any) -> None:
    cache = filled(model, kind, 70)
    want = continuation(model, cache)
    feed(model, cache, TOKENS[100:140])
    feed(model, cache, TOKENS[200:210], [-1, 0, 0, -1, 3, 3, 4, 4, 1, 8])
    assert cache.length == 70
    assert torch.equal(continuation(model, cache), want)


def test_a_kept_path_equals_the_same_text(model: Decoder, kind: Any) -> None:
    """Across a block's border, and deep enough to leave a window of 24."""
    cache = filled(model, kind, BLOCK - 6)
    path = TOKENS[BLOCK - 6 : BLOCK + 24]
    tokens = [token for good in path for token in ((good + 1) % 96, good)]
    parents = [-1, -1] + [parent for i in range(1, 30) for parent in (2 * i - 1, 2 * i - 1)]
    stage, logits = feed(model, cache, tokens, parents)
    plain = filled(model, kind, BLOCK - 6)
    assert (logits[1::2] - feed(model, plain, path)[1]).abs().max() < TOLERANCE
    cache.commit(stage, range(1, 60, 2))
    assert cache.length == BLOCK + 24
    difference = continuation(model, cache) - continuation(model, filled(model, kind, BLOCK + 24))
    assert difference.abs().max() < TOLERANCE


def test_kept_rows_of_a_stage_equal_a_stage_of_these_alone(model: Decoder, kind: Any) -> None:
    """Two chains that part at row 4; the second is forgotten, comes again, and the first one is, with one row more."""
    if not hasattr(kind(model.shape), "near") and kind is not Dense:
        pytest.skip("a cache of states forgets no rows of a stage")
    for length in (40, BLOCK - 8):
        cache = filled(model, kind, length)
        own, other = TOKENS[length : length + 12], TOKENS[200:208]
        stage, _ = feed(model, cache, own[:4] + other + own[4:], [*range(-1, 11), 3, *range(12, 19)])
        stage.keep([0, 1, 2, 3, *range(12, 18)])
        assert list(stage.depths) == list(range(10))
        rows = stage.add([9, 10])
        positions = torch.tensor([length + 10, length + 11])
        flat = Rows(
            torch.tensor(own[10:]), positions, torch.zeros(2, dtype=torch.bool), [Span(stage, rows, slice(0, 2))]
        )
        got = model.logits(model.forward(flat))
        _, want = feed(model, filled(model, kind, length), own)
        assert (got - want[10:]).abs().max() < TOLERANCE
        cache.commit(stage, range(12))
        difference = continuation(model, cache) - continuation(model, filled(model, kind, length + 12))
        assert difference.abs().max() < TOLERANCE


def test_a_stage_keeps_no_row_without_its_parent(model: Decoder) -> None:
    stage, _ = feed(model, filled(model, CACHES["dense"], 9), TOKENS[9:14], [-1, 0, 0, 1, 2])
    for rows in ([0, 3], [1], [0, 2, 1]):
        with pytest.raises(ValueError, match="can't stay alone"):
            stage.keep(rows)


def test_stages_side_by_side_do_not_see_each_other(model: Decoder, kind: Any) -> None:
    cache = filled(model, kind, 50)
    want = continuation(model, cache)
    mine, _ = feed(model, cache, TOKENS[50:53])
    other, got = feed(model, cache, TOKENS[50:55])
    assert (got - want).abs().max() < TOLERANCE
    feed(model, cache, TOKENS[150:160])
    cache.commit(other, range(5))
    difference = continuation(model, cache) - continuation(model, filled(model, kind, 55))
    assert difference.abs().max() < TOLERANCE
    cache.truncate(50)
    with pytest.raises(ValueError, match="stale"):
        cache.commit(mine, range(3))


def test_a_row_must_hold_all_layers(model: Decoder, kind: Any) -> None:
    cache = filled(model, kind, 10)
    stage = cache.open()
    rows = stage.add([-1])
    shape = model.shape
    stage.put(0, rows, torch.zeros(1, shape.key_heads, shape.head_dim), torch.zeros(1, shape.key_heads, shape.head_dim))
    with pytest.raises(ValueError, match="some layers only"):
        cache.commit(stage, [0])
    assert cache.length == 10


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
def test_truncated_is_as_if_never_longer(model: Decoder, kind: Any, length: int) -> None:
    cache = filled(model, kind, 130)
    cache.truncate(length)
    assert cache.length <= length
    if cache.length < length:
        commit(model, cache, TOKENS[cache.length : length])
    difference = continuation(model, cache) - continuation(model, filled(model, kind, length))
    assert difference.abs().max() < TOLERANCE


def test_forks_share_and_part(model: Decoder, kind: Any) -> None:
    cache = filled(model, kind, 150)
    twins = [cache.fork(length) for length in (150, 100, 64, 0)]
    grandchild = twins[1].fork(80)
    cache.truncate(90)  # below what two of them share
    commit(model, cache, [5] * 60)
    commit(model, twins[0], [7] * 3)
    for twin in (*twins[1:], grandchild):
        difference = continuation(model, twin) - continuation(model, filled(model, kind, twin.length))
        assert difference.abs().max() < TOLERANCE
        commit(model, twin, TOKENS[twin.length : twin.length + 70])
        difference = continuation(model, twin) - continuation(model, filled(model, kind, twin.length))
        assert difference.abs().max() < TOLERANCE


def test_forks_with_room_to_spare_do_not_write_to_each_other(model: Decoder, kind: Any) -> None:
    """Long enough that buffers and codes have room behind what is shared."""
    texts = [[(token + salt) % 93 + 3 for token in TOKENS * 5] for salt in range(3)]
    length = 14 * BLOCK + 5
    cache = kind(model.shape)
    commit(model, cache, texts[0][:length])
    twins = [cache.fork(length), cache.fork(length)]
    for i in range(length, length + 3 * BLOCK, 50):
        for text, one in zip(texts, (cache, *twins), strict=True):
            commit(model, one, text[i : i + 50])
    for text, one in zip(texts, (cache, *twins), strict=True):
        alone = kind(model.shape)
        commit(model, alone, texts[0][:length])
        for i in range(length, length + 3 * BLOCK, 50):
            commit(model, alone, text[i : i + 50])
        assert (feed(model, one, [9, 8, 7])[1] - feed(model, alone, [9, 8, 7])[1]).abs().max() < TOLERANCE


def differently(model: Decoder, kind: Any) -> Iterator[torch.Tensor]:
    """Logits [260, V] of the same text around five blocks' borders: as one prefill chunk, in chunks of other sizes,
    and as trees of up to 13 rows of which a path is kept.
    """
    tokens, generator = (TOKENS * 2)[:320], random.Random(3)
    sizes: list[Callable[[], int]] = [lambda: 320, lambda: 64, lambda: 200, lambda: generator.randint(1, 90)]
    for size in sizes:
        cache, logits = kind(model.shape), []
        while cache.length < len(tokens):
            logits.append(commit(model, cache, tokens[cache.length : cache.length + size()]))
        yield torch.cat(logits)[60:]
    cache, logits = filled(model, kind, 60), []
    while cache.length < len(tokens):
        path = tokens[cache.length : cache.length + generator.randint(1, 6)]
        wrong = generator.randint(0, 7)
        rows = [*path, *(generator.randrange(3, 90) for _ in range(wrong))]
        parents = [*range(-1, len(path) - 1), *(generator.randint(-1, len(path) + i - 1) for i in range(wrong))]
        stage, out = feed(model, cache, rows, parents)
        cache.commit(stage, range(len(path)))
        logits.append(out[: len(path)])
    yield torch.cat(logits)


def test_what_a_row_reads_does_not_depend_on_its_pass(model: Decoder, kind: Any) -> None:
    """Rows of passes of different sizes differ in their last bits. Where a value lies between two codes within that,
    its code falls to the other side, and the rows that read it differ by more, by some 1e-4; so half of the rows are
    held to 1e-3, and all of them, to the bit, where passes don't differ (below). A wrong rule shows in all rows from
    block 2 on: codes of 8 bits move half of them by 9e-3 and more.
    """
    whole, *others = differently(model, kind)
    for other in others:
        apart = (whole - other).abs().amax(-1)
        assert apart.max() < 1e-4 if kind in (CACHES["dense"], *_ALL_ROWS) else apart.median() < 1e-3
        assert apart.max() < 0.02 * whole.abs().max()


_ALL_ROWS = [CACHES["offload --all-rows"], CACHES["disk --all-rows"]]


@torch.inference_mode()
def test_strictly_a_row_has_the_same_bits_in_every_pass(kind: Any, tmp_path: Path) -> None:
    model = load(write(oracle("gemma3"), tmp_path), strict=True)
    whole, *others = differently(model, kind)
    assert all(torch.equal(whole, other) for other in others)


def test_dense_grows_by_blocks_and_never_much_too_large() -> None:
    shape = Shape(2, 8, (None, None), torch.float32, torch.device("cpu"))
    cache = Dense(shape)
    keys = torch.zeros(1, 2, 8)
    moves, last = 0, cache.nbytes
    for _ in range(2000):
        stage = cache.open()
        rows = stage.add([-1])
        for layer in range(2):
            stage.put(layer, rows, keys, keys)
        cache.commit(stage, [0])
        moves, last = moves + (cache.nbytes != last), cache.nbytes
        assert cache.nbytes % (BLOCK * shape.row_bytes) == 0
        assert cache.nbytes <= max(BLOCK, 1.125 * cache.length + BLOCK, cache.length + 512 + BLOCK) * shape.row_bytes
    assert moves < 9


def test_a_tree_knows_its_paths() -> None:
    tree = Tree()
    assert tree.add([-1, 0, 1]) == slice(0, 3)
    chain = tree.is_chain
    assert tree.add([1, -1, 4]) == slice(3, 6)
    assert chain and not tree.is_chain  # noqa: PT018 - mypy takes the attribute for constant
    assert tree.depths == [0, 1, 2, 2, 0, 1]
    assert tree.path(3) == [0, 1, 3]
    rows = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert tree.ancestors(slice(0, 6)).int().tolist() == [*rows, [0, 0, 0, 0, 1, 1]]
    assert tree.ancestors(slice(3, 4), window=2).int().tolist() == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match="stands before its child"):
        tree.add([6])


def test_buffers_know_where_they_stand() -> None:
    buffers = Buffers(torch.zeros(3) for _ in range(2))
    assert list(buffers.places) == [each.data_ptr() for each in buffers]
    buffers[1] = torch.ones(5)
    for each in (buffers, deepcopy(buffers), copy(buffers)):
        assert list(each.places) == [tensor.data_ptr() for tensor in each]
