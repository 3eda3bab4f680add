"""Attention over the KV segments of a cache.

Each segment is attended to on its own, and the results are merged by their log-sum-exp, so that a cache needs a
kernel for its own blocks only and a tree mask never reaches a quantized kernel (LongSpec's hybrid tree attention,
arXiv 2502.17421, without its restriction to two segments). A single segment needs no log-sum-exp and takes a shorter
path.

    softmax over A and B together  =  w * softmax over A + (1 - w) * softmax over B,   w = sigmoid(lse_A - lse_B)

A head's sink (gpt-oss) is one more column, of a learned score and no value: B is that column, and its softmax is 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from longspec.attention import flash, reference, triton
from longspec.attention import native as cpu
from longspec.attention.batch_invariant import attend_strictly
from longspec.cache.stage import Segment

__all__ = ["BACKENDS", "Backend", "attend", "attend_strictly", "backends", "merge"]


class Backend(Protocol):
    """A module with a faster attention kernel than the reference, for some segments."""

    USE: str  # its purpose, for the user

    def missing(self) -> str | None:
        """The reason why this machine can't run it; None where it can."""
        ...

    def refuses(self, queries: Tensor, part: Segment, softcap: float | None) -> str | None:
        """The reason why it can't attend from these queries to this segment; None where it can."""
        ...

    def read(self, queries: Tensor, part: Segment, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """As `longspec.attention.reference.read`."""
        ...


BACKENDS: dict[str, Backend] = {"flash": flash, "triton": triton}
"""The first that doesn't refuse a part reads it; the reference reads the rest, and on a CPU everything."""


def attend(
    queries: Tensor, parts: Iterable[Segment], scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of queries [q, H, D] over all segments; [q, H, D] in the queries' dtype.

    sinks: of each head [H], in fp32: a score that takes its share of the softmax and has no value.
    Every query must have at least one allowed column in at least one segment (its own staged row always is).
    """
    parts = iter(parts)
    head = next(parts)
    parts = chain((head,), parts)
    if cpu.refuses(queries, head) is None:
        return cpu.attend(queries, parts, scale, softcap, sinks)
    pieces = _readable(queries, parts, softcap)
    part, backend = next(pieces)
    following = next(pieces, None)
    is_plain = softcap is None and sinks is None and part.chosen is None
    if following is None and backend is None and is_plain:
        return reference.whole(queries, _dense(part), scale)
    total = _read(queries, part, backend, scale, softcap)
    while following is not None:
        total = merge(total, _read(queries, *following, scale, softcap))
        following = next(pieces, None)
    output = total[0] if sinks is None else reference.sunk(*total, sinks)
    return output.to(queries.dtype)


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two partial results over disjoint columns: outputs [q, H, D] and log-sum-exps [q, H], in fp32.

    A query without allowed columns on one side has a log-sum-exp of -inf there; that side's output is ignored.
    """
    (output_a, lse_a), (output_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    output = torch.where(weight_a > 0, output_a.float() * weight_a, 0.0)
    return output + torch.where(weight_b > 0, output_b.float() * weight_b, 0.0), lse


def backends() -> list[tuple[str, bool, str]]:
    """All backends of this machine, for the user: name, whether it is usable, and its purpose or the reason why not."""
    missing = {name: backend.missing() for name, backend in BACKENDS.items()}
    found = [(name, missing[name] is None, missing[name] or backend.USE) for name, backend in BACKENDS.items()]
    tiles = cpu.missing()
    return [("reference", True, reference.USE), ("cpu", tiles is None, tiles or cpu.USE), *found]


def _readable(
    queries: Tensor, parts: Iterable[Segment], softcap: float | None
) -> Iterator[tuple[Segment, Backend | None]]:
    """The segments with the backend of each; a quantized segment without a backend is dequantized in pieces."""
    for part in parts:
        backend = _backend(queries, part, softcap)
        if backend is not None:
            yield part, backend
        else:
            yield from ((piece, None) for piece in part.pieces())


def _backend(queries: Tensor, part: Segment, softcap: float | None) -> Backend | None:
    return next((each for each in BACKENDS.values() if each.refuses(queries, part, softcap) is None), None)


def _read(
    queries: Tensor, part: Segment, backend: Backend | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    if backend is not None:
        return backend.read(queries, part, scale, softcap)
    if reference.has_flash(queries, _dense(part), softcap):
        return reference.read_flash(queries, _dense(part), scale)
    return reference.read(queries, _dense(part), scale, softcap)


def _dense(part: Segment) -> Segment:
    assert not part.is_coded
    return part
