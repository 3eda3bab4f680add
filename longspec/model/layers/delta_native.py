"""The gated delta net by the C kernels of `mixers.c`, on a CPU: all that is between its two products.

Takes a history, the rows of the first product, and a branch of them; writes what rows leave and what they read. A row's
bits depend on its path alone. The rule itself is for every dtype, since a state is fp32 in all of them; what stands
before and behind it is for rows in bf16.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longspec.cache.layout import Branch
from longspec.cache.state_stage import History
from longspec.kernels.boundary import pointer
from longspec.kernels.team import team
from longspec.model.hybrids import Delta
from longspec.model.layers import conv_native
from longspec.model.layers.conv_native import Convolution, KernelConvolution, kernel, row_of
from longspec.model.layers.delta_rule import Ingredients
from longspec.model.layers.norm import Norm

__all__ = ["KernelDelta", "missing", "read_by_kernel"]

_WIDE, _MOST_DIM = 16, 256
_PLACES = ("state", "k", "u", "sums", "queries", "values", "decays", "strengths", "read")
_FP32 = torch.float32


class _Delta(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_PLACES, "rows", "parents", "fresh", "key_of")),
        *((name, ctypes.c_int64) for name in ("known", "count", "heads", "key_heads", "key_dim", "value_dim")),
    )


_BROUGHT = ("alpha", "beta", "decay", "bias", "queries", "k", "values", "decays", "strengths")


class _Ingredients(ctypes.Structure):
    _fields_ = (
        ("of", Convolution),
        *((name, ctypes.c_void_p) for name in _BROUGHT),
        *((name, ctypes.c_int64) for name in ("alpha_row", "beta_row", "heads", "key_heads", "key_dim", "value_dim")),
        ("scale", ctypes.c_float),
    )


class _Opened(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("read", "weight", "gate", "y")),
        *((name, ctypes.c_int64) for name in ("gate_row", "rows", "heads", "dim")),
        ("eps", ctypes.c_float),
    )


def missing(delta: Delta, device: torch.device) -> str | None:
    """The reason why the kernels don't take such layers; None where they do."""
    if device.type != "cpu":
        return f"it is for the CPU, and this is {device.type}"
    if any(dim % _WIDE or dim > _MOST_DIM for dim in (delta.key_dim, delta.value_dim)):
        return f"a head isn't a multiple of {_WIDE} up to {_MOST_DIM}"
    return conv_native.missing(delta.width, delta.channels)


def read_by_kernel(history: History, branch: Branch, every: Ingredients, read: Tensor, key_of: Tensor) -> None:
    """A `Form`: writes to `read` [r, H, D] what a branch's rows read, and to the history what they leave."""
    found = _kernel()
    (heads, value_dim), (key_heads, key_dim) = every.values.shape[1:], every.queries.shape[1:]
    count, size = len(read), history.layout.size
    rows, parents, fresh = branch.places
    call = _Delta(
        pointer(history.state(branch), _FP32, heads, key_dim, value_dim),
        pointer(history.rows["k"], _FP32, size, key_heads, key_dim),
        pointer(history.rows["u"], _FP32, size, heads, value_dim),
        pointer(history.rows["decay"], torch.float64, size, heads, 1),
        pointer(every.queries, _FP32, count, key_heads, key_dim),
        pointer(every.values, _FP32, count, heads, value_dim),
        pointer(every.decays, _FP32, count, heads),
        pointer(every.strengths, _FP32, count, heads),
        pointer(read, _FP32, count, heads, value_dim),
        *(pointer(each, torch.int64, None) for each in (rows, parents, fresh, key_of)),
        branch.known_count, len(fresh), heads, key_heads, key_dim, value_dim,
    )  # fmt: skip
    found.delta(ctypes.byref(call), *team())


class KernelDelta:
    """What stands before and behind the rule in one layer, for rows in bf16; it keeps the weights alive."""

    def __init__(self, delta: Delta, convolution: Tensor, decay: Tensor, bias: Tensor, norm: Norm) -> None:
        """convolution: [channels, inputs]; decay, bias: [H]."""
        self._delta, self._convolution, self._eps = delta, KernelConvolution(convolution.T), norm.eps
        self._decay, self._bias, self._norm = (each.float().contiguous() for each in (decay, bias, norm.weight))

    def ingredients(self, history: History, alpha: Tensor, beta: Tensor) -> Ingredients:
        """What a pass's rows bring, of their inputs, which the history has, and alpha, beta [r, H]; keys go to the
        history too.
        """
        d, count = self._delta, len(alpha)
        queries, values = torch.empty(count, d.key_heads, d.key_dim), torch.empty(count, d.value_heads, d.value_dim)
        decays, strengths = torch.empty(count, d.value_heads), torch.empty(count, d.value_heads)
        keys = history.rows["k"]
        (alpha_at, alpha_row), (beta_at, beta_row) = (row_of(each, count, d.value_heads) for each in (alpha, beta))
        call = _Ingredients(
            self._convolution.of(history),
            alpha_at, beta_at,
            pointer(self._decay, _FP32, d.value_heads),
            pointer(self._bias, _FP32, d.value_heads),
            queries.data_ptr(),
            pointer(keys, _FP32, history.layout.size, d.key_heads, d.key_dim),
            values.data_ptr(), decays.data_ptr(), strengths.data_ptr(),
            alpha_row, beta_row, d.value_heads, d.key_heads, d.key_dim, d.value_dim,
            d.key_dim**-0.5,
        )  # fmt: skip
        _kernel().ingredients(ctypes.byref(call), *team())
        return Ingredients(queries, keys[history.layout.earlier :], values, decays, strengths)

    def opened(self, read: Tensor, gate: Tensor) -> Tensor:
        """What was read [r, H, D], normed, times the SiLU of its gate [r, H * D]: in bf16."""
        d, count = self._delta, len(read)
        made = torch.empty(count, d.values, dtype=torch.bfloat16)
        place, apart = row_of(gate, count, d.values)
        call = _Opened(
            pointer(read, _FP32, count, d.value_heads, d.value_dim),
            pointer(self._norm, _FP32, d.value_dim),
            place, made.data_ptr(), apart, count, d.value_heads, d.value_dim, self._eps,
        )  # fmt: skip
        _kernel().gated_norm(ctypes.byref(call), *team())
        return made


def _kernel() -> ctypes.CDLL:
    found = kernel()
    assert not isinstance(found, str)
    return found
