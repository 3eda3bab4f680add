"""A layer's products by the C kernel of `layer.c`: for a few rows in bf16, on a processor with tiles (AMX).

Takes a decoder's weights where they lie; gives what torch's operators give to within their rounding, in less than half
of the time: on two cores all of the default model's layers and its head take 10.5 ms for 1 row and 11.4 for 16, where
torch takes 24 and 27, and reading the weights 9. A row's bits don't depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longspec.attention.native_batch import Texts
from longspec.kernels.build import library
from longspec.model.config import Config, Rope
from longspec.model.weights.quantized import Groups

__all__ = ["MOST_ROWS", "Fused", "Matrix", "matrix_of", "missing"]

MOST_ROWS = 64
"""From here on torch is as fast: 23 ms for 64 rows against 27, 34 for 128 against 33."""

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}
_UNIT = 64
Turns = Mapping[Rope, tuple[Tensor, Tensor]]
_BF16, _CODES = 0, 1


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("before_attention", "before_mlp", "query_norm", "key_norm")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "head_dim", "activation")),
        ("eps", ctypes.c_float),
    )


class _Turn(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("dims", ctypes.c_int64))


class _Read(ctypes.Structure):
    _fields_ = (("texts", ctypes.c_void_p), ("room", ctypes.c_void_p))


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "turn_of", "read_of", "parts", "turns", "reads", "attend")),
        ("reading", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )


def missing(config: Config, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why such a decoder takes torch's operators; None where the kernel can be had."""
    c = config
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is for bf16 on the CPU, and this is {dtype} on {device.type}".replace("torch.", "")
    if c.norms != "before" or c.norm_offset or c.query_norm == "width" or c.activation not in _ACTIVATIONS:
        return f"it doesn't know the norms and the activation of {c.family}"
    if any(size % _UNIT for size in (c.width, c.mlp_width, c.heads * c.head_dim, c.key_heads * c.head_dim)):
        return f"a width isn't a multiple of {_UNIT}"
    if c.vocabulary % (_UNIT // 2):
        return f"the vocabulary isn't a multiple of {_UNIT // 2}"
    found = _kernel()
    return found if isinstance(found, str) else None


class Fused:
    """The layers and the head of one decoder: its own, whose tensors it keeps; in bf16 or, all of them, as codes."""

    def __init__(self, config: Config, layers: Sequence[Any], norm: Tensor, head: Any) -> None:
        kernel = _kernel()
        assert not isinstance(kernel, str)
        self._kernel = kernel
        self._config = config
        self._layers = [_layer(config, layer) for layer in layers]
        self._pointers = [ctypes.addressof(layer) for layer in self._layers]
        self._ropes = [rope for rope in dict.fromkeys(config.ropes) if rope is not None]
        self._in_all = (
            torch.tensor(self._pointers),
            torch.tensor([self._ropes.index(rope) if rope else -1 for rope in config.ropes]),
        )
        self._head, self._norm = matrix_of(head), norm.data_ptr()
        self._held = (layers, norm, head)
        room = kernel.layer_room(self._pointers[0], config.width, MOST_ROWS)
        self._room = torch.empty(room, dtype=torch.uint8)

    @property
    def linear(self) -> int | None:
        """Where the kernel's function for one product is, for another kernel to call."""
        return ctypes.cast(self._kernel.linear, ctypes.c_void_p).value

    @property
    def head_matrix(self) -> int:
        return ctypes.addressof(self._head)

    @property
    def room(self) -> int:
        """Where it works: enough for any product of this decoder's widths."""
        return self._room.data_ptr()

    def layers(self, first: int, last: int, hidden: Tensor, turns: Turns, texts: Texts, parts: Sequence[int]) -> Tensor:
        """Hidden [r, width] after layers first..last, r at most 64, in one call. Parts: of each layer, 1 for its
        attention and 2 for its MLP, together 3.
        """
        c, rows = self._config, len(hidden)
        hidden = hidden.clone()
        qkv = hidden.new_empty(rows, (c.heads + 2 * c.key_heads) * c.head_dim)
        read = hidden.new_empty(rows, c.heads * c.head_dim)
        texts.begin(qkv, [i for i in range(first, last) if parts[i] & 1])
        turned = [
            _Turn(cos.data_ptr(), sin.data_ptr(), cos.shape[-1]) for cos, sin in map(turns.__getitem__, self._ropes)
        ]
        prepared = [_Read(*each) for each in texts.reads]
        arrays = (
            (ctypes.c_int64 * len(parts))(*texts.read_of),
            (ctypes.c_uint8 * len(parts))(*parts),
            (_Turn * len(turned))(*turned),
            (_Read * len(prepared))(*prepared),
        )
        made = _Pass(
            *(each.data_ptr() for each in self._in_all),
            *(ctypes.addressof(array) for array in arrays),
            *texts.call,
        )
        self._kernel.layers(
            made, first, last, hidden.data_ptr(), rows, qkv.data_ptr(), read.data_ptr(), self._room.data_ptr()
        )
        return hidden

    def project(self, index: int, hidden: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values [r, (heads + 2 key heads) * D], normed and turned, from hidden [r, width]."""
        c, rows = self._config, len(hidden)
        made = hidden.new_empty(rows, (c.heads + 2 * c.key_heads) * c.head_dim)
        cos, sin, dims = (turn[0].data_ptr(), turn[1].data_ptr(), turn[0].shape[-1]) if turn else (0, 0, 0)
        for at in range(0, rows, MOST_ROWS):
            self._kernel.project(
                self._pointers[index],
                hidden[at:].data_ptr(),
                min(MOST_ROWS, rows - at),
                cos + at * dims * 2 if dims else None,
                sin + at * dims * 2 if dims else None,
                dims,
                made[at:].data_ptr(),
                self._room.data_ptr(),
            )
        return made

    def finish(self, index: int, attention: Tensor | None, hidden: Tensor, *, mlp: bool = True) -> Tensor:
        """Hidden [r, width] after the layer, of its attention's output [r, heads * D] and of hidden before it. Without
        attention that goes by the layer's, without `mlp` by its MLP.
        """
        made = torch.empty_like(hidden)
        for at in range(0, len(hidden), MOST_ROWS):
            self._kernel.finish(
                self._pointers[index],
                None if attention is None else attention[at:].data_ptr(),
                hidden[at:].data_ptr(),
                min(MOST_ROWS, len(hidden) - at),
                mlp,
                made[at:].data_ptr(),
                self._room.data_ptr(),
            )
        return made

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [r, V] of hidden states [r, width], through the final norm."""
        hidden, made = hidden.contiguous(), hidden.new_empty(len(hidden), self._head.size)
        for at in range(0, len(hidden), MOST_ROWS):
            self._kernel.linear(
                ctypes.addressof(self._head),
                self._norm,
                self._config.eps,
                hidden[at:].data_ptr(),
                min(MOST_ROWS, len(hidden) - at),
                made[at:].data_ptr(),
                self._room.data_ptr(),
            )
        return made


def _layer(config: Config, layer: Any) -> _Layer:
    c = config
    return _Layer(
        *(matrix_of(linear) for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)),
        layer.before_attention.weight.data_ptr(),
        layer.before_mlp.weight.data_ptr(),
        layer.query_norm.weight.data_ptr() if layer.query_norm else None,
        layer.key_norm.weight.data_ptr() if layer.key_norm else None,
        c.heads,
        c.key_heads,
        c.head_dim,
        _ACTIVATIONS[c.activation],
        c.eps,
    )


def matrix_of(linear: Any) -> Matrix:
    """A layer of weights as the kernel takes it; its tensors must be kept."""
    weight, bias = linear.weight, linear.bias
    assert weight.is_contiguous()
    at = bias.data_ptr() if bias is not None else None
    if not isinstance(linear, Groups):
        return Matrix(weight.data_ptr(), None, None, at, *weight.shape, _BF16)
    low = linear.low.data_ptr() if linear.low is not None else None
    scale = linear.scale.data_ptr()
    return Matrix(weight.data_ptr(), scale, low, at, linear.size, linear.width, _CODES, linear.bits)


def _kernel() -> ctypes.CDLL | str:
    found = library("layer.c")
    if isinstance(found, str):
        return found
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.layer_room.argtypes, found.layer_room.restype = (pointer, number, number), number
    found.linear.argtypes = (pointer, pointer, ctypes.c_float, pointer, number, pointer, pointer)
    found.layers.argtypes = (ctypes.POINTER(_Pass), number, number, pointer, number, pointer, pointer, pointer)
    found.project.argtypes = (pointer, pointer, number, pointer, pointer, number, pointer, pointer)
    found.finish.argtypes = (pointer, pointer, pointer, number, number, pointer, pointer)
    return found
