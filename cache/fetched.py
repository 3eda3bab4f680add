"""Exact rows of an offloaded cache's old blocks on the device: those that the last pass chose, and those fetched ahead.

Takes what a pass chose at a layer and a store; gives the rows. A pass reads the rows that its positions chose, in any
case: what is here already is copied from the buffer of the pass before, the rest is read from the store while the pass
waits. Positions that follow each other choose much the same rows, so that the union of what a pass chose is what the
next one begins with; a draft's rows have chosen by the queries of the tokens that follow. Behind a pass a thread reads,
of the columns that came next in its choice, those that there is room for. Buffers are swapped when the layer is read
again.
"""

from __future__ import annotations

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
from longspec.cache.stage import Shape

__all__ = ["HELD", "Fetched", "Rows"]

HELD = CHOSEN + NEXT
"""Rows that stay on the device between passes, for each layer and key head."""

_HEAD = 32
"""A row is named by its key head and its position: head << 32 | position."""

_KEPT, _AHEAD = 1, 2  # of a held row: chosen by the last pass; fetched by the thread

Names = Any  # an int64 array [n], rising


class Rows(Protocol):
    """What rows are read from."""

    def gather(self, layer: int, heads: Any, positions: Any, to: Any) -> None:
        """Read single rows, by arrays [n] of key heads and positions, into an array [n, bytes of a key and a value]."""
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

    def gather(self, layer: int, choice: Choice, first: int, buffer: Tensor, start: int) -> Chosen:
        """The choice's exact rows. first: the position of its column 0. buffer: dense rows [2, K, n, D] from position
        `start` on, which aren't in the store yet, or may be overwritten there.
        """
        wanted = _named(choice.columns, first)  # [q, K, c]
        flat, counts = _distinct(wanted)
        names = np.union1d(flat, self._following(choice, first, len(flat), start))
        slots = np.searchsorted(names, flat)
        is_wanted = np.zeros(len(names), bool)
        is_wanted[slots] = True
        held = self._swapped(layer)
        place = np.minimum(np.searchsorted(held.names, names), max(0, len(held.names) - 1))
        state = np.where(held.names[place] == names, held.state[place], 0) if len(held.names) else np.zeros_like(place)
        is_near = (names & ((1 << _HEAD) - 1)) >= start
        state[is_near] = 0
        rows = torch.empty(len(names), 2, self._shape.head_dim, dtype=self._shape.dtype, device=self._shape.device)
        if (kept := np.flatnonzero(state)).size:
            rows[torch.from_numpy(kept)] = held.rows[torch.from_numpy(place[kept])]
        if (near := np.flatnonzero(is_near)).size:
            heads, positions = (torch.from_numpy(each) for each in _parts(names[near]))
            rows[torch.from_numpy(near)] = buffer[:, heads, positions - start].transpose(0, 1)
        missing = np.flatnonzero(is_wanted & (state == 0) & ~is_near)
        self._read(layer, names, missing, rows)
        self.asked += int((is_wanted & ~is_near).sum())
        self.ahead += int((is_wanted & (state == _AHEAD)).sum())
        self.missed += len(missing)
        state[(is_wanted & ~is_near) | (state != 0)] = _KEPT
        held = _Held(names, rows, state.astype(np.uint8))
        self._keep(layer, held, slots, np.where(is_near[slots], 0, counts), whole=not is_near.any())
        found = np.where(wanted < 0, 0, np.searchsorted(names, wanted)).astype(np.int32)
        return Chosen(choice.columns, torch.from_numpy(found).to(rows.device), rows, choice.scores)

    def launch(self) -> None:
        """Have the thread fetch what the last pass's choices leave room for."""
        if self._wishes:
            wishes, self._wishes = self._wishes, {}
            for held in wishes.values():
                held.done = threading.Event()
            _reader(os.getpid()).submit(self._fetch, wishes)

    def _following(self, choice: Choice, first: int, chosen: int, start: int) -> Names:
        """Names of the columns that come next in each position's choice, as many as there is room for."""
        q, heads, _ = choice.following.shape
        room = max(0, HELD * heads - chosen) // (q * heads)
        names, _ = _distinct(_named(choice.following[:, :, :room], first))
        return names[(names & ((1 << _HEAD) - 1)) < start]

    def _swapped(self, layer: int) -> _Held:
        """What the layer holds, when the thread is through with it."""
        held = self._held[layer]
        if held.done is not None:
            held.done.wait()
        return held

    def _keep(self, layer: int, held: _Held, slots: Any, counts: Any, *, whole: bool) -> None:
        """Hold a pass's rows for the next one, with those to be fetched; if they are too many, or not `whole`, at most
        HELD for each head of those at `slots`, which most positions chose. counts: how many did, 0 for what can't stay.
        """
        self._wishes.pop(layer, None)
        most = HELD * self._shape.key_heads
        if len(held.names) > most or not whole:
            order = np.argsort(-counts, kind="stable")[:most]
            best = np.sort(slots[order[counts[order] > 0]])
            held = _Held(held.names[best], held.rows[torch.from_numpy(best)], held.state[best])
        elif (held.state == 0).any():
            self._wishes[layer] = held
        self._held[layer] = held

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
        shape = self._shape
        read = np.empty((missing.size, 2 * shape.head_dim * shape.dtype.itemsize), np.uint8)
        self._store.gather(layer, *_parts(names[missing]), read)
        found = torch.from_numpy(read).view(shape.dtype).view(-1, 2, shape.head_dim)
        rows[torch.from_numpy(missing)] = found.to(rows.device)


@cache
def _reader(_process: int) -> ThreadPoolExecutor:
    """The process's reader, a single thread; a forked process has a parent's cache, and not its threads."""
    return ThreadPoolExecutor(1, thread_name_prefix="longspec-rows")


def _named(columns: Tensor, first: int) -> Any:
    """Names [q, K, c] of columns, which count from position `first`; -1 for none."""
    found = columns.cpu().numpy().astype(np.int64)
    heads = np.arange(found.shape[1], dtype=np.int64)[:, None] << _HEAD
    return np.where(found >= 0, found + first + heads, -1)


def _distinct(names: Any) -> tuple[Names, Any]:
    """All names, rising, and how often each is there."""
    flat = names[names >= 0]
    if len(names) == 1 and len(flat) == names.size and (np.diff(flat) > 0).all():  # one position's columns rise already
        return flat, np.ones(len(flat), np.int64)
    return np.unique(flat, return_counts=True)


def _parts(names: Names) -> tuple[Any, Any]:
    """Key heads and positions."""
    return names >> _HEAD, names & ((1 << _HEAD) - 1)
