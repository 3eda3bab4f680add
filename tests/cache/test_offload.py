"""The offloaded cache's parts: 2-bit codes in groups, the choice of rows by scores over them, the reading of codes and
exact rows together, and the rows that are there before a pass asks for them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import load, oracle, write
from support.passes import TOKENS, filled
from support.passes import write as commit
from torch import Tensor

from longspec.attention import attend, attend_strictly, reference
from longspec.cache import BLOCK, CACHES, Bounds, Segment, Shape
from longspec.cache.choice import CHOSEN, NEXT, Chosen, _by_torch, choose
from longspec.cache.codes import Codec, GroupCodec
from longspec.cache.disk import FileStore
from longspec.cache.fetched import HELD, Fetched
from longspec.cache.native import unfit
from longspec.cache.offload import HostStore
from longspec.model.decoder import Decoder

CPU = torch.device("cpu")
WITH_KERNEL = pytest.mark.skipif(unfit(torch.bfloat16, CPU, 64) is not None, reason="needs the C kernel")


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def coded(heads: int, blocks: int, dim: int, dtype: torch.dtype, bounds: Bounds | None = None) -> Segment:
    codec = GroupCodec()
    keys, values = (drawn(heads, blocks, BLOCK, dim, seed=i).to(dtype) for i in (1, 2))
    return Segment.coded(codec, codec.encode(keys, values), dtype, bounds, 3 * BLOCK)


# --- codes


@pytest.mark.parametrize("dim", [8, 24, 32, 64, 96])
def test_codes_in_groups_are_nearer_than_codes_of_a_block(dim: int) -> None:
    rows = drawn(2, 3, 5, BLOCK, dim) * torch.logspace(-1, 0, dim) + torch.linspace(-3, 3, dim)
    errors = []
    for codec in (Codec(2), GroupCodec()):
        codes = codec.encode(rows[0], rows[1])
        room = codec.empty(Shape(3, dim, (None,), torch.float32, CPU), 5)
        assert [(each.shape, each.dtype) for each in room] == [(each.shape, each.dtype) for each in codes]
        both = torch.stack(codec.decode(codes, torch.float32)).view(rows.shape)
        errors.append((both - rows).square().mean((1, 2, 3, 4)))
    assert errors[1][0] < 0.9 * errors[0][0]
    assert errors[1][1] < 0.9 * errors[0][1] or dim <= 32  # a value's groups are all of its channels then
    assert torch.equal(GroupCodec().keys(codes, torch.float32), both[0].flatten(1, 2))


def test_flat_and_huge_groups_stay_finite() -> None:
    for value in (0.0, 1e-9, 3.0, -500.0, 1e6, -1e6):
        rows = torch.full((3, 1, BLOCK, 24), value)
        codec = GroupCodec()
        for decoded in codec.decode(codec.encode(rows, rows), torch.float32):
            assert decoded.isfinite().all()
            assert (decoded - value).abs().max() <= max(abs(value) * 0.02, 1e-6)  # half of a step, a 30th


def test_a_value_takes_two_bits_and_a_half() -> None:
    shape = Shape(3, 64, (None,), torch.bfloat16, CPU)
    assert sum(each.nbytes for each in GroupCodec().empty(shape, 10)) * 8 == 2.5 * 2 * 3 * 10 * BLOCK * 64


# --- choice


def test_the_columns_are_those_of_the_largest_weights() -> None:
    """By the naive form: softmax of each query head, summed over a key head's, and the best of all."""
    bounds = Bounds(torch.tensor([0, 0, 130, 5]), torch.tensor([640, 448, 576, 40]))
    part, queries = coded(2, 10, 32, torch.float32, bounds), drawn(4, 6, 32, seed=5)
    keys = GroupCodec().keys(part.tensors, torch.float32)
    found = choose(queries, part)
    assert found.columns.shape == (4, 2, CHOSEN)
    for row, head in np.ndindex(4, 2):
        first, last = int(bounds.first[row]), int(bounds.last[row])
        own = queries[row].view(2, 3, 32)[head] @ keys[head, first:last].T * 32**-0.5
        weights = torch.softmax(own, -1).sum(0)
        best = weights.argsort(descending=True)[: CHOSEN + NEXT] + first
        chosen = [column for column in found.columns[row, head].tolist() if column >= 0]
        assert chosen == sorted(best[:CHOSEN].tolist())
        assert [column for column in found.following[row, head].tolist() if column >= 0] == best[CHOSEN:].tolist()


@WITH_KERNEL
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_the_kernel_chooses_as_torch_does(rows: int) -> None:
    first, last = torch.arange(rows) * 7 % 300, torch.full((rows,), 9 * BLOCK)
    last[-1] = first[-1] + 3
    part = coded(3, 9, 64, torch.bfloat16, Bounds(first, last))
    queries = drawn(rows, 9, 64, seed=7).bfloat16()
    ours, torchs = choose(queries, part), _by_torch(queries, part)
    # The kernel codes a query in 8 bits: weights near the 64th, some thousandths apart, change their order.
    for ourselves, theirs in zip(
        ours.columns.flatten(0, 1).tolist(), torchs.columns.flatten(0, 1).tolist(), strict=True
    ):
        assert len({*ourselves} & {*theirs}) >= len({*theirs}) - 4
        rising = [column for column in ourselves if column >= 0]
        assert rising == sorted(set(rising))
        assert ourselves[len(rising) :] == [-1] * (CHOSEN - len(rising))
    assert (ours.columns[-1, :, 3:] == -1).all()


@WITH_KERNEL
def test_a_rows_choice_does_not_depend_on_its_companions() -> None:
    queries = drawn(40, 9, 64, seed=7).bfloat16()
    last = torch.full((40,), 9 * BLOCK)
    whole = choose(queries, coded(3, 9, 64, torch.bfloat16, Bounds(torch.zeros(40, dtype=torch.int64), last)))
    for row in (0, 17, 39):
        alone = choose(queries[row : row + 1], coded(3, 9, 64, torch.bfloat16))
        assert torch.equal(alone.columns[0], whole.columns[row])
        assert torch.equal(alone.following[0], whole.following[row])


# --- reading


def exact_rows(part: Segment, queries: Tensor) -> tuple[Segment, Tensor, Tensor]:
    """The segment with rows that differ from its codes, and all keys and values as each row reads them [q, K, n, D]."""
    choice = choose(queries, part)
    q, heads, count = choice.columns.shape
    rows = drawn(q * heads * count, 2, queries.shape[2], seed=9).to(queries.dtype)
    slots = torch.randperm(q * heads * count, generator=torch.Generator().manual_seed(1)).view(q, heads, count).int()
    chosen = Chosen(choice.columns, slots, rows, choice.scores)
    made = Segment(part.layers, 0, part.columns, part.bounds, part.start, part.codec, part.dtype, chosen)
    assert part.codec is not None
    assert part.dtype is not None
    keys, values = part.codec.decode(part.tensors, part.dtype)
    each = [chosen.put(row, keys, values) for row in range(q)]
    return made, torch.stack([pair[0] for pair in each]), torch.stack([pair[1] for pair in each])


def naive(
    queries: Tensor, keys: Tensor, values: Tensor, bounds: Bounds, near: Segment, softcap: float | None
) -> Tensor:
    """Softmax attention in fp64, row by row, over [q, K, n, D] and a dense segment behind it."""
    out = torch.empty(queries.shape, dtype=torch.float64)
    groups = queries.shape[1] // keys.shape[1]
    for row, head in np.ndindex(*queries.shape[:2]):
        k = torch.cat((keys[row, head // groups], near.keys[head // groups])).double()
        v = torch.cat((values[row, head // groups], near.values[head // groups])).double()
        scores = queries[row, head].double() @ k.T * 0.2
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        n = keys.shape[2]
        hidden = torch.arange(len(k))
        scores[(hidden < n) & ((hidden < bounds.first[row]) | (hidden >= bounds.last[row]))] = float("-inf")
        out[row, head] = torch.softmax(scores, -1) @ v
    return out


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 5), (torch.bfloat16, 70)]
)
def test_codes_and_exact_rows_are_read_together(dtype: torch.dtype, rows: int, softcap: float | None) -> None:
    """By the kernel in bf16, by torch in fp32; as a whole and cut at a block, as a view cuts it."""
    if dtype == torch.bfloat16 and unfit(dtype, CPU, 64) is not None:
        pytest.skip("needs the C kernel")
    first, last = torch.arange(rows) * 3 % 200, torch.full((rows,), 9 * BLOCK)
    last[-1] = first[-1] + 40  # fewer than are chosen
    bounds = Bounds(first, last)
    queries = drawn(rows, 6, 64, seed=7).to(dtype)
    part, keys, values = exact_rows(coded(2, 9, 64, dtype, bounds), queries)
    near_keys, near_values = (drawn(2, 30, 64, seed=i).to(dtype) for i in (3, 4))
    near = Segment.dense(near_keys, near_values, start=part.start + part.columns)
    want = naive(queries, keys, values, bounds, near, softcap)
    bar = 2e-6 if dtype == torch.float32 else 0.02
    for parts in ([part, near], [part.cut(0, 4 * BLOCK), part.cut(4 * BLOCK, 9 * BLOCK), near]):
        assert (attend(queries, parts, 0.2, softcap).double() - want).abs().max() < bar
        assert (attend_strictly(queries, parts, 0.2, softcap).double() - want).abs().max() < bar
    assert part.chosen is not None
    unknown = Segment(part.layers, 0, part.columns, bounds, part.start, part.codec, part.dtype,
                      Chosen(part.chosen.columns, part.chosen.slots, part.chosen.rows, None))  # fmt: skip
    assert torch.equal(attend(queries, [unknown, near], 0.2, softcap), attend(queries, [part, near], 0.2, softcap))


def test_a_row_that_reads_nothing_of_the_codes_has_no_weight_there() -> None:
    bounds = Bounds(torch.tensor([0, 5]), torch.tensor([128, 5]))
    queries = drawn(2, 4, 32, seed=3)
    part, _, _ = exact_rows(coded(2, 2, 32, torch.float32, bounds), queries)
    [piece] = part.pieces()
    output, lse = reference.read(queries, piece, 0.2)
    assert (lse[1] == float("-inf")).all()
    assert (output[1] == 0).all()


# --- rows that are there early


SHAPE = Shape(2, 32, (None, None), torch.float32, CPU)
BLOCKS = 12


class Counting:
    """A store that tells how many rows were read by whom, and can be stopped."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.read = {"pass": 0, "thread": 0}
        self.error: Exception | None = None

    def gather(self, layer: int, heads: Any, positions: Any, to: Any, places: Any) -> None:
        own = threading.current_thread() is threading.main_thread()
        self.read["pass" if own else "thread"] += len(heads)
        if self.error is not None and not own:
            raise self.error
        self.store.gather(layer, heads, positions, to, places)


@pytest.fixture(params=["host, kernel", "host, torch", "disk, kernel"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counting:
    if request.param == "host, torch":
        for module in ("fetched", "native"):
            monkeypatch.setattr(f"longspec.cache.{module}.kernel", lambda: "there is no compiler")
    made = FileStore(SHAPE) if request.param.startswith("disk") else HostStore(SHAPE)
    for layer in range(SHAPE.layers):
        for block in range(BLOCKS):
            made.write(layer, block, rows_of(layer)[:, :, block * BLOCK : (block + 1) * BLOCK])
    return Counting(made)


def rows_of(layer: int) -> Tensor:
    """All rows [2, K, n, D] of a layer."""
    return drawn(2, 2, BLOCKS * BLOCK, 32, seed=20 + layer)


def check(fetched: Fetched, layer: int, queries: Tensor, start: int = 10 * BLOCK) -> None:
    """What is gathered are the store's rows, or the buffer's from `start` on."""
    part = coded(2, BLOCKS - 3, 32, torch.float32)
    choice = choose(queries, part)
    buffer = rows_of(layer)[:, :, start:] + 100
    chosen = fetched.gather(layer, choice, part, buffer, start)
    for row, head, i in np.ndindex(*choice.columns.shape):
        position = int(choice.columns[row, head, i]) + part.start
        want = rows_of(layer)[:, head, position] + (100 if position >= start else 0)
        assert torch.equal(chosen.rows[int(chosen.slots[row, head, i])], want)


def test_stores_read_single_rows(store: Counting) -> None:
    heads, positions = np.array([0, 0, 0, 1, 1]), np.array([5, 6, 300, 299, 300])
    read = np.empty((5, 2 * 32 * 4), np.uint8)
    store.gather(1, heads, positions, read, np.array([0, 1, 3, 2, 4]))
    found = torch.from_numpy(read).view(torch.float32).view(5, 2, 32)[[0, 1, 3, 2, 4]]
    assert torch.equal(found, rows_of(1)[:, heads, positions].transpose(0, 1))
    assert torch.equal(store.store.read(1, 4), rows_of(1)[:, :, 4 * BLOCK : 5 * BLOCK])


def test_what_a_pass_chose_is_there_for_the_next_one(store: Counting) -> None:
    """And what came next in its choice, which a thread reads."""
    fetched = Fetched(SHAPE, store)
    query = drawn(1, 4, 32, seed=1)
    for layer in range(2):
        check(fetched, layer, query, start=BLOCKS * BLOCK)
    assert store.read == {"pass": 2 * 2 * CHOSEN, "thread": 0}
    assert (fetched.asked, fetched.missed, fetched.ahead) == (256, 256, 0)
    fetched.launch()
    for layer in range(2):
        check(fetched, layer, query, start=BLOCKS * BLOCK)
    assert store.read == {"pass": 256, "thread": 2 * 2 * NEXT}
    assert (fetched.asked, fetched.missed, fetched.ahead) == (512, 256, 0)
    fetched.launch()
    for i in range(1, 6):  # a drift of the query
        for layer in range(2):
            check(fetched, layer, query + i * 0.1 * drawn(1, 4, 32, seed=30), start=BLOCKS * BLOCK)
        fetched.launch()
    assert fetched.ahead > 0
    assert fetched.missed < 0.3 * fetched.asked
    assert sum(each.nbytes for each in fetched.tensors()) <= 2 * HELD * SHAPE.row_bytes // SHAPE.layers * 2


def test_rows_of_a_tree_are_held_together(store: Counting) -> None:
    """More than stay: those that most positions chose do; those of the residual window never."""
    fetched = Fetched(SHAPE, store)
    queries = drawn(12, 4, 32, seed=1)
    check(fetched, 0, queries)
    fetched.launch()
    assert sum(each.nbytes for each in fetched.tensors()) <= HELD * SHAPE.row_bytes // SHAPE.layers
    before = dict(store.read)
    check(fetched, 0, queries)
    assert store.read["thread"] == before["thread"] == 0
    assert 0 < store.read["pass"] - before["pass"] < before["pass"]
    check(fetched, 0, queries, start=4 * BLOCK)
    check(fetched, 0, queries, start=BLOCKS * BLOCK)


def test_a_thread_that_fails_costs_nothing_but_time(store: Counting) -> None:
    fetched = Fetched(SHAPE, store)
    store.error = OSError("the disk is gone")
    check(fetched, 0, drawn(1, 4, 32, seed=1), start=BLOCKS * BLOCK)
    fetched.launch()
    check(fetched, 0, drawn(1, 4, 32, seed=2), start=BLOCKS * BLOCK)
    assert fetched.ahead == 0
    fetched.forget()
    assert sum(each.nbytes for each in fetched.tensors()) == 0
    check(fetched, 0, drawn(1, 4, 32, seed=2), start=BLOCKS * BLOCK)


# --- the whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    with torch.inference_mode():
        yield load(write(oracle("llama"), tmp_path_factory.mktemp("offload")))


@pytest.mark.parametrize("kind", ["offload", "disk"])
def test_a_text_that_is_cut_to_nothing_begins_anew(model: Decoder, kind: str) -> None:
    """Its blocks are written over: no row of the old text may be held."""
    cache: Any = filled(model, CACHES[kind], 250)
    for token in TOKENS[250:260]:
        commit(model, cache, [token])
    assert cache.fetched.asked > 0
    cache.truncate(0)
    other = TOKENS[::-1][:250]
    commit(model, cache, other)
    fresh: Any = CACHES[kind](model.shape)
    commit(model, fresh, other)
    for token in TOKENS[:10]:
        assert torch.equal(commit(model, cache, [token]), commit(model, fresh, [token]))
