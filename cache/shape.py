"""What a cache must know of a model: what a token position leaves in its layers, and what those keep in place of rows.

Takes sizes; gives bytes, room, and the buffers of all layers. Knows no cache.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Buffers", "RowSpec", "Shape", "StateSpec"]

_MAPPED_NBYTES = 256 << 10
"""From here on a buffer is mapped: the page that its end wastes is then below one percent of it."""


class Buffers(list[Tensor]):
    """A tensor of each layer. Kernels take their addresses in every pass of every text: they are asked for once."""

    _places: ctypes.Array[ctypes.c_int64] | None = None

    @property
    def places(self) -> ctypes.Array[ctypes.c_int64]:
        """Where their values begin."""
        if self._places is None:
            self._places = (ctypes.c_int64 * len(self))(*(tensor.data_ptr() for tensor in self))
        return self._places

    def __setitem__(self, layer: Any, tensor: Any) -> None:
        super().__setitem__(layer, tensor)
        self._places = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Buffers, (list(self),)  # a copy's tensors stand elsewhere


@dataclass(frozen=True, slots=True)
class RowSpec:
    """What a token position leaves in a layer under one name: [heads, dim]."""

    name: str
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.heads * self.dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Layers that keep a state in place of all rows (`longspec.cache.recurrent`), all alike."""

    layers: int
    rows: tuple[RowSpec, ...]
    tail: int  # positions before a block whose `x` is read in it
    state: tuple[int, int, int] | None = None  # [heads, key dim, value dim] in fp32; None: rows and tail are all
    key_of: tuple[int, ...] = ()  # of each of the state's heads: the key's head

    @property
    def row_bytes(self) -> int:
        """Bytes of one position's rows in all layers."""
        return self.layers * sum(row.nbytes for row in self.rows)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states and tails at one position, of all layers."""
        tail = self.tail * sum(row.nbytes for row in self.rows if row.name == "x")
        return self.layers * (tail + (4 * prod(self.state) if self.state is not None else 0))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a cache must know of the model that fills it."""

    key_heads: int
    head_dim: int
    # Per attention layer: how many positions back a row reads, itself included; None is all.
    windows: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    states: StateSpec | None = None  # of the layers that aren't attention
    # Per attention layer: key heads and head dimension, where they differ; else empty.
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a window that holds no row: a kernel's columns would end before they begin."""
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"a row reads at least itself, and a window is {self.windows}")

    @property
    def layers(self) -> int:
        return len(self.windows)

    def empty(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room on the device, of any values.

        On a CPU large room comes from the system and goes back to it at once. malloc keeps what is freed, and buffers
        that grow don't fit into what their smaller selves left: 3,000 dense rows held 110 MB more than their own 67.
        """
        nbytes = prod(size) * dtype.itemsize
        if self.device.type != "cpu" or nbytes < _MAPPED_NBYTES:
            return torch.empty(*size, dtype=dtype, device=self.device)
        return torch.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(*size)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's keys and values in all layers, in `dtype`."""
        each = self.sizes or ((self.key_heads, self.head_dim),) * self.layers
        return 2 * sum(heads * dim for heads, dim in each) * self.dtype.itemsize

    @property
    def groups(self) -> tuple[Shape, ...]:
        """A shape for the layers of each size, in the order in which sizes occur."""
        if not self.sizes:
            return (self,)
        return tuple(
            replace(self, key_heads=size[0], head_dim=size[1], windows=windows, states=None, sizes=())
            for size in dict.fromkeys(self.sizes)
            if (windows := tuple(w for w, own in zip(self.windows, self.sizes, strict=True) if own == size))
        )

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Of each layer, its group and its place there."""
        if not self.sizes:
            return tuple((0, i) for i in range(self.layers))
        order = list(dict.fromkeys(self.sizes))
        return tuple((order.index(size), self.sizes[:i].count(size)) for i, size in enumerate(self.sizes))
