"""Convolutions along a row's path by the C kernels of `mixers.c`, on a CPU, of inputs in bf16.

Takes a history, whose last rows are the pass's own; gives a short convolution's output, or the struct that a kernel
reads inputs by. A row's bits depend on its path alone.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from longspec.cache.state_stage import History
from longspec.kernels.boundary import pointer
from longspec.kernels.build import library
from longspec.kernels.team import team

__all__ = ["Convolution", "KernelConvolution", "kernel", "missing", "row_of"]

_MOST_INPUTS, _WIDE = 64, 16


class Convolution(ctypes.Structure):
    """Where a pass's rows find their inputs: the kernel's C struct."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("tail", "x", "window", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("rows", "history", "inputs", "channels")),
    )


class _Short(ctypes.Structure):
    _fields_ = (
        ("of", Convolution),
        *((name, ctypes.c_void_p) for name in ("opening", "y")),
        ("opening_row", ctypes.c_int64),
    )


def missing(inputs: int, channels: int) -> str | None:
    """The reason why the kernels don't take such a convolution; None where they do."""
    if inputs > _MOST_INPUTS:
        return f"it reads {inputs} positions, and the kernel {_MOST_INPUTS} at most"
    if channels % _WIDE:
        return f"{channels} channels aren't a multiple of {_WIDE}"
    found = kernel()
    return found if isinstance(found, str) else None


class KernelConvolution:
    """A layer's convolution; it keeps the weights alive."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, channels: int | None = None) -> None:
        """weight: [inputs, channels]; or [inputs, heads], of so many channels."""
        self._weight, self._bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
        self._channels = weight.shape[1] if channels is None else channels

    def of(self, history: History) -> Convolution:
        """The struct for the pass's rows; the history and this object must outlive it."""
        layout, inputs, channels = history.layout, len(self._weight), self._channels
        tail, window = history.stage.cache.point.tail[history.layer], layout.window
        return Convolution(
            pointer(tail, torch.bfloat16, inputs - 1, 1, channels),
            pointer(history.rows["x"], torch.bfloat16, layout.size, 1, channels),
            None if window is None else pointer(window, torch.int64, layout.count, inputs),
            self._weight.data_ptr(),
            None if self._bias is None else pointer(self._bias, torch.float32, channels),
            layout.count, layout.size, inputs, channels,
        )  # fmt: skip

    def times(self, history: History, opening: Tensor, output: Tensor) -> None:
        """Write to output [r, channels] what `opening` [r, channels] makes of the convolution."""
        made = kernel()
        assert not isinstance(made, str)
        rows, channels = output.shape
        place, apart = row_of(opening, rows, channels)
        call = _Short(self.of(history), place, pointer(output, torch.bfloat16, rows, channels), apart)
        made.short_conv(ctypes.byref(call), *team())


def row_of(rows: Tensor, count: int, width: int) -> tuple[int, int]:
    """The address of rows [count, width] in bf16, which may be columns of a wider product; and how far apart they are:
    in values.
    """
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        raise TypeError(f"a kernel takes bfloat16 in host memory, not {rows.dtype} on {rows.device}")
    if rows.shape != (count, width) or rows.stride(1) != 1:
        raise ValueError(f"a kernel takes {count} rows of {width}, not {list(rows.shape)} by {rows.stride()}")
    return rows.data_ptr(), rows.stride(0)


def kernel() -> ctypes.CDLL | str:
    """The loaded C library; the reason as a string where it isn't available."""
    found = library("mixers.c")
    return found if isinstance(found, str) else _declared(found)


@cache
def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    for name in ("ingredients", "delta", "gated_norm", "short_conv", "grouped_units", "grouped"):
        getattr(found, name).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return found
