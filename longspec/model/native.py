"""A decoder's layers and head by the C kernel of `layer.c`, in bf16 or quantized, on a CPU; of mixers that aren't
attention the products, and of mixtures all but the routing.

Takes a decoder's weights without a copy; gives the results of torch's operators up to rounding, in less than half of
the time: on two cores with AMX all of the default model's layers and its head take 10.5 ms for 1 position and 11.4
for 16, where torch takes 24 and 27, and reading the weights alone 9. A position's bits don't depend on the other
positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspec.kernels.boundary import pointer, turned, workspace
from longspec.kernels.build import library
from longspec.kernels.team import team
from longspec.model.config import Config, LayerSpec
from longspec.model.rows import Pass
from longspec.model.weights.quantized import CodedLinear, Piece, missing_kernel, tile_nbytes

__all__ = ["ACTIVATIONS", "Fused", "Matrix", "kernel", "matrix_of", "missing"]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped": 2}
_UNIT = 32
_BF16 = 0


class Matrix(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("format", ctypes.c_int64),
        ("own", ctypes.c_int64),
        ("next", ctypes.c_void_p),
    )


_NORMS = ("before_mixer", "after_mixer", "before_mlp", "after_mlp", "query_norm", "key_norm", "value_norm")
_SIZES = ("norms_all_heads", "heads", "key_heads", "head_dim", "activation", "output_gate")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in ("inputs", "output", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in _NORMS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_float),
    )


class _Turn(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("dims", ctypes.c_int64))


class _Read(ctypes.Structure):
    _fields_ = (("texts", ctypes.c_void_p), ("workspace", ctypes.c_void_p))


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "rope_of", "place_of", "read_of", "parts", "ropes", "reads")),
        *((name, ctypes.c_void_p) for name in ("attend", "reading")),
        ("count", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("team", ctypes.c_void_p),
    )


def missing(config: Config, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why such a decoder can't use the kernel; None where it can."""
    c = config
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is for bf16 on the CPU, and this is {dtype} on {device.type}".replace("torch.", "")
    if c.activation not in ACTIVATIONS:
        return f"it doesn't know the activation {c.activation} of {c.family}"
    sizes = [c.width, c.heads * c.head_dim, c.key_heads * c.head_dim]
    sizes += [c.mlp_width] if any(spec.mlp == "dense" for spec in c.specs) else []
    if c.per_layer is not None:
        sizes += [c.per_layer.inputs, *c.per_layer.channels, *(heads * dim for heads, dim in c.per_layer.heads)]
    if c.delta is not None:
        sizes += [c.delta.inputs, c.delta.values]
    if c.mixture is not None:
        sizes += [c.mixture.width, c.mixture.shared]
    if any(size % _UNIT for size in sizes):
        return f"a width isn't a multiple of {_UNIT}"
    if c.vocabulary % _UNIT:
        return f"the vocabulary isn't a multiple of {_UNIT}"
    found = kernel()
    return found if isinstance(found, str) else missing_kernel()


class Fused:
    """The layers and the head of one decoder, all in bf16 or all coded; it keeps the tensors alive."""

    def __init__(self, config: Config, layers: Sequence[Any], norm: Tensor, head: Any) -> None:
        found = kernel()
        if isinstance(found, str):
            raise RuntimeError(found)
        self._kernel = found
        self._config = config
        self._norms: list[Tensor] = []  # in fp32
        some = zip(layers[: config.group], config.specs, strict=False)
        self._layers = [self._layer(layer, spec) for layer, spec in some] * config.loops
        self._pointers = [ctypes.addressof(layer) for layer in self._layers]
        self._places = [layer.mixer.place for layer in layers]
        self._mixers = [spec.mixer for spec in config.specs]
        self._whole = [
            spec.mixer == "attention" and spec.mlp == "dense" and layer.mixer.sinks is None and layer.end is None
            for layer, spec in zip(layers, config.specs, strict=True)
        ]
        self._ropes = [rope for rope in dict.fromkeys(config.ropes) if rope is not None]
        self._in_all = (
            torch.tensor(self._pointers),
            torch.tensor([self._ropes.index(rope) if rope else -1 for rope in config.ropes]),
            torch.tensor(self._places),
        )
        self._head, self._norm = matrix_of(head), self._norm_of(norm, config.width)
        self._held = (layers, head)
        self._workspace_nbytes = max(found.layer_workspace(pointer, config.width) for pointer in self._pointers)

    @property
    def linear(self) -> int | None:
        """The address of the C function for one product, for another kernel to call."""
        return ctypes.cast(self._kernel.linear, ctypes.c_void_p).value

    @property
    def head_matrix(self) -> int:
        return ctypes.addressof(self._head)

    def workspace(self) -> int:
        """The address of the calling thread's workspace, large enough for any product of this decoder."""
        return workspace("layer", self._workspace_nbytes).data_ptr()

    def run_from(self, first: int, last: int, run: Pass) -> int:
        """Where the run of layers ends that one call takes, from layer `first` on; `first` where it takes none."""
        last = last if run.by_kernel else first
        while first < last and self._whole[first]:
            first += 1
        return first

    def layers(self, first: int, last: int, hidden: Tensor, run: Pass, parts: Sequence[int]) -> Tensor:
        """Hidden states [r, width] after layers first..last, in one call; the attention kernel takes all spans of the
        pass. parts: a bit mask per layer: 1 attention, 2 MLP, 3 both.
        """
        c, rows, turns, texts = self._config, len(hidden), run.turns, run.texts
        assert texts is not None
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        qkv = hidden.new_empty(rows, self._layers[first].inputs.size)
        read = hidden.new_empty(rows, c.heads * c.head_dim)
        at = pointer(hidden, torch.bfloat16, rows, c.width)
        texts.begin(qkv, [self._places[i] for i in range(first, last) if parts[i] & 1])
        turned = [_Turn(*self._turn(turns[rope], rows, c.head_dim)) for rope in self._ropes]
        prepared = [_Read(*each) for each in texts.reads()]
        arrays = (
            (ctypes.c_int64 * len(texts.read_of))(*texts.read_of),
            (ctypes.c_uint8 * len(parts))(*parts),
            (_Turn * len(turned))(*turned),
            (_Read * len(prepared))(*prepared),
        )
        whole = _Pass(
            *(each.data_ptr() for each in self._in_all),
            *(ctypes.addressof(array) for array in arrays),
            *texts.call,
        )
        self._kernel.layers(whole, first, last, at, rows, qkv.data_ptr(), read.data_ptr(), self.workspace())
        return hidden

    def layer(self, index: int, hidden: Tensor, run: Pass, mixer: Any, *, mlp: bool) -> Tensor:
        """Hidden states [r, width] after a layer, whose attention reads a cache that the kernel doesn't, or whose mixer
        it doesn't know. mixer None skips the mixer, mlp False the MLP.
        """
        read = None
        if mixer is not None and self._mixers[index] == "attention":
            read = self._attended(index, hidden, run, mixer)
        elif mixer is not None and self._mixers[index] in ("grouped_linear", "shared_attention"):
            made = self.inputs(index, hidden)
            made = mixer.widened(made) if self._mixers[index] == "shared_attention" else made
            read = mixer.read_cache(self._turned(index, made, run.turns[mixer.rope] if mixer.rope else None), run)
        elif mixer is not None:
            read = mixer.mix(self.inputs(index, hidden), run)
        return self.finish(index, read, hidden, mlp=mlp)

    def _attended(self, index: int, hidden: Tensor, run: Pass, mixer: Any) -> Tensor:
        """Attention's output [r, H * D], times its gates where it has any."""
        qkv = self.project(index, hidden, run.turns[mixer.rope] if mixer.rope else None)
        read: Tensor = mixer.read_cache(qkv, run)
        if self._config.output_gate:
            read = read.contiguous()
            at = pointer(read, torch.bfloat16, len(qkv), self._layers[index].output.width)
            self._kernel.gate(self._pointers[index], qkv.data_ptr(), len(qkv), at, *team())
        return read

    def _turned(self, index: int, made: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """A product's heads [r, heads * D], normed and rotated in their place."""
        layer, rows = self._layers[index], len(made)
        rope = self._turn(turn, rows, layer.head_dim) if turn else (None, None, 0)
        at = pointer(made, torch.bfloat16, rows, (layer.heads + 2 * layer.key_heads) * layer.head_dim)
        self._kernel.turn(self._pointers[index], at, rows, made.shape[1], *rope, *team())
        return made

    def inputs(self, index: int, hidden: Tensor) -> Tensor:
        """The product of a mixer's inputs [r, size] of normed hidden [r, width]."""
        layer, rows, hidden = self._layers[index], len(hidden), hidden.contiguous()
        made = hidden.new_empty(rows, layer.inputs.size)
        at = pointer(hidden, torch.bfloat16, rows, self._config.width)
        matrix, norm = ctypes.addressof(layer) + _Layer.inputs.offset, layer.before_mixer
        self._kernel.linear(matrix, norm, self._config.eps, at, rows, made.data_ptr(), None, self.workspace(), *team())
        return made

    def project(self, index: int, hidden: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values [r, (heads + 2 key heads) * D] of hidden [r, width], with norms and rotation
        applied, and behind them the gates where there are any.
        """
        c, rows, hidden = self._config, len(hidden), hidden.contiguous()
        qkv = hidden.new_empty(rows, self._layers[index].inputs.size)
        at = pointer(hidden, torch.bfloat16, rows, c.width)
        rope = self._turn(turn, rows, c.head_dim) if turn else (None, None, 0)
        self._kernel.project(self._pointers[index], at, rows, *rope, qkv.data_ptr(), self.workspace(), *team())
        return qkv

    def finish(self, index: int, attention: Tensor | None, hidden: Tensor, *, mlp: bool = True) -> Tensor:
        """Hidden states [r, width] after the layer, from its attention's output [r, heads * D] and the hidden states
        before it. attention None skips the attention, mlp False the MLP.
        """
        c, rows, hidden = self._config, len(hidden), hidden.contiguous()
        output, read = torch.empty_like(hidden), None
        if attention is not None:
            attention = attention.contiguous()
            read = pointer(attention, torch.bfloat16, rows, self._layers[index].output.width)
        at = pointer(hidden, torch.bfloat16, rows, c.width)
        self._kernel.finish(self._pointers[index], read, at, rows, mlp, output.data_ptr(), self.workspace(), *team())
        return output

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [r, V] of hidden states [r, width], with the final norm applied, in fp32."""
        rows, hidden = len(hidden), hidden.contiguous()
        logits = hidden.new_empty(rows, self._head.size, dtype=torch.float32)
        at = pointer(hidden, torch.bfloat16, rows, self._config.width)
        self._kernel.linear(
            self.head_matrix, self._norm, self._config.eps, at, rows, None, logits.data_ptr(), self.workspace(), *team()
        )
        return logits

    def norm(self, hidden: Tensor) -> Tensor:
        """Hidden states [r, width] behind the final norm."""
        rows, hidden = len(hidden), hidden.contiguous()
        made = torch.empty_like(hidden)
        at = pointer(hidden, torch.bfloat16, rows, self._config.width)
        self._kernel.norm(self._norm, self._config.eps, at, rows, self._config.width, made.data_ptr())
        return made

    def _turn(self, turn: tuple[Tensor, Tensor], rows: int, head_dim: int) -> tuple[int, int, int]:
        """The addresses of cosines and signed sines [r, 1, dims], and dims."""
        dims = turned(turn[0].shape[-1], head_dim)
        cos, sin = (pointer(each, torch.bfloat16, rows, 1, dims) for each in turn)
        return cos, sin, dims

    def _layer(self, layer: Any, spec: LayerSpec) -> _Layer:
        c, mixer, mlp = self._config, layer.mixer, layer.mlp
        products = (mlp.gate_up, mlp.down) if spec.mlp == "dense" else (None, None)
        norms = [layer.before_mixer, layer.after_mixer, layer.before_mlp, layer.after_mlp]
        heads, keys, dim = getattr(mixer, "heads", (c.heads, c.key_heads, c.head_dim))
        all_heads = c.query_norm == "width"
        norms += [getattr(mixer, name, None) for name in _NORMS[4:]]
        widths = [c.width] * 4 + ([heads * dim, keys * dim] if all_heads else [dim, dim]) + [dim]
        return _Layer(
            *(matrix_of(linear) for linear in (mixer.inputs, mixer.output, *products)),
            *(self._norm_of(norm.weight, n) if norm else None for norm, n in zip(norms, widths, strict=True)),
            all_heads,
            heads,
            keys if getattr(mixer, "owns", True) else 0,
            dim,
            ACTIVATIONS[c.activation],
            c.output_gate and spec.mixer == "attention",
            c.eps,
        )

    def _norm_of(self, weight: Tensor, width: int) -> int:
        self._norms.append(weight.detach().float().contiguous())
        return pointer(self._norms[-1], torch.float32, width)


def matrix_of(linear: Any) -> Matrix:
    """A linear layer as the kernel's C struct, empty for None; the caller keeps its tensors alive."""
    if linear is None:
        return Matrix()
    coded = isinstance(linear, CodedLinear)
    size, width = linear.shape if coded else linear.weight.shape
    bias = None if linear.bias is None else pointer(linear.bias, torch.bfloat16, size)
    if not coded:
        return Matrix(pointer(linear.weight, torch.bfloat16, size, width), bias, size, width, _BF16, size, None)
    chain: list[Matrix] = []
    for piece in reversed(linear.pieces):
        following = ctypes.addressof(chain[-1]) if chain else None
        chain.append(Matrix(_tiles(piece), bias, size, width, piece.number, piece.size, following))
    linear.chain = chain  # the struct points to it
    return chain[-1]


def _tiles(piece: Piece) -> int:
    return pointer(piece.tiles, torch.uint8, piece.size // 16, tile_nbytes(piece.format, piece.width))


def kernel() -> ctypes.CDLL | str:
    """The loaded C library; the reason as a string where it isn't available."""
    found = library("layer.c")
    if isinstance(found, str):
        return found
    place, number = ctypes.c_void_p, ctypes.c_int64
    found.layer_workspace.argtypes, found.layer_workspace.restype = (place, number), number
    found.linear.argtypes = (place, place, ctypes.c_float, place, number, place, place, place, place, number)
    found.layers.argtypes = (ctypes.POINTER(_Pass), number, number, place, number, place, place, place)
    found.project.argtypes = (place, place, number, place, place, number, place, place, place, number)
    found.turn.argtypes = (place, place, number, number, place, place, number, place, number)
    found.gate.argtypes = (place, place, number, place, place, number)
    found.norm.argtypes = (place, ctypes.c_float, place, number, number, place)
    found.experts.argtypes = (place, place, number, number, place, place, place, place, number)
    found.finish.argtypes = (place, place, place, number, number, place, place, place, number)
    return found
