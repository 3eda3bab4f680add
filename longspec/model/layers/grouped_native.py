"""Grouped linear attention by the C kernels of `mixers.c`, on a CPU, for rows in bf16.

Takes a history and the rows of the first product, rotated; writes what they leave and what they read. A row's bits
depend on its path alone.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longspec.cache.state_stage import History
from longspec.kernels.boundary import pointer
from longspec.kernels.team import team
from longspec.model.config import Config
from longspec.model.layers import conv_native
from longspec.model.layers.conv_native import Convolution, KernelConvolution, kernel, row_of

__all__ = ["KernelGrouped", "missing"]

_WIDE, _MOST_DIM = 16, 256
_PLACES = ("rows", "queries", "k", "u", "state", "y", "places", "parents", "fresh")


class _Grouped(ctypes.Structure):
    _fields_ = (
        ("of", Convolution),
        *((name, ctypes.c_void_p) for name in _PLACES),
        *((name, ctypes.c_int64) for name in ("apart", "known", "count", "heads", "key_heads", "dim")),
    )


def missing(config: Config) -> str | None:
    """The reason why the kernels don't take such layers; None where they do."""
    if config.head_dim % _WIDE or config.head_dim > _MOST_DIM:
        return f"a head isn't a multiple of {_WIDE} up to {_MOST_DIM}"
    return conv_native.missing(config.convolution, config.key_heads * config.head_dim)


class KernelGrouped:
    """One layer's; it keeps the weights alive."""

    def __init__(self, config: Config, convolution: Tensor) -> None:
        """convolution: [inputs, H]."""
        self._config = config
        self._convolution = KernelConvolution(convolution, channels=config.key_heads * config.head_dim)

    def __call__(self, history: History, rows: Tensor, output: Tensor) -> None:
        """Write to output [r, H * D] what rows [r, (H + 2 K) * D] read, and to the history their keys."""
        c, fp32, count = self._config, torch.float32, len(rows)
        made = kernel()
        assert not isinstance(made, str)
        size, heads, key_heads, dim = history.layout.size, c.heads, c.key_heads, c.head_dim
        place, apart = row_of(rows, count, (heads + 2 * key_heads) * dim)
        queries = torch.empty(count, heads, dim)
        call = _Grouped(
            of=self._convolution.of(history),
            rows=place,
            queries=queries.data_ptr(),
            k=pointer(history.rows["k"], fp32, size, key_heads, dim),
            u=pointer(history.rows["u"], fp32, size, key_heads, dim),
            y=pointer(output, torch.bfloat16, count, heads * dim),
            apart=apart, heads=heads, key_heads=key_heads, dim=dim,
        )  # fmt: skip
        made.grouped_units(ctypes.byref(call), *team())
        for branch in history.branches:
            places, parents, fresh = branch.places
            call.state = pointer(history.state(branch), fp32, key_heads, dim, dim)
            call.places, call.parents, call.fresh = (
                pointer(each, torch.int64, None) for each in (places, parents, fresh)
            )
            call.known, call.count = branch.known_count, len(fresh)
            made.grouped(ctypes.byref(call), *team())
