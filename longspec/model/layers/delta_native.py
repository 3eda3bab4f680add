"""The gated delta rule by the C kernel of `delta.c`, on a CPU: `delta_rule` in the order of each row's own path.

Takes a history and a branch; writes what its rows leave and what they read. A row's bits depend on its path alone.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from longspec.cache.layout import Branch
from longspec.cache.state_stage import History
from longspec.kernels.boundary import pointer
from longspec.kernels.build import library
from longspec.kernels.team import team
from longspec.model.hybrids import Delta
from longspec.model.layers.delta_rule import Ingredients

__all__ = ["missing", "read_by_kernel"]

_WIDE, _MOST_DIM = 16, 256
_PLACES = ("state", "k", "u", "sums", "queries", "values", "decays", "strengths", "read")


class _Delta(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_PLACES, "rows", "parents", "fresh", "key_of")),
        *((name, ctypes.c_int64) for name in ("known", "count", "heads", "key_heads", "key_dim", "value_dim")),
    )


def missing(delta: Delta, device: torch.device) -> str | None:
    """The reason why the kernel doesn't take such layers; None where it does."""
    if device.type != "cpu":
        return f"it is for the CPU, and this is {device.type}"
    if any(dim % _WIDE or dim > _MOST_DIM for dim in (delta.key_dim, delta.value_dim)):
        return f"a head isn't a multiple of {_WIDE} up to {_MOST_DIM}"
    found = _library()
    return found if isinstance(found, str) else None


def read_by_kernel(history: History, branch: Branch, every: Ingredients, read: Tensor, key_of: Tensor) -> None:
    """A `Form`: writes to `read` [r, H, D] what a branch's rows read, and to the history what they leave."""
    kernel = _library()
    assert not isinstance(kernel, str)
    (heads, value_dim), (key_heads, key_dim) = every.values.shape[1:], every.queries.shape[1:]
    count, size, fp32 = len(read), history.layout.size, torch.float32
    rows, parents, fresh = branch.places
    call = _Delta(
        pointer(history.state(branch), fp32, heads, key_dim, value_dim),
        pointer(history.rows["k"], fp32, size, key_heads, key_dim),
        pointer(history.rows["u"], fp32, size, heads, value_dim),
        pointer(history.rows["decay"], torch.float64, size, heads, 1),
        pointer(every.queries, fp32, count, key_heads, key_dim),
        pointer(every.values, fp32, count, heads, value_dim),
        pointer(every.decays, fp32, count, heads),
        pointer(every.strengths, fp32, count, heads),
        pointer(read, fp32, count, heads, value_dim),
        *(pointer(each, torch.int64, None) for each in (rows, parents, fresh, key_of)),
        branch.known_count, len(fresh), heads, key_heads, key_dim, value_dim,
    )  # fmt: skip
    kernel.delta(ctypes.byref(call), *team())


def _library() -> ctypes.CDLL | str:
    found = library("delta.c")
    return found if isinstance(found, str) else _declared(found)


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    found.delta.argtypes = (ctypes.POINTER(_Delta), ctypes.c_void_p, ctypes.c_int64)
    return found
