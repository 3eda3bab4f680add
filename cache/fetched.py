"""Exact rows of an offloaded cache's old blocks on the device: those that the last pass chose, and those fetched ahead.

Takes what a pass chose at a layer and a store; gives the rows. A pass reads the rows that its positions chose, in any
case: what is here already is copied from the buffer of the pass before, the rest is read from the store while the pass
waits. Positions that follow each other choose much the same rows, so that the union of what a pass chose is what the
next one begins with; a draft's rows have chosen by the queries of the tokens that follow. Behind a pass a thread reads,
of the columns that came next in its choice, those that there is room for. Buffers are swapped when the layer is read
again.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from longspec.cache.choice import CHOSEN, NEXT, Choice, Chosen
from longspec.cache.native import kernel
from longspec.cache.stage import Segment, Shape

__all__ = ["HELD", "Fetched", "Rows"]

HELD = 2 * (CHOSEN + NEXT)
"""Rows that stay on the device between passes, for each layer and key head: the rows of a draft choose more together
than one, and a pass of one position holds half of them.
"""

_HEAD = 32
"""A row is named by its key head and its position: head << 32 | position."""

_POSITION = (1 << _HEAD) - 1

_KEPT, _AHEAD = 1, 2  # of a held row: chosen by the last pass; fetched by the thread

Names = Any  # an int64 array [n], rising


class Rows(Protocol):
    """What rows are read from."""

    def gather(self, layer: int, heads: Any, positions: Any, to: Any, places: Any) -> None:
        """Read single rows, by arrays [n] of key heads and positions, to places [n] of an array [.., bytes of a row]: a
        key and a value.
        """
        ...


@dataclass(slots=True)
class _Held:
    """One layer's rows. state: of each row, 0 while it isn't there. done: set when the thread is through with them."""

    names: Names
    rows: Tensor  # [n, 2, D] on the device
    state: Any  # uint8 [n]
    done: threading.Event | None = None


class Fetched:
    """Rows of all layers of one cache."""

    def __init__(self, shape: Shape, store: Rows) -> None:
        self._shape = shape
        self._store = store
        self._held: list[_Held] = []
        self._wishes: dict[int, _Held] = {}  # layers whose rows are to be fetched ahead
        self.forget()
        self.asked = 0  # rows of the store that passes chose
        self.missed = 0  # those of them that a pass had to wait for
        self.ahead = 0  # those of them that the thread had fetched

    def tensors(self) -> Iterator[Tensor]:
        return (held.rows for held in self._held)

    def forget(self) -> None:
        """Let go of all rows: the store's are to be overwritten."""
        for held in self._held:
            if held.done is not None:
                held.done.wait()
        shape = self._shape
        none = shape.empty((0, 2, shape.head_dim), shape.dtype)
        self._held = [_Held(np.empty(0, np.int64), none, np.empty(0, np.uint8)) for _ in shape.windows]
        self._wishes.clear()

    def gather(self, layer: int, choice: Choice, coded: Segment, buffer: Tensor, start: int) -> Chosen:
        """The exact rows of a choice among a segment's columns. buffer: dense rows [2, K, n, D] from position `start`
        on, which aren't in the store yet, or may be overwritten there.
        """
        found = kernel()
        held = self._swapped(layer)
        if isinstance(found, str) or buffer.device.type != "cpu" or buffer.stride()[2:] != (buffer.shape[3], 1):
            made = _gathered(choice, coded, buffer, start, held)
        else:
            made = _by_kernel(found, choice, coded, buffer, start, held)
        self._read(layer, made.names, made.missing, made.rows)
        self.asked += made.asked
        self.ahead += made.ahead
        self.missed += len(made.missing)
        self._keep(layer, made)
        return Chosen(choice.columns, made.slots, made.rows, choice.scores)

    def launch(self) -> None:
        """Have the thread fetch what the last pass's choices leave room for."""
        if self._wishes:
            wishes, self._wishes = self._wishes, {}
            for held in wishes.values():
                held.done = threading.Event()
            _reader(os.getpid()).submit(self._fetch, wishes)

    def _swapped(self, layer: int) -> _Held:
        """What the layer holds, when the thread is through with it."""
        held = self._held[layer]
        if held.done is not None:
            held.done.wait()
        return held

    def _keep(self, layer: int, made: _Gathered) -> None:
        """Hold a pass's rows for the next one, with those to be fetched: at most HELD for each head, which most
        positions chose. The buffer's stay out of it.
        """
        self._wishes.pop(layer, None)
        most = HELD * self._shape.key_heads
        names, rows, state = made.names, made.rows, made.state
        if len(names) > most or made.close:
            counts = np.where(state == 0, 0, made.counts)
            order = np.argsort(-counts, kind="stable")[:most]
            best = np.sort(order[counts[order] > 0])
            names, rows, state = names[best], rows[torch.from_numpy(best)], state[best]
        self._held[layer] = held = _Held(names, rows, state)
        if (state == 0).any():
            self._wishes[layer] = held

    @torch.inference_mode()  # else it may not write to rows that a pass made in that mode
    def _fetch(self, wishes: dict[int, _Held]) -> None:
        """The thread's work, layer by layer in the order in which the next pass comes to them."""
        for layer in sorted(wishes):
            held = wishes[layer]
            assert held.done is not None
            try:
                missing = np.flatnonzero(held.state == 0)
                self._read(layer, held.names, missing, held.rows)
                held.state[missing] = _AHEAD
            except Exception:  # noqa: BLE001, S110 - the pass that needs these rows reads them, and tells of the error
                pass
            finally:
                held.done.set()

    def _read(self, layer: int, names: Names, missing: Any, rows: Tensor) -> None:
        """Read the rows `missing` of these names from the store."""
        if not missing.size:
            return
        there = rows.device.type == "cpu"
        to = rows if there else torch.empty(missing.size, *rows.shape[1:], dtype=rows.dtype)
        places = missing if there else np.arange(missing.size)
        self._store.gather(layer, *_parts(names[missing]), to.view(torch.uint8).flatten(1).numpy(), places)
        if not there:
            rows[torch.from_numpy(missing)] = to.to(rows.device)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """What a pass reads at a layer, and what may be held of it: names, rows and states as of `_Held`."""

    names: Names
    rows: Tensor
    state: Any
    counts: Any  # [n]: how many positions chose each
    slots: Tensor  # [q, K, c] int32
    missing: Any  # places of rows that are to be read now
    asked: int  # rows of the store that were chosen
    ahead: int  # of them, those that the thread had fetched
    close: int  # rows of the buffer


def _gathered(choice: Choice, coded: Segment, buffer: Tensor, start: int, held: _Held) -> _Gathered:
    """By numpy and torch's operators: what the kernel is held to."""
    wanted = _named(choice.columns, coded.start)  # [q, K, c]
    flat, chosen = np.unique(wanted[wanted >= 0], return_counts=True)
    following = _named(choice.following[:, :, : _room(choice)], coded.start)
    following = following[(following >= 0) & (following & _POSITION < start)]
    names = np.union1d(flat, following)
    counts = np.zeros(len(names), np.int32)
    counts[np.searchsorted(names, flat)] = chosen
    is_wanted, is_near = counts > 0, names & _POSITION >= start
    state = np.zeros(len(names), np.uint8)
    if len(held.names):
        place = np.minimum(np.searchsorted(held.names, names), len(held.names) - 1)
        state = np.where((held.names[place] == names) & ~is_near, held.state[place], 0).astype(np.uint8)
    rows = torch.empty(len(names), 2, buffer.shape[3], dtype=buffer.dtype, device=buffer.device)
    if (kept := np.flatnonzero(state)).size:
        rows[torch.from_numpy(kept)] = held.rows[torch.from_numpy(place[kept])]
    if (near := np.flatnonzero(is_near)).size:
        heads, positions = (torch.from_numpy(each) for each in _parts(names[near]))
        rows[torch.from_numpy(near)] = buffer[:, heads, positions - start].transpose(0, 1)
    missing = np.flatnonzero(is_wanted & (state == 0) & ~is_near)
    asked, ahead = int((is_wanted & ~is_near).sum()), int((is_wanted & (state == _AHEAD)).sum())
    state[(is_wanted & ~is_near) | (state != 0)] = _KEPT
    slots = np.where(wanted < 0, 0, np.searchsorted(names, wanted)).astype(np.int32)
    slots_there = torch.from_numpy(slots).to(buffer.device)
    return _Gathered(names, rows, state, counts, slots_there, missing, asked, ahead, int(is_near.sum()))


class _Gathering(ctypes.Structure):
    """As in rows.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("chosen", "next")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "count", "further", "room")),
        *((name, ctypes.c_int64) for name in ("columns", "first", "near", "bytes")),
        *((name, ctypes.c_void_p) for name in ("held", "held_state", "held_rows", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("held_count", "head")),
        *((name, ctypes.c_void_p) for name in ("names", "state", "to", "slots", "counts", "missing", "marks", "ranks")),
        *((name, ctypes.c_int64) for name in ("found", "missed", "asked", "ahead", "close")),
    )


def _by_kernel(
    library: ctypes.CDLL, choice: Choice, coded: Segment, buffer: Tensor, start: int, held: _Held
) -> _Gathered:
    """The same by one call of C: some 200 microseconds less, in each layer."""
    (q, heads, count), room, size = choice.columns.shape, _room(choice), buffer.element_size()
    most, words = min(q * heads * (count + room), heads * coded.columns), -(-coded.columns // 64)
    names, state = np.empty(most, np.int64), np.empty(most, np.uint8)
    counts, missing, ranks = (np.empty(each, np.int32) for each in (most, most, words))
    marks, slots = np.empty(2 * words, np.uint64), torch.empty_like(choice.columns)
    rows = torch.empty(most, 2, buffer.shape[3], dtype=buffer.dtype)
    keys = buffer.data_ptr()
    made = _Gathering(
        *(choice.columns.data_ptr(), choice.following.data_ptr()),
        *(q, heads, count, choice.following.shape[2], room),
        *(coded.columns, coded.start, start, 2 * buffer.shape[3] * size),
        *(held.names.ctypes.data, held.state.ctypes.data, held.rows.data_ptr(), keys, keys + buffer.stride(0) * size),
        *(len(held.names), buffer.stride(1) * size),
        *(names.ctypes.data, state.ctypes.data, rows.data_ptr(), slots.data_ptr()),
        *(each.ctypes.data for each in (counts, missing, marks, ranks)),
    )
    library.rows_gather(ctypes.byref(made))
    n = made.found
    if n < most and q > 1:  # what is held must not hold the room for more
        rows = rows[:n].clone()
    found = names[:n], rows[:n], state[:n], counts[:n], slots, missing[: made.missed].astype(np.int64)
    return _Gathered(*found, made.asked, made.ahead, made.close)


def _room(choice: Choice) -> int:
    """How many of a position's next columns are fetched ahead: those of a single one. A draft's rows leave no room."""
    return NEXT if len(choice.columns) == 1 else 0


@cache
def _reader(_process: int) -> ThreadPoolExecutor:
    """The process's reader, a single thread; a forked process has a parent's cache, and not its threads."""
    return ThreadPoolExecutor(1, thread_name_prefix="longspec-rows")


def _named(columns: Tensor, first: int) -> Any:
    """Names [q, K, c] of columns, which count from position `first`; -1 for none."""
    found = columns.cpu().numpy().astype(np.int64)
    heads = np.arange(found.shape[1], dtype=np.int64)[:, None] << _HEAD
    return np.where(found >= 0, found + first + heads, -1)


def _parts(names: Names) -> tuple[Any, Any]:
    """Key heads and positions."""
    return names >> _HEAD, names & _POSITION
