"""Which columns of a coded segment each token position reads exactly: for each key head those of the largest weights,
by scores over the codes (SpeCache, 2503.16163).

Takes queries and a segment of `GroupCodec`'s codes; gives columns, and the form in which a segment carries them with
their exact rows. Knows no store. A position's choice depends on its own query and columns, not on its forward pass.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from longspec.cache.codes import GroupCodec
from longspec.cache.native import Pieces, Reading, kernel, reading_of, segment_of, unfit
from longspec.cache.stage import Bounds, Segment
from longspec.kernels.boundary import pointer, workspace
from longspec.kernels.team import team

__all__ = ["CHOSEN", "NEXT", "Choice", "Chosen", "choose"]

CHOSEN = 64
"""Columns that a position reads exactly, for each key head."""

NEXT = 64
"""Columns behind those, which the next position may choose: a drift of one query to the next moves some of them up."""

_ROWS = 16
"""Positions at once, whose scores are kept for the reading."""

_SCORES_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """Columns by position and key head; -1 stands behind the last one where there are fewer."""

    columns: Tensor  # [q, K, c] int32, rising
    following: Tensor  # [q, K, f] int32: those that come next, the largest weight first
    scores: Tensor | None  # [K, G * q, n] fp32: queries times codes, for the kernel that reads on; the thread's own


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice with its exact rows."""

    columns: Tensor  # [q, K, c] int32
    slots: Tensor  # [q, K, c] int32: where in `rows` each stands
    rows: Tensor  # [s, 2, D]: keys and values
    scores: Tensor | None

    def within(self, first: int, last: int) -> Chosen:
        """The same for columns first..last alone."""
        inside = (self.columns >= first) & (self.columns < last)
        scores = None if self.scores is None else self.scores[:, :, first:last]
        return Chosen(torch.where(inside, self.columns - first, -1), self.slots, self.rows, scores)

    def put(self, row: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of decoded keys and values [K, n, D] with a position's exact rows in their places."""
        columns = self.columns[row].long()
        is_some = columns >= 0
        heads = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)[is_some]
        exact = self.rows[self.slots[row][is_some].long()].to(keys.dtype)
        keys, values = keys.clone(), values.clone()
        keys[heads, columns[is_some]], values[heads, columns[is_some]] = exact[:, 0], exact[:, 1]
        return keys, values


def choose(queries: Tensor, coded: Segment) -> Choice:
    """The choice of queries [q, H, D] among the columns that each may read."""
    if unfit(queries.dtype, queries.device, queries.shape[2]) is None:
        return _by_kernel(queries.contiguous(), coded)
    return _by_torch(queries, coded)


class _Choice(ctypes.Structure):
    """As in choose.h."""

    _fields_ = (
        ("reading", Reading),
        ("segment", Pieces),
        *((name, ctypes.c_int64) for name in ("count", "further", "stride")),
        *((name, ctypes.c_void_p) for name in ("chosen", "next", "scores", "workspace")),
    )


def _by_kernel(queries: Tensor, coded: Segment) -> Choice:
    library, (of_all, threads) = kernel(), team()
    if isinstance(library, str):
        raise RuntimeError(library)
    (q, heads, dim), key_heads, n = queries.shape, coded.key_heads, coded.columns
    at_once = max(1, min(_ROWS, _SCORES_NBYTES // (4 * heads * n)))
    columns = torch.empty(q, key_heads, CHOSEN, dtype=torch.int32)
    following = torch.empty(q, key_heads, NEXT, dtype=torch.int32)
    scores = workspace("choice scores", 4 * heads * n * min(q, at_once)).view(torch.float32)
    for first in range(0, q, at_once):
        rows, held = slice(first, min(first + at_once, q)), list[Tensor]()
        count = rows.stop - rows.start
        made = _Choice(
            reading_of(queries[rows], coded, dim**-0.5),
            segment_of(_of_rows(coded, rows), count, dim, held),
            *(CHOSEN, NEXT, n),
            pointer(columns[rows], torch.int32, count, key_heads, CHOSEN),
            pointer(following[rows], torch.int32, count, key_heads, NEXT),
            scores.data_ptr(),
        )
        room = workspace("choice", library.attention_choice_workspace(ctypes.byref(made), threads))
        made.workspace = room.data_ptr()
        library.attention_choose(ctypes.byref(made), threads, of_all)
    kept = None if q > at_once else scores[: heads * q * n].view(key_heads, heads // key_heads * q, n)
    return Choice(columns, following, kept)


def _of_rows(coded: Segment, rows: slice) -> Segment:
    """The segment with the bounds of these rows alone."""
    if coded.bounds is None:
        return coded
    bounds = Bounds(coded.bounds.first[rows], coded.bounds.last[rows])
    return Segment(coded.layers, coded.column, coded.columns, bounds, coded.start, coded.codec, coded.dtype)


def _by_torch(queries: Tensor, coded: Segment) -> Choice:
    """On a CPU row by row, so that a row's weights are of the same shapes in every pass, and so the same bits."""
    assert isinstance(coded.codec, GroupCodec)
    (q, _, dim), n = queries.shape, coded.columns
    keys = coded.codec.keys(coded.tensors, torch.float32).transpose(1, 2)  # [K, D, n]
    grouped = queries.float().reshape(q, len(keys), -1, dim) * dim**-0.5
    if queries.device.type != "cpu":
        allowed = None if coded.bounds is None else coded.bounds.allowed(n)[:, None, None]
        scores = grouped @ keys
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        found = _best(torch.softmax(scores, -1).nan_to_num_(0.0).sum(2))
        if allowed is not None:
            is_some = allowed[:, 0].expand(-1, len(keys), -1).gather(-1, found.clamp(min=0)) & (found >= 0)
            found = found.masked_fill(~is_some, -1)
    else:
        found = torch.empty(q, len(keys), CHOSEN + NEXT, dtype=torch.int64)
        bounds = [(0, n)] * q
        if coded.bounds is not None:
            bounds = list(zip(coded.bounds.first.tolist(), coded.bounds.last.tolist(), strict=True))
        for i, (first, last) in enumerate(bounds):
            best = _best(torch.softmax(grouped[i] @ keys[:, :, first : max(first, last)], -1).sum(1))
            found[i] = torch.where(best >= 0, best + first, -1)
    chosen = found[..., :CHOSEN]
    rising = chosen.masked_fill(chosen < 0, n).sort(-1).values
    return Choice(rising.masked_fill(rising == n, -1).int(), found[..., CHOSEN:].int().contiguous(), None)


def _best(weights: Tensor) -> Tensor:
    """Indices [..., c + f] of the largest weights [..., n], the largest first; -1 behind the last."""
    most = CHOSEN + NEXT
    best = weights.topk(min(most, weights.shape[-1]), -1).indices
    return torch.nn.functional.pad(best, (0, most - best.shape[-1]), value=-1)
